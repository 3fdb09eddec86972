"""What is measured on questions: the likeliest choice, the end of a text, a generated answer. For evaluation alone."""

# B questions, C options, T tokens

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.model.generation import generate
from txtrain.objectives.base import IGNORED, Batch, Objective, Statistics, of_targets, stacked
from txtrain.objectives.continuations import end_tokens


def read_by(model: Any, batch: Batch, two_stacks: bool) -> dict[str, Tensor]:
    """Each option as a row, for the model. Padding is on the right: one stack needs no mask for it, unless a row's
    length turns its rotations. One that has learned to is told what it reads from both sides, before the labels."""
    masked = two_stacks or getattr(getattr(model, "position", None), "by_length", False)
    names = ("input_ids", "labels", "attention_mask") if masked else ("input_ids", "labels")
    given = {name: batch[name].flatten(0, 1) for name in names}
    if getattr(model, "prefix_prompts", False) and not two_stacks:  # a Transformer, or what a strategy calls it through
        given["prefix_mask"] = (given["labels"] != IGNORED).cumsum(-1) == 0
    return given


class MultipleChoice(Objective):
    """The choice with the highest log-likelihood given the question; its sum, and per token and per byte of the choice.

    `loss`: of the right choice, in nats per token.
    """

    metrics = ("accuracy", "accuracy_per_token", "accuracy_per_byte")

    def __init__(self, two_stacks: bool = False) -> None:
        self.two_stacks = two_stacks

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        given = read_by(model, batch, self.two_stacks)
        found_NT = model(**given, return_logits=False, return_log_probs=True).log_probs
        sums_BC = found_NT.double().sum(-1).view(batch["n_bytes"].shape)
        n_BC = (given["labels"] != IGNORED).sum(-1).view(sums_BC.shape)
        answer_B1, ones = batch["answer"][:, None], torch.ones_like(batch["answer"])
        sums_BC = sums_BC.masked_fill(n_BC == 0, -torch.inf)  # fewer options than another question has
        of = {"accuracy": ones[:, None], "accuracy_per_token": n_BC, "accuracy_per_byte": batch["n_bytes"]}
        right = {
            name: stacked((sums_BC / n.clamp(min=1)).argmax(-1) == batch["answer"], ones) for name, n in of.items()
        }
        right_B, n_B = (values.gather(1, answer_B1)[:, 0] for values in (sums_BC, n_BC))
        return {**right, "loss": stacked(-right_B, n_B)}


class Cloze(Objective):
    """The known end of a text: `loss` and `perplexity` per token, and `accuracy`: whether the likeliest tokens are all
    its own, each given those before it."""

    perplexity = True
    metrics: tuple[str, ...] = ("accuracy",)

    def __init__(self, two_stacks: bool = False) -> None:
        self.two_stacks = two_stacks

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        given = read_by(model, batch, self.two_stacks)
        labels_BT = given["labels"]
        chosen_BT = labels_BT != IGNORED
        predicts_BT = chosen_BT if self.two_stacks else F.pad(chosen_BT[:, 1:], (0, 1))
        logits_NV = model(**given, logits_to_keep=predicts_BT).logits.float()
        zeros_BT = labels_BT.new_zeros(labels_BT.shape, dtype=logits_NV.dtype)
        losses_N = F.cross_entropy(logits_NV, labels_BT[chosen_BT], reduction="none")
        wrong_N = (logits_NV.argmax(-1) != labels_BT[chosen_BT]).to(zeros_BT.dtype)
        n_wrong_B = zeros_BT.masked_scatter(chosen_BT, wrong_N).sum(-1)
        known_B = chosen_BT.any(-1)
        return {
            **of_targets(-zeros_BT.masked_scatter(chosen_BT, losses_N), labels_BT, token_bytes),
            "accuracy": stacked((n_wrong_B == 0) & known_B, known_B),
        }


class Answers(Cloze):
    """The same, and `exact_match`: whether the answer that is generated greedily is the known one.

    Args:
        stop: texts that end an answer.
        pattern: what of both texts is compared: the last match, or its first group; None: all, without white space
            around it.
    """

    decodes = True
    metrics = ("accuracy", "exact_match")

    def __init__(
        self, two_stacks: bool = False, max_new_tokens: int = 64, stop: tuple[str, ...] = ("\n",),
        pattern: str | None = None, ignore_case: bool = False,
    ) -> None:
        super().__init__(two_stacks)
        self.max_new_tokens, self.stop, self.ignore_case = max_new_tokens, stop, ignore_case
        self.pattern = None if pattern is None else re.compile(pattern)

    def decode(self, model: Any, batch: Batch, tokenizer: Any) -> Statistics:
        texts = answered(model, batch, tokenizer, self.two_stacks, self.max_new_tokens, self.stop)
        known = [tokenizer.decode(row[row != IGNORED].tolist()) for row in batch["labels"][:, 0]]
        pairs = [(self._compared(a), self._compared(b)) for a, b in zip(texts, known, strict=True)]
        same = [a is not None and a == b for a, b in pairs]
        return {"exact_match": torch.tensor([[float(one), 1.0] for one in same], dtype=torch.float64)}

    def _compared(self, text: str) -> str | None:
        """None if the pattern is not in it: no answer at all equals none."""
        if self.pattern is not None:
            found = [m[1] if m.re.groups else m[0] for m in self.pattern.finditer(text)]
            if not found:
                return None
            text = found[-1] or ""
        return text.strip().casefold() if self.ignore_case else text.strip()


def answered(
    model: Any, batch: Batch, tokenizer: Any, two_stacks: bool, max_new_tokens: int, stop: tuple[str, ...] = (),
    **how: Any,
) -> list[str]:
    """The text with which the model continues what it reads of each question, up to an end token or a stop text.

    how: further arguments of `generate`.
    """
    ids_BT, read_BT = batch["input_ids"][:, 0], batch["attention_mask"][:, 0].bool()
    if not two_stacks:
        read_BT = read_BT & ((batch["labels"][:, 0] == IGNORED).long().cumprod(-1) == 1)  # without the known answer
    lengths = read_BT.sum(-1).tolist()
    room = [max_new_tokens] * len(lengths)
    if model.max_positions is not None:  # what a row may write is its own length's matter, not its neighbours'
        room = [max(0, min(max_new_tokens, model.max_positions - (1 if two_stacks else n))) for n in lengths]
    ends = end_tokens(model.config, tokenizer)
    texts = [""] * len(lengths)
    for n_new in sorted({*room} - {0}):
        rows = [i for i, n in enumerate(room) if n == n_new]
        P = max(lengths[i] for i in rows)
        prompts, mask = ids_BT.new_zeros(len(rows), P), ids_BT.new_zeros(len(rows), P)
        for at, i in enumerate(rows):
            prompts[at, P - lengths[i] :], mask[at, P - lengths[i] :] = ids_BT[i, : lengths[i]], 1
        out = generate(model, prompts, mask, max_new_tokens=n_new, eos_token_id=ends, **how)
        for i, row in zip(rows, out[:, 1 if two_stacks else P :].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            text = tokenizer.decode(row[:end])
            texts[i] = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
    return texts
