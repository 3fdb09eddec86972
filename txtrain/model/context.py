"""What a stack hands to its blocks, once per forward; blocks change only the cache and the record."""

# B batch, T query positions, S key positions, D model size

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from txtrain.model.attention.cache import CrossCache, LayerCache
from txtrain.model.attention.mask import PreparedMask
from txtrain.model.position.encodings import Rotation

Project = Callable[[Tensor], tuple[Tensor, ...]]  # [B, S, D] to keys and values, or to their latent


@dc.dataclass(frozen=True)
class Context:
    """Of self-attention. cross: of the cross-attention in the same block. record: the layer's statistics, by name.

    loss_scale: factor of the layer's auxiliary loss, known once the backward has begun (model/ffn/moe.py).
    """

    mask: PreparedMask
    rotation: Rotation | None = None
    cache: LayerCache | None = None
    cross: CrossContext | None = None
    record: dict[str, Tensor] | None = None
    loss_scale: Tensor | None = None

    def attended(self, x_BTD: Tensor, project: Project) -> tuple[Tensor, ...]:
        """Keys and values: those in the cache, then those of x."""
        new = project(x_BTD)
        return new if self.cache is None else self.cache.update(*new)

    def for_ffn(self, named: Collection[str]) -> dict[str, Any]:
        """Those of `record`, `valid_BT` and `loss_scale` that the FFN's forward names, if it records at all."""
        if "record" not in named:
            return {}
        valid_BS = self.mask.declared.valid_BS
        valid_BT = None if valid_BS is None else valid_BS[:, -self.mask.declared.n_queries :]
        given = {"record": self.record, "valid_BT": valid_BT, "loss_scale": self.loss_scale}
        return {name: value for name, value in given.items() if name in named}


@dc.dataclass(frozen=True)
class CrossContext:
    """Of cross-attention, to the encoder's output."""

    mask: PreparedMask
    output_BSD: Tensor | None  # None: the cache has its keys and values
    cache: CrossCache | None = None
    rotation: None = None  # distances between two sequences mean nothing

    def attended(self, x_BTD: Tensor, project: Project) -> tuple[Tensor, ...]:
        if self.cache is not None:
            return self.cache.once(self.output_BSD, project)
        assert self.output_BSD is not None
        return project(self.output_BSD)


AnyContext = Context | CrossContext
