"""What a stack hands to its blocks: made once a forward, never changed by them but for the cache and the record of statistics."""

# B batch, T query positions, S key positions, D model size

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from txtrain.model.attention.cache import LayerCache, MemoryCache
from txtrain.model.attention.mask import PreparedMask
from txtrain.model.position.encodings import Rotation

Project = Callable[[Tensor], tuple[Tensor, ...]]  # [B, S, D] to what is attended to: keys and values, or a latent of them


@dc.dataclass(frozen=True)
class Context:
    """Of self-attention. `memory`: of the cross-attention beside it. `record`: where this layer's statistics go, by name.

    loss_scale: what an auxiliary loss of the layer is multiplied by, once the backward has begun (model/ffn/moe.py).
    """

    mask: PreparedMask
    rotation: Rotation | None = None
    cache: LayerCache | None = None
    memory: MemoryContext | None = None
    record: dict[str, Tensor] | None = None
    loss_scale: Tensor | None = None

    def attended(self, x_BTD: Tensor, project: Project) -> tuple[Tensor, ...]:
        """What the queries of x attend to: x itself, after what the cache holds."""
        new = project(x_BTD)
        return new if self.cache is None else self.cache.update(*new)

    def for_ffn(self, ffn: nn.Module) -> dict[str, Any]:
        """What an FFN's forward names of `record`, `valid_BT` and `loss_scale` (mixture of experts); the others take x alone."""
        kind: Any = type(ffn)
        if "record" not in _parameters(kind):
            return {}
        valid_BS = self.mask.declared.valid_BS
        valid_BT = None if valid_BS is None else valid_BS[:, -self.mask.declared.n_queries :]
        given = {"record": self.record, "valid_BT": valid_BT, "loss_scale": self.loss_scale}
        return {name: given[name] for name in _parameters(kind) if name in given}


@dc.dataclass(frozen=True)
class MemoryContext:
    """Of cross-attention: what is attended to is another stack's output, projected once a sequence."""

    mask: PreparedMask
    output_BSD: Tensor | None  # None: it is in the cache
    cache: MemoryCache | None = None
    rotation: None = None  # distances between two sequences mean nothing

    def attended(self, x_BTD: Tensor, project: Project) -> tuple[Tensor, ...]:
        if self.cache is None:
            assert self.output_BSD is not None
            return project(self.output_BSD)
        return self.cache.once(self.output_BSD, project)


AnyContext = Context | MemoryContext


@lru_cache
def _parameters(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)
