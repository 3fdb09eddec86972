"""Norm kinds."""

# B batch, T positions, D the normalised size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.norm import fused


class NoNorm(nn.Module):
    """The identity: a model without normalisation."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, 1607.06450)."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.layer_norm(x_BTD, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (1910.07467). unit_offset: * (1 + weight), which decays to 1 (Gemma)."""

    def __init__(self, dim: int, eps: float = 1e-5, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight) if self.unit_offset else nn.init.ones_(self.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.dtype not in (torch.bfloat16, torch.float16):
            weight = 1.0 + self.weight if self.unit_offset else self.weight
            return fused.rms_norm(x_BTD, self.weight.shape, weight, self.eps)
        # Rounded as in the published models: Llama before the product with the weight, Gemma after it, whose 1 + weight
        # in bfloat16 would keep 8 bits of a weight near 0.
        normed = fused.rms_norm(x_BTD.float(), self.weight.shape, eps=self.eps)
        if self.unit_offset:
            return (normed * (1.0 + self.weight.float())).to(x_BTD.dtype)
        return self.weight * normed.to(x_BTD.dtype)
