"""Prediction of a pair's target given its source, by an encoder-decoder (Vaswani et al. 2017, 1706.03762)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from txtrain.model.beam_search import beam_search
from txtrain.model.generation import generate
from txtrain.objectives.base import (
    IGNORED,
    Batch,
    Numbers,
    Objective,
    Shown,
    Statistics,
    Sums,
    Terms,
    n_targets,
    of_targets,
)
from txtrain.objectives.config import Score
from txtrain.objectives.score_sums import STATISTICS, with_scores
from txtrain.run_config import RunConfig

_LONGER = 50  # tokens by which an answer may exceed its source (1706.03762, section 6.1)


class Seq2Seq(Objective):
    """Cross-entropy of the target with teacher forcing, in nats per token, the end token included.

    label_smoothing: fraction of the target distribution spread over all tokens, in training (Szegedy et al. 2015,
    1512.00567). Validation has the plain cross-entropy, and `scores` of n_decoded answers (greedy, or by num_beams).
    """

    perplexity = True

    def __init__(
        self, label_smoothing: float = 0.0, scores: tuple[Score, ...] = (), n_decoded: int = 256, num_beams: int = 1,
        length_penalty: float = 0.6
    ) -> None:
        self.label_smoothing, self.metrics, self.n_decoded = label_smoothing, tuple(scores), n_decoded
        self.num_beams, self.length_penalty = num_beams, length_penalty

    def denominators(self, batch: Batch) -> Terms:
        return {"loss": n_targets(batch["labels"])}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        if not self.label_smoothing:
            return self.plain(model, batch, denominators)

        def loss_of(head: Any, x_BTD: Tensor, embedding_VD: Tensor | None) -> Tensor:
            loss: Tensor = head.loss(x_BTD, embedding_VD, batch["labels"], denominators["loss"], self.label_smoothing)
            return loss

        given = {**_given(batch), "num_items_in_batch": denominators["loss"]}
        return {"loss": model(**given, return_logits=False, loss_of=loss_of).loss}

    def plain(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        return {"loss": model(**_given(batch), num_items_in_batch=denominators["loss"], return_logits=False).loss}

    # ------------------------------------------------------------------------------------------------------- validation

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        output = model(**_given(batch), return_logits=False, return_log_probs=True)
        return of_targets(output.log_probs, batch["labels"], token_bytes)

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        return bool(self.metrics)

    def decode(self, model: Any, batch: Batch, tokenizer: Any) -> Statistics:
        answers = self.answered(model, batch, tokenizer.eos_id)
        references = [row[row != IGNORED].tolist()[:-1] for row in batch["labels"]]  # without the end token
        return {name: STATISTICS[name](answers, references, tokenizer) for name in self.metrics}

    def figures(self, sums: Sums) -> dict[str, Numbers]:
        return with_scores(super().figures(sums), sums)

    def target_ids(self, batch: Batch) -> Tensor:
        return batch["labels"][batch["labels"] != IGNORED]

    def examine(self, model: Any, data: Any, micro_batch_size: int) -> dict[str, float]:
        batches = () if data is None else data.examples(self.n_decoded, micro_batch_size)
        tables = [self.decode(model, batch, data.tokenizer) for batch in batches]
        sums = {name: torch.cat([table[name] for table in tables]).sum(0).numpy() for name in self.metrics if tables}
        return {name: float(value) for name, value in self.figures(sums).items()}

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        return (
            list(self._shown(module.model, data, config, check))
            if config.sample.n and config.sample.max_new_tokens else []
        )

    def _shown(self, model: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> Iterator[Shown]:
        for batch in data.examples(config.sample.n, 1):
            (answer,) = self.answered(model, batch, data.tokenizer.eos_id, check)
            source = batch["input_ids"][batch["attention_mask"] != 0].tolist()
            yield Shown(data.tokenizer.decode(source), data.tokenizer.decode(answer))

    def answered(
        self, model: Any, batch: Batch, eos_id: int, check: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """The answer to each source, up to the end token. check: called after each token; default: self.check."""
        check = check or self.check
        device = next(model.parameters()).device
        source, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        longest = None if model.max_positions is None else model.max_positions - 1
        limits = [n if longest is None else min(n, longest) for n in ((mask != 0).sum(1) + _LONGER).tolist()]
        how: dict[str, Any] = {"max_new_tokens": max(limits), "eos_token_id": eos_id}
        if self.num_beams == 1:
            ids = generate(model, source, mask, on_token=lambda _: check(), **how)
        else:
            ids = beam_search(
                model, source, mask, self.num_beams, self.length_penalty, on_step=check, limits=limits, **how
            )
        rows = (row[1 : 1 + n] for row, n in zip(ids.tolist(), limits, strict=True))  # without the start token
        return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def _given(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
