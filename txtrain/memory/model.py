"""The whole model's forward on a tape: embedding, stacks, head, loss. What `txtrain.model.transformer` does, in bytes."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from txtrain.memory.parts import Declared, Drawn, Place, choose, draw
from txtrain.memory.tape import Parameter, Tape, Value

if TYPE_CHECKING:
    from txtrain.memory.batch import Batch
    from txtrain.model.config import ModelConfig


@dc.dataclass
class Traced:
    """One forward: `around` is called for each block, and may gather its parameters or compute it again in the backward."""

    model: ModelConfig
    batch: Batch
    t: Tape
    around: Callable[[Callable[..., Value], Sequence[Value]], Value]
    device: str = "cpu"
    table: Parameter | None = None

    def loss(self) -> Value:
        """The total of all losses."""
        model, batch, t = self.model, self.batch, self.t
        memory = None
        if model.encoder_layers:
            table = self._table()
            memory = self._read(model.encoder_layers, table, batch.source, batch.source_masked, False, None)[0]
            self.table = table if model.share_embeddings else self._table()
        else:
            self.table = self._table()
        length = batch.target or batch.source
        masked = batch.target_masked if model.encoder_layers else batch.source_masked
        x, vectors = self._read(model.n_layers, self.table, length, masked, model.topology != "encoder", memory)
        place = Place(model, 0, batch.n, length, length)
        terms: list[Value] = [model.head.trace_loss(t, x, place, batch, self.table)]
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

    def _table(self) -> Parameter | None:
        return self.t.parameter(self.model.vocab_size, self.model.dim) if self.model.vocab_size else None

    def _read(self, n_layers: int, table: Parameter | None, length: int, masked: dict[str, bool], causal: bool, memory: Value | None) -> tuple[Value, Value]:
        """What leaves a stack, and the vectors that entered it. The order is that of `Transformer._read`."""
        model, t = self.model, self.t
        place = Place(model, 0, self.batch.n, length, length, device=self.device)
        vectors = model.embedding.trace_vectors(t, table, place, self.batch)
        x = model.position.trace_sum(t, vectors, place, bool(masked.get("documents_BS")))
        if model.embedding.norm:
            x = model.norm.trace(t, x, place)
        x = t.dropout(x, model.dropout)
        x = self._through(range(n_layers), x, place, masked, causal, memory)
        if model.has_final_norm:
            x = model.norm.trace(t, x, place)
        left: Value = t.dropout(x, model.output_dropout)
        return left, vectors

    def _through(self, layers: Sequence[int], x: Value, place: Place, masked: dict[str, bool], causal: bool, memory: Value | None) -> Value:
        model, t = self.model, self.t
        rotation = model.position.trace_rotation(t, place, bool(masked.get("documents_BS")))
        declared = Declared(place.queries, place.keys, causal, None, **masked)
        masks: dict[int | None, Drawn] = {}
        across = None if memory is None else self._across(place, memory)
        for layer in layers:
            window = model.attention.window_at(layer)
            if window not in masks:
                masks[window] = self._drawn(dc.replace(declared, window=window), place)
            mask = masks[window]
            here = dc.replace(place, layer=layer, rotation=rotation, mask=mask)
            bias = mask.bias if mask.bias is not None and mask.bias.edge is not None else None
            inputs = [x, *(y for y in (bias, memory) if y is not None)]
            block = partial(self._block, here, across, bias is not None)
            del x, bias
            x = self.around(block, inputs)
            del inputs
        return x

    def _drawn(self, declared: Declared, place: Place) -> Drawn:
        model, t = self.model, self.t
        bias = model.position.trace_bias(t, place)
        softcap = getattr(model.attention, "softcap", None) is not None
        kernel = choose(declared, self.device, bias, softcap, model.attention.dropped(model), t.size)
        return draw(t, declared, kernel, bias, place.batch)

    def _across(self, place: Place, memory: Value) -> Place:
        """Where a decoder's blocks look at what the encoder read."""
        model, batch = self.model, self.batch
        declared = Declared(place.queries, batch.source, False, None, **batch.source_masked)
        softcap = getattr(model.attention, "softcap", None) is not None
        kernel = choose(declared, self.device, None, softcap, model.attention.dropped(model), self.t.size)
        return dc.replace(place, keys=batch.source, mask=draw(self.t, declared, kernel, None, place.batch), memory=memory)

    def _block(self, here: Place, across: Place | None, learned: bool, t: Tape, x: Value, *others: Value) -> Value:
        """`Block.forward`, or `CrossBlock.forward`. others: what blocks share and give gradients to."""
        model = here.model
        if learned:
            assert here.mask is not None
            here = dc.replace(here, mask=dc.replace(here.mask, bias=others[0]))
        x = model.residual.joined(t, x, lambda y: model.attention.trace(t, y, here), here)
        if across is not None:
            crossing = dc.replace(across, layer=here.layer, memory=others[-1])
            x = model.residual.joined(t, x, lambda y: model.attention.trace(t, y, crossing), here)
        left: Value = model.residual.joined(t, x, lambda y: model.ffn.trace(t, y, here), here)
        return left

    def _further(self, x: Value, vectors: Value, depth: int, length: int, masked: dict[str, bool], place: Place) -> tuple[Value, Value]:
        """`mtp.FurtherToken`, and its loss."""
        model, t, n = self.model, self.t, length - depth
        here = dc.replace(place, queries=n, keys=n)
        sizes = here.tokens * model.dim
        joined = t.cat(model.norm.trace(t, t.sliced(x, sizes), here), model.norm.trace(t, t.sliced(vectors, sizes), here))
        x = t.linear(joined, 2 * model.dim, model.dim)
        del joined
        x = self._through([model.n_layers + depth - 1], x, here, masked, True, None)
        entering = model.norm.trace(t, x, here) if model.has_final_norm else x
        return x, model.head.trace_loss(t, entering, here, self.batch, self.table)
