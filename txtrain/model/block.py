"""One layer. Axes meet here and nowhere else."""

# B batch, T positions, D model size

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from txtrain.model.context import Context


class Block(nn.Module):
    """Attention, then feed-forward, each joined to the residual stream by the norm position's rule."""

    sublayers: ClassVar[dict[str, str]] = {"attention": "attention", "ffn": "ffn"}  # name and axis

    def __init__(
        self, attention: nn.Module, attention_residual: nn.Module, ffn: nn.Module, ffn_residual: nn.Module
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_residual = attention_residual
        self.ffn = ffn
        self.ffn_residual = ffn_residual
        kind: Any = type(ffn)
        self.ffn_reads = frozenset(inspect.signature(kind.forward).parameters)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.attention_residual(x_BTD, partial(self.attention, context=context))
        return self.ffn_residual(x_BTD, partial(self.ffn, **context.for_ffn(self.ffn_reads)))


class CrossBlock(Block):
    """The same with cross-attention to the encoder's output in between (Vaswani et al. 2017)."""

    sublayers: ClassVar[dict[str, str]] = {**Block.sublayers, "cross_attention": "attention"}

    def __init__(self, cross_attention: nn.Module, cross_attention_residual: nn.Module, **of_block: Any) -> None:
        super().__init__(**of_block)
        self.cross_attention = cross_attention
        self.cross_attention_residual = cross_attention_residual

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.attention_residual(x_BTD, partial(self.attention, context=context))
        x_BTD = self.cross_attention_residual(x_BTD, partial(self.cross_attention, context=context.cross))
        return self.ffn_residual(x_BTD, partial(self.ffn, **context.for_ffn(self.ffn_reads)))
