"""Masked language modelling, and next-sentence prediction (BERT: Devlin et al. 2018, 1810.04805)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.data.samples.rows import Mapped, Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.model.head.loss import cross_entropy
from txtrain.objectives.base import IGNORED, Batch, Counted, Objective, Statistics, Terms, n_right, n_targets, stacked
from txtrain.objectives.masking import Masking
from txtrain.objectives.sentence_pairs import SentencePairs


class MaskedLM(Objective):
    """Cross-entropy of the chosen tokens, in nats per token; with next_sentence also of the two classes, per pair.

    segments: the model has segment embeddings.
    """

    def __init__(
        self, probability: float = 0.15, mask_share: float = 0.8, random_share: float = 0.1, whole_word: bool = False,
        next_sentence: bool = False, segments: bool = True
    ) -> None:
        self.masking = partial(
            Masking, probability=probability, mask_share=mask_share, random_share=random_share, whole_word=whole_word
        )
        self.next_sentence, self.segments = next_sentence, segments
        self.special_tokens = ("[CLS]", "[SEP]", "[MASK]") if next_sentence else ("[MASK]",)
        self.weights = {"mlm_loss": 1.0, "nsp_loss": 1.0} if next_sentence else {"loss": 1.0}
        self.metrics = ("masked_accuracy", "nsp_accuracy") if next_sentence else ("masked_accuracy",)

    @property
    def term(self) -> str:
        """The name of the term of masked tokens."""
        return next(iter(self.weights))

    def samples(self, text: TokenisedText) -> Rows:
        rows: Rows
        if self.next_sentence:
            rows = SentencePairs(text.tokens, text.words, text.seq_len)
        else:
            rows = text.sequences(overlap=0)
        return Mapped(rows, self.masking(text.words))

    def denominators(self, batch: Batch) -> Terms:
        counts = {self.term: n_targets(batch["labels"])}
        if self.next_sentence:
            counts["nsp_loss"] = n_targets(batch["next_sentence_label"])
        return counts

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        return self._terms(self._output(model, batch, denominators), batch, denominators)

    def validate(self, model: Callable[..., Any], batch: Batch) -> Counted:
        counts = self.denominators(batch)
        ones = {name: torch.ones_like(n) for name, n in counts.items()}
        is_target_BT = batch["labels"] != IGNORED
        output = self._output(model, batch, ones, logits_to_keep=is_target_BT)  # [B, T, V] would be too large
        found = {name: (value, counts[name]) for name, value in self._terms(output, batch, ones).items()}
        found["masked_accuracy"] = n_right(output.logits, batch["labels"][is_target_BT]), counts[self.term]
        if self.next_sentence:
            found["nsp_accuracy"] = n_right(output.nsp_logits, batch["next_sentence_label"]), counts["nsp_loss"]
        return found

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        labels, counts = batch["labels"], self.denominators(batch)
        is_target_BT = labels != IGNORED
        output = self._output(model, batch, counts, logits_to_keep=is_target_BT)
        losses_N = F.cross_entropy(output.logits.float(), labels[is_target_BT], reduction="none")
        right_N = output.logits.argmax(-1) == labels[is_target_BT]
        spread = [torch.zeros_like(labels, dtype=torch.float64) for _ in range(2)]
        loss_BT, right_BT = (
            zeros.masked_scatter(is_target_BT, n.double()) for zeros, n in zip(spread, (losses_N, right_N), strict=True)
        )
        found = {self.term: stacked(loss_BT, is_target_BT), "masked_accuracy": stacked(right_BT, is_target_BT)}
        if self.next_sentence:
            pair_B, known_B = batch["next_sentence_label"], batch["next_sentence_label"] != IGNORED
            losses_B = F.cross_entropy(output.nsp_logits.float(), pair_B, ignore_index=IGNORED, reduction="none")
            found["nsp_loss"] = stacked(losses_B, known_B)
            found["nsp_accuracy"] = stacked((output.nsp_logits.argmax(-1) == pair_B) & known_B, known_B)
        return found

    def _output(
        self, model: Callable[..., Any], batch: Batch, denominators: Terms, logits_to_keep: Tensor | None = None
    ) -> Any:
        names = ("attention_mask", "document_ids", *(["token_type_ids"] if self.segments else []))
        given: dict[str, Any] = {name: batch[name] for name in names if name in batch}
        wanted: dict[str, Any] = (
            {"return_logits": False} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        )
        return model(
            input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=denominators[self.term], **wanted,
            **given
        )

    def _terms(self, output: Any, batch: Batch, denominators: Terms) -> Terms:
        terms = {self.term: output.loss}
        if self.next_sentence:
            terms["nsp_loss"] = cross_entropy(output.nsp_logits, batch["next_sentence_label"], denominators["nsp_loss"])
        return terms
