"""Prediction of what follows a bidirectional prefix of random length (Liu et al. 2018, 1801.10198; T5, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.rows import Mapped, Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.objectives.base import IGNORED, Batch, Objective, Terms, n_targets
from txtrain.objectives.causal_lm import CausalLM

_FOR_MODEL = ("attention_mask", "document_ids", "prefix_mask", "decoder_document_ids")


class PrefixLM(Objective):
    """Cross-entropy of the rest, in nats per token. two_stacks: the prefix is an encoder's, the rest a decoder's."""

    perplexity = True

    def __init__(self, two_stacks: bool = False) -> None:
        self.two_stacks = two_stacks

    def samples(self, text: TokenisedText) -> Rows:
        rows = text.sequences(overlap=0 if self.two_stacks else 1)
        return Mapped(rows, between_stacks if self.two_stacks else within_one)

    def denominators(self, batch: Batch) -> Terms:
        return {"loss": n_targets(self._targets(batch))}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        given = {name: batch[name] for name in _FOR_MODEL if name in batch}
        output = model(
            input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=denominators["loss"],
            return_logits=False, **given
        )
        return {"loss": output.loss}

    def target_ids(self, batch: Batch) -> Tensor:
        labels = self._targets(batch)
        return labels[labels != IGNORED]

    def _targets(self, batch: Batch) -> Tensor:
        return batch["labels"] if self.two_stacks else batch["labels"][:, 1:]

    show = CausalLM.show


def _prefix_lengths(n_tokens: int, draws: Draws) -> Tensor:
    """[B, 1]: uniform from 1 to n_tokens - 1."""
    return torch.from_numpy(1 + draws.integer("prefix", n_tokens - 1))[:, None]


def within_one(batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
    """For a decoder: prefix_mask marks the prefix, which has no labels."""
    T = batch["input_ids"].shape[1]
    prefix_mask = torch.arange(T) < _prefix_lengths(T, draws)
    return {**batch, "labels": batch["labels"].masked_fill(prefix_mask, IGNORED), "prefix_mask": prefix_mask}


def between_stacks(batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
    """For an encoder-decoder: the prefix as input, the rest as labels, both padded on the right to T - 1."""
    ids = batch["input_ids"]
    T = ids.shape[1]
    n_prefix = _prefix_lengths(T, draws)
    place = torch.arange(T - 1)
    rest = (n_prefix + place).clamp(max=T - 1)
    beyond = n_prefix + place >= T
    made = {
        "input_ids": ids[:, :-1].clone(),
        "attention_mask": (place < n_prefix).long(),
        "labels": ids.gather(1, rest).masked_fill(beyond, IGNORED),
    }
    if "document_ids" in batch:
        documents = batch["document_ids"]
        made |= {"document_ids": documents[:, :-1].clone(), "decoder_document_ids": documents.gather(1, rest)}
    return made
