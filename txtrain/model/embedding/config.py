"""The options of the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from txtrain.model.component import Component
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Batch, Place
from txtrain.model.trace.tape import Parameter, Tape, Value
from txtrain.registry import Cut, config, knob, register


@config
class EmbeddingBase(Component):
    norm: bool = knob(False, carry=True)  # the model's norm over the sum of embedding and position (BERT)

    n_types = 0  # a field of token embeddings only

    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches; None for a sequence."""
        return None

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        arguments = Component.arguments(self, model, layer)
        return {name: value for name, value in arguments.items() if name != "norm"}  # the builder makes it

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return model.norm.n_params(model) if self.norm else 0

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 0.0

    def trace_vectors(self, t: Tape, table: Parameter | None, place: Place, batch: Batch) -> Value:
        """The vectors of all positions. table: the vocabulary's."""
        raise NotImplementedError


@config
class TokenEmbeddingConfig(EmbeddingBase):
    """A vector per token, and per segment unless n_types is 0. scale: times sqrt(dim), in their dtype (Gemma)."""

    scale: bool = False
    n_types: int = knob(0, at_least=0)  # kinds of segments (BERT: 2)
    # A token whose vector gets no gradient from look-ups, as in Hugging Face's Llama and its descendants.
    padding_idx: int | None = knob(None, at_least=0, affects="training")

    def check(self, model: ModelShape) -> Iterator[str]:
        if model.vocab_size < 1:
            yield f"`model.vocab_size` must be at least 1, but is {model.vocab_size} instead."
        elif (index := self.padding_idx) is not None and index >= (n := model.vocab_size):
            yield f"`model.embedding.padding_idx` must be null or below model.vocab_size ({n}), but is {index} instead."

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return (model.vocab_size + self.n_types) * model.dim + EmbeddingBase.n_params(self, model)

    def trace_vectors(self, t: Tape, table: Parameter | None, place: Place, batch: Batch) -> Value:
        dim = place.model.dim
        assert table is not None
        x = t.lookup(table, place.tokens, dim)
        x = t.scaled(x) if self.scale else x
        if not self.n_types:
            return x
        types = t.parameter(self.n_types, dim, name="segment.weight")
        return t.add(x, t.lookup(types, place.tokens if batch.types else 1, dim))


@config
class PatchEmbeddingConfig(EmbeddingBase):
    """A vector per square of pixels, and the class token's before them (ViT, 2010.11929)."""

    image_size: int = knob(224, at_least=1)
    patch_size: int = knob(16, at_least=1)
    n_channels: int = knob(3, at_least=1)
    class_token: bool = True

    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    def n_positions(self) -> int:
        rows, columns = self.grid()
        return rows * columns + self.class_token

    def check(self, model: ModelShape) -> Iterator[str]:
        if self.image_size % self.patch_size:
            low = self.image_size // self.patch_size * self.patch_size
            near = ", ".join(str(n) for n in (low, low + self.patch_size) if n)
            allowed = f"a multiple of patch_size ({self.patch_size})"
            yield f"`model.embedding.image_size` must be {allowed}, but is {self.image_size} instead. Nearest: {near}."
        elif model.max_seq_len != (n := self.n_positions()):
            what = "the patches and the class token" if self.class_token else "the patches"
            yield f"`model.max_seq_len` must be {n}, {what}, but is {model.max_seq_len} instead. Nearest: {n}."

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        return {"patch_size": self.patch_size, "n_channels": self.n_channels, "class_token": self.class_token}

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        projection = model.dim * (self.n_channels * self.patch_size**2 + 1)
        return projection + (model.dim if self.class_token else 0) + EmbeddingBase.n_params(self, model)

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        rows, columns = self.grid()
        patches = 2.0 * model.dim * self.n_channels * self.patch_size**2
        return patches * rows * columns / self.n_positions()  # the class token costs nothing

    def trace_vectors(self, t: Tape, table: Parameter | None, place: Place, batch: Batch) -> Value:
        dim, pixels = place.model.dim, self.n_channels * self.patch_size**2
        rows, columns = self.grid()
        image = t.constant(place.batch * rows * columns * pixels)
        weight = t.parameter(dim, self.n_channels, self.patch_size, self.patch_size, name="patch.weight")
        x = t.linear(image, pixels, dim, bias=True, weight=weight, name="patch")
        if not self.class_token:
            return x
        return t.cat(t.expanded(t.parameter(1, 1, dim, name="class_token"), place.batch * dim), t.back_copied(x))


CUT: Cut = {"token": "vocabulary"}
register("embedding", "token", "txtrain.model.embedding.embeddings:TokenEmbedding", TokenEmbeddingConfig, CUT)
register("embedding", "patch", "txtrain.model.embedding.embeddings:PatchEmbedding", PatchEmbeddingConfig)
