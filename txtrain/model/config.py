"""ModelConfig: one transformer, described. Dataclasses, legality and closed forms; no torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, Literal

from txtrain.model import axes
from txtrain.registry import TABLE, axis, choice


@dc.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How weights start. Biases start at 0 and norms at the identity in all of them."""

    distribution: Literal["normal", "truncated_normal", "xavier_uniform"] = "normal"  # of the matrices; embeddings are always (truncated) normal
    std: float = 0.02
    embedding_std: float | None = None  # null: std
    position_std: float | None = None  # of learned positions; null: std
    scale_residual: bool = False  # matrices that write into the residual stream divided by sqrt(2 n_layers) (GPT-2)


@dc.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer. `family`, `size` and `published` are labels: nothing in the model depends on them.

    attention, ffn, position, norm and embedding hold the config of one option each (`txtrain.model.axes`).
    """

    family: str
    size: str = "laptop"
    published: dict[str, int] = dc.field(default_factory=dict)  # the family's published models and their parameters

    topology: Literal["decoder"] = "decoder"
    n_layers: int
    dim: int
    n_heads: int
    vocab_size: int
    max_seq_len: int
    dropout: float = 0.0  # of the embedding's sum and of each sublayer's output

    norm_position: str = choice("norm_position", "pre")
    final_norm: bool | None = None  # after the last block; null: yes, unless the norm position is post
    attention: Any = axis("attention")
    ffn: Any = axis("ffn")
    position: Any = axis("position")
    norm: Any = axis("norm")
    embedding: Any = axis("embedding")
    tie_word_embeddings: bool = True
    logit_softcap: float | None = None  # softcap * tanh(logits / softcap)
    bos_token_id: int | None = None  # null: the tokenizer's, once it is known
    eos_token_id: int | tuple[int, ...] | None = None  # any of several ends a text
    pad_token_id: int | None = None
    init: InitConfig = dc.field(default_factory=InitConfig)

    # ---------------------------------------------------------------------------------------------------------- legality

    def check(self) -> Iterator[str]:
        """Problems as finished sentences; none if the model can be built."""
        for name in ("n_layers", "dim", "n_heads", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                yield f"`model.{name}` must be at least 1, but is {getattr(self, name)} instead."
                return  # what follows divides by them
        if not 0 <= self.dropout < 1:
            yield f"`model.dropout` must be at least 0 and below 1, but is {self.dropout} instead."
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            yield f"`model.logit_softcap` must be above 0 or null, but is {self.logit_softcap} instead."
        for name in ("std", "embedding_std", "position_std"):
            value = getattr(self.init, name)
            if value is not None and value < 0:
                yield f"`model.init.{name}` must be at least 0, but is {value} instead."
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if any(not 0 <= v < self.vocab_size for v in (value if isinstance(value, tuple) else (value or 0,))):
                yield f"`model.{name}` must be null or from 0 to {self.vocab_size - 1}, but is {value} instead."
        for _, component in self.components():
            yield from component.check(self)

    # ------------------------------------------------------------------------------------------------------------- parts

    def components(self) -> Iterator[tuple[str, axes.Component]]:
        """The chosen option of each axis, norm position included."""
        for f in dc.fields(self):
            if "axis" in f.metadata:
                yield f.name, getattr(self, f.name)
        yield "norm_position", self.residual

    @property
    def residual(self) -> axes.Component:
        made: axes.Component = TABLE["norm_position"][self.norm_position].config(type=self.norm_position)
        return made

    @property
    def has_final_norm(self) -> bool:
        return self.norm_position != "post" if self.final_norm is None else self.final_norm

    # ------------------------------------------------------------------------------------------------------- closed forms

    def n_params_by_part(self) -> dict[str, int]:
        """Trainable parameters by part. A tied head owns none."""
        layers = range(self.n_layers)
        return {
            "embedding": self.embedding.n_params(self),
            "position": self.position.n_params(self),
            "attention": sum(self.attention.n_params(self, i) for i in layers),
            "ffn": sum(self.ffn.n_params(self, i) for i in layers),
            "norms": 2 * self.n_layers * self.residual.n_params(self) + (self.norm.n_params(self) if self.has_final_norm else 0),
            "head": 0 if self.tie_word_embeddings else self.vocab_size * self.dim,
        }

    @property
    def n_params(self) -> int:
        return sum(self.n_params_by_part().values())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward a trained token, the backward twice the forward; no recomputation.

        Matrix products only, attention in full (PaLM, 2204.02311, appendix B), a window counted as its width.
        """
        forward = 2.0 * self.vocab_size * self.dim  # the head, tied or not
        for i in range(self.n_layers):
            forward += self.attention.flops(self, seq_len, i) + self.ffn.flops(self, seq_len, i)
        return 3.0 * forward

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `txtrain.typed.build(ModelConfig, d)` reads them back."""
        from txtrain.typed import plain

        made: dict[str, Any] = plain(self)
        return made
