"""The whole model's forward on a tape: embedding, stacks, head, loss; as `txtrain.model.transformer`, in bytes."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from txtrain.model.attention.kernel_choice import Declared
from txtrain.model.config import ModelConfig
from txtrain.model.trace.attention_ops import Batch, Drawn, Place, choose, draw
from txtrain.model.trace.tape import Parameter, Tape, Value, dotted


def recomputes(checkpointing: str | int, model: ModelConfig, number: int) -> bool:
    """Whether the block that is the number-th to run is recomputed in the backward.

    `activation_checkpointing.wrap_blocks` numbers modules, of which the decoder's come first; the encoder runs first.
    """
    if not isinstance(checkpointing, int):
        return checkpointing != "none"
    n_encoder = model.encoder_layers
    return (number + model.n_layers if number < n_encoder else number - n_encoder) % checkpointing == 0


@dc.dataclass
class Traced:
    """One forward. around: is called for each block, and may gather its parameters or recompute it in the backward."""

    model: ModelConfig
    batch: Batch
    t: Tape
    around: Callable[[Callable[..., Value], Sequence[Value]], Value]
    device: str = "cpu"
    table: Parameter | None = None
    parts: dict[str, list[Parameter]] = dc.field(default_factory=dict)  # of the embedding: its parameters, by path

    def loss(self) -> Value:
        """The total of all losses."""
        model, batch, t = self.model, self.batch, self.t
        memory = None
        if model.encoder_layers:
            table = self._table("embedding" if model.share_embeddings else "encoder_embedding")
            with t.at("encoder"):
                memory = self._read(model.encoder_layers, table, batch.source, batch.source_masked, False, None)[0]
            self.table = table if model.share_embeddings else self._table()
        else:
            self.table = self._table()
        length = batch.target or batch.source
        masked = batch.target_masked if model.encoder_layers else batch.source_masked
        x, vectors = self._read(model.n_layers, self.table, length, masked, model.topology != "encoder", memory)
        place = Place(model, 0, batch.n, length, length)
        terms: list[Value] = [t.named("head", model.head.trace_loss, t, x, place, batch, self.table)]
        x_before = x
        del x
        for depth in range(1, model.mtp_depth + 1):
            x_before, term = self._further(x_before, vectors, depth, length, masked, place)
            terms.append(term)
        del x_before, vectors
        total: Value = terms.pop()
        while terms:
            total = t.add(total, terms.pop())
        return total

    def _table(self, module: str = "embedding") -> Parameter | None:
        return (
            self.t.parameter(self.model.vocab_size, self.model.dim, name=f"{module}.token.weight")
            if self.model.vocab_size else None
        )

    def _read(
        self, n_layers: int, table: Parameter | None, length: int, masked: dict[str, bool], causal: bool,
        memory: Value | None
    ) -> tuple[Value, Value]:
        """Output of a stack, and the embedded input. In the order of `Transformer._read`."""
        model, t = self.model, self.t
        place = Place(model, 0, self.batch.n, length, length, device=self.device)
        vectors = self._embedded("", model.embedding.trace_vectors, t, table, place, self.batch)
        x = t.named("position", model.position.trace_sum, t, vectors, place, bool(masked.get("documents_BS")))
        if model.embedding.norm:
            x = self._embedded(".norm", model.norm.trace, t, x, place)
        x = t.dropout(x, model.dropout)
        x = self._through({f"blocks.{i}": i for i in range(n_layers)}, x, place, masked, causal, memory)
        if model.has_final_norm:
            x = t.named("final_norm", model.norm.trace, t, x, place)
        left: Value = t.dropout(x, model.output_dropout)
        return left, vectors

    def _embedded(self, part: str, trace: Callable[..., Value], *args: Any) -> Value:
        """The trace of a part of the embedding, whose parameters exist once where both stacks read one."""
        t, shared = self.t, self.model.share_embeddings or not self.t.path
        path, first = ("embedding" if shared else "encoder_embedding") + part, len(self.t.parameters)
        earlier = self.parts.get(path)
        with t.having(path=path, replayed=None if earlier is None else iter(earlier)):
            made: Value = trace(*args)
        self.parts.setdefault(path, t.parameters[first:])
        return made

    def _through(
        self, layers: dict[str, int], x: Value, place: Place, masked: dict[str, bool], causal: bool,
        memory: Value | None
    ) -> Value:
        """layers: name of a block -> its layer."""
        model, t = self.model, self.t
        rotation = model.position.trace_rotation(t, place, bool(masked.get("documents_BS")))
        declared = Declared(place.queries, place.keys, causal, None, **masked)
        masks: dict[int | None, Drawn] = {}
        across = None if memory is None else self._across(place, memory)
        for i, (name, layer) in enumerate(layers.items()):
            window = model.attention.window_at(layer)
            if window not in masks:
                masks[window] = self._drawn(dc.replace(declared, window=window), place)
            mask = masks[window]
            here = dc.replace(place, layer=layer, rotation=rotation, mask=mask, first=i == 0, last=i == len(layers) - 1)
            bias = mask.bias if mask.bias is not None and mask.bias.edge is not None else None
            inputs = [x, *(y for y in (bias, memory) if y is not None)]
            block = partial(self._block, here, across, bias is not None)
            del x, bias
            with t.within(name):
                x = self.around(block, inputs)
            del inputs
        return x

    def _drawn(self, declared: Declared, place: Place) -> Drawn:
        model, t = self.model, self.t
        with t.within("position"):
            bias = self._bias(place)
        bias = None if bias is None else t.low(bias)
        softcap = model.attention.softcap is not None
        kernel = choose(
            declared, self.device, bias, softcap, model.attention.dropped(model), 2 if t.autocast else t.size
        )
        return draw(t, declared, kernel, bias, place.batch)

    def _bias(self, place: Place) -> Value | None:
        """The bias that the position adds to the scores."""
        made: Value | None = place.model.position.trace_bias(self.t, place)
        return made

    def _across(self, place: Place, memory: Value) -> Place:
        """The place of cross-attention to the encoder's output."""
        model, batch = self.model, self.batch
        declared = Declared(
            place.queries, batch.source, False, None, **batch.source_masked,
            query_documents_BT=batch.target_masked.get("documents_BS")
        )
        softcap = model.attention.softcap is not None
        kernel = choose(
            declared, self.device, None, softcap, model.attention.dropped(model), 2 if self.t.autocast else self.t.size
        )
        return dc.replace(
            place, keys=batch.source, mask=draw(self.t, declared, kernel, None, place.batch), memory=memory
        )

    def _block(self, here: Place, across: Place | None, learned: bool, t: Tape, x: Value, *others: Value) -> Value:
        """`Block.forward` or `CrossBlock.forward`. others: values that blocks share and that take gradients."""
        if learned:
            assert here.mask is not None
            here = dc.replace(here, mask=dc.replace(here.mask, bias=others[0]))
        x = self._joined(t, x, "attention", "attention", here, here)
        if across is not None:
            x = self._joined(
                t, x, "cross_attention", "attention", dc.replace(across, layer=here.layer, memory=others[-1]), here
            )
        return self._joined(t, x, "ffn", "ffn", here, here)

    def _joined(self, t: Tape, x: Value, name: str, axis: str, at: Place, here: Place) -> Value:
        """A sublayer and its residual connection. axis: of the sublayer's component."""
        block, component = t.path, getattr(here.model, axis)

        def sublayer(y: Value) -> Value:
            with t.at(dotted(block, name)):
                return self._computed(component, axis, t, y, at)

        with t.within(f"{name}_residual"):
            left: Value = here.model.residual.joined(t, x, sublayer, here)
        return left

    def _computed(self, component: Any, axis: str, t: Tape, x: Value, at: Place) -> Value:
        made: Value = component.trace(t, x, at)
        return made

    def _further(
        self, x: Value, vectors: Value, depth: int, length: int, masked: dict[str, bool], place: Place
    ) -> tuple[Value, Value]:
        """`mtp.MTPModule`, and its loss."""
        model, t, n = self.model, self.t, length - depth
        here = dc.replace(place, queries=n, keys=n)
        sizes = here.tokens * model.dim
        own = f"mtp.{depth - 1}"
        hidden = t.named(f"{own}.hidden_norm", model.norm.trace, t, t.sliced(x, sizes), here)
        joined = t.cat(hidden, t.named(f"{own}.token_norm", model.norm.trace, t, t.sliced(vectors, sizes), here))
        del hidden
        x = t.linear(joined, 2 * model.dim, model.dim, name=f"{own}.projection")
        del joined
        x = self._through({f"{own}.block": model.n_layers + depth - 1}, x, here, masked, True, None)
        entering = t.named(f"{own}.final_norm", model.norm.trace, t, x, here) if model.has_final_norm else x
        return x, t.named("head", model.head.trace_loss, t, entering, here, self.batch, self.table)
