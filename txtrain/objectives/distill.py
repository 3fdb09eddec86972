"""Knowledge distillation: a small model learns a teacher's distributions (Hinton et al. 2015, 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from txtrain.data.samples.rows import Rows
from txtrain.data.samples.taught import Taught, TaughtSamples
from txtrain.data.samples.text import TokenisedText
from txtrain.model.head.distillation import Consume, Distillation, Soft, TopK
from txtrain.model.head.loss import chunk_logits
from txtrain.objectives.base import Batch, Objective, Shown, Terms, n_targets
from txtrain.objectives.continuations import continuations
from txtrain.run_config import RunConfig


class Distill(Objective):
    """(1 - hard_weight) `kl_loss` + hard_weight `hard_loss`, in nats per token over all targets of the global batch.

    offline: the teacher's distributions are in the folder of the tokens, and were made so.
    kl_loss: the divergence between teacher and student, times temperature squared. hard_loss: the cross-entropy of
    causal_lm. The student's forward calls the teacher's within its own, so that a chunk's logits of both are there.
    """

    masks = True
    reports = ("kl_loss", "hard_loss")

    def __init__(
        self, teacher: str | None = None, kl: str = "forward", temperature: float = 1.0, hard_weight: float = 0.5,
        top_k: int | None = None, counts_tokens: bool = False, offline: Taught | None = None, vocab_size: int = 0,
    ) -> None:
        self.reverse, self.temperature, self.hard_weight = kl == "reverse", temperature, hard_weight
        self.top_k, self.counts_tokens, self.offline, self.vocab_size = top_k, counts_tokens, offline, vocab_size

    def samples(self, text: TokenisedText) -> Rows:
        rows = text.sequences()
        return rows if self.offline is None else TaughtSamples(rows, text.tokens, self.offline, self.vocab_size)

    def denominators(self, batch: Batch) -> Terms:
        n = n_targets(batch["labels"][:, 1:])
        return {"loss": n, "kl_loss": n, "hard_loss": n}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        labels, n = batch["labels"], denominators["loss"]
        how = Distillation(self.reverse, self.temperature, self.hard_weight, n, lambda use: self._teach(batch, use))
        given = self._given(batch)
        output = model(
            **given, num_items_in_batch=n, return_logits=False,
            loss_of=lambda head, x_BTD, embedding_VD: head.distilled(x_BTD, embedding_VD, labels, how),
        )
        return {"loss": output.loss, "kl_loss": how.soft_loss, "hard_loss": how.hard_loss}

    def _given(self, batch: Batch) -> dict[str, Any]:
        mask = {"attention_mask": batch.get("attention_mask")} if self.counts_tokens else {}
        names = ("input_ids", "labels")
        return {**{name: batch[name] for name in names}, "document_ids": batch.get("document_ids"), **mask}

    def _teach(self, batch: Batch, consume: Consume) -> None:
        """Let `consume` read the teacher's distributions: those of the batch, or of the teacher's own forward."""
        if self.offline is None:
            self.read(self.models["teacher"], batch, consume)
            return
        # At t - 1 token t is predicted.
        ids_NK = batch["teacher_ids"].roll(-1, 1).flatten(0, 1)
        log_p_NK = batch["teacher_log_probs"].roll(-1, 1).flatten(0, 1)
        consume(lambda rows: TopK(ids_NK[rows], log_p_NK[rows, :-1], log_p_NK[rows, -1]))

    def read(self, teacher: Callable[..., Any], batch: Batch, consume: Consume) -> None:
        """Run the teacher, and let `consume` read its distributions where its head's weights are whole."""

        def loss_of(head: Any, x_BTD: Tensor, embedding_VD: Tensor | None) -> Tensor:
            x_ND, weight_VD, bias_V = head.multiplied(head.entering(x_BTD).flatten(0, 1), embedding_VD)

            def soft(rows: slice) -> Soft:
                logits_CV = chunk_logits(x_ND[rows], weight_VD, bias_V, head.softcap).div_(self.temperature)
                log_p_CV = logits_CV.sub_(head.vocabulary.log_z(logits_CV)[:, None])
                return log_p_CV if self.top_k is None else TopK.of(log_p_CV, self.top_k)

            consume(soft)
            return x_BTD.new_zeros(())

        teacher(**self._given(batch), return_logits=False, loss_of=loss_of)

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        return continuations(module, data, config, check)
