"""The keys of distillation. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from txtrain.objectives.base_config import ObjectiveConfig, Shapes
from txtrain.registry import config, knob
from txtrain.run_config import RunConfig

if TYPE_CHECKING:
    from txtrain.data.samples.taught import Taught


@config
class DistillConfig(ObjectiveConfig):
    """Next-token prediction from a teacher's distribution (1503.02531), and from the tokens themselves."""

    topologies: ClassVar = ("decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("text", "chat")
    alone: ClassVar = False

    # as init_from, with the same tokenizer; null: its distributions are in the folder of `txtrain prepare` (top_k)
    teacher: str | None = knob(None, literal=True)
    # forward: KL(teacher || student), which covers all that the teacher may say; reverse: KL(student || teacher)
    kl: Literal["forward", "reverse"] = "forward"
    temperature: float = knob(1.0, above=0)  # of both models; the divergence is multiplied by its square
    hard_weight: float = knob(0.5, at_least=0, at_most=1)  # of the tokens' cross-entropy; the divergence has the rest
    # the teacher's so many likeliest tokens, and all others as one; null: each token of the vocabulary
    top_k: int | None = knob(None, at_least=1)

    same_tokenizer: ClassVar = True

    @property
    def models(self) -> Mapping[str, str]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        offline = self.taught(config, "") if self.teacher is None else None
        return super().arguments(config) | {"offline": offline, "vocab_size": config.model.vocab_size}

    def taught(self, config: RunConfig, teacher: str) -> Taught:
        """What decides the distributions that `txtrain prepare` writes."""
        from txtrain.data.samples.taught import Taught

        assert self.top_k is not None
        data = config.data
        how = config.seq_len, data.packing, data.cross_document_attention
        return Taught(teacher, self.top_k, self.temperature, *how)

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        return self.teacher is not None and self.top_k is not None

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        shapes = super().batch_shapes(config, n)
        if self.teacher is not None or self.top_k is None:
            return shapes
        shape = shapes["input_ids"]
        return shapes | {"teacher_ids": (*shape, self.top_k), "teacher_log_probs": (*shape, self.top_k + 1)}

    def check_with(self, config: RunConfig) -> Iterator[str]:
        if self.teacher is None and not config.data.also:
            yield "`objective.teacher` must be given: a Hugging Face folder, an export, a run or a checkpoint."
        elif self.teacher is None and self.top_k is None:
            yield "`objective.top_k` must be given without objective.teacher: the one of `txtrain prepare`."
        if self.top_k is not None and self.top_k > config.model.vocab_size:
            most = f"at most model.vocab_size ({config.model.vocab_size})"
            yield f"`objective.top_k` must be {most}, but is {self.top_k} instead. Nearest: {config.model.vocab_size}."
        if self.top_k is not None and config.strategy.cuts_activations:
            cut = f"null with strategy={config.strategy.type}, which cuts the vocabulary"
            yield f"`objective.top_k` must be {cut}, but is {self.top_k} instead."
