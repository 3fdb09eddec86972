"""Norm positions: how a sublayer f joins the residual stream. One line each."""

# B batch, T positions, D model size

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Sublayer = Callable[[Tensor], Tensor]
MakeNorm = Callable[[int], nn.Module]


class _OneNorm(nn.Module):
    def __init__(self, dim: int, norm: MakeNorm, dropout: float) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.dropout = nn.Dropout(dropout)


class PreNorm(_OneNorm):
    """x + f(norm(x)): GPT-2 and most since; the stream itself is never normalised (Xiong et al. 2020, 2002.04745)."""

    def forward(self, x_BTD: Tensor, f: Sublayer) -> Tensor:
        return x_BTD + self.dropout(f(self.norm(x_BTD)))


class PostNorm(_OneNorm):
    """norm(x + f(x)): Vaswani et al. 2017 (1706.03762), GPT-1, BERT."""

    def forward(self, x_BTD: Tensor, f: Sublayer) -> Tensor:
        return self.norm(x_BTD + self.dropout(f(x_BTD)))


class InnerNorm(_OneNorm):
    """x + norm(f(x)): only the sublayer's output is normalised (OLMo 2, 2501.00656; Swin v2's res-post-norm)."""

    def forward(self, x_BTD: Tensor, f: Sublayer) -> Tensor:
        return x_BTD + self.dropout(self.norm(f(x_BTD)))


class SandwichNorm(nn.Module):
    """x + post(f(pre(x))): norms on both sides (CogView, 2105.13290; Gemma 2)."""

    def __init__(self, dim: int, norm: MakeNorm, dropout: float) -> None:
        super().__init__()
        self.pre_norm = norm(dim)
        self.post_norm = norm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, f: Sublayer) -> Tensor:
        return x_BTD + self.dropout(self.post_norm(f(self.pre_norm(x_BTD))))
