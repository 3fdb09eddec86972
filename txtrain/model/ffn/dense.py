"""Feed-forward networks."""

# B batch, T positions, D model size, F hidden size

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.ffn.gated import GRADIENTS, gated, gelu_gradient


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation (Hendrycks and Gimpel 2016, 1606.08415): GPT-1, GPT-2, Gemma."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021, 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu2": relu2, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "silu": F.silu, "tanh": torch.tanh,
}
GRADIENTS[gelu_tanh] = partial(gelu_gradient, approximate="tanh")


class MLP(nn.Module):
    """down(act(up(x))) (Vaswani et al. 2017, 1706.03762)."""

    residual_projections = ("down_proj",)

    def __init__(self, dim: int, hidden_dim: int, activation: str, bias: bool, ffn_dropout: float = 0.0) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.act = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(ffn_dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.act(self.up_proj(x_BTD))
        return self.down_proj(self.dropout(h_BTF))


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x)): GLU variants (Shazeer 2020, 2002.05202). SwiGLU is act=silu, GeGLU act=gelu_tanh."""

    residual_projections = ("down_proj",)

    def __init__(self, dim: int, hidden_dim: int, activation: str, bias: bool, ffn_dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.act = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(ffn_dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = gated(self.act, self.gate_proj(x_BTD), self.up_proj(x_BTD))
        return self.down_proj(self.dropout(h_BTF))
