"""What enters the first block."""

# B batch, T positions, D model size, V vocabulary

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """One vector a token; a tied head reads the same weight.

    scale: times sqrt(dim) (Vaswani et al. 2017; Gemma), the factor rounded to the vectors' dtype as the published models do.
    """

    def __init__(self, dim: int, vocab_size: int, scale: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)
        self.scale = math.sqrt(dim) if scale else None

    @property
    def weight_VD(self) -> Tensor:
        return self.token.weight

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.token(input_ids_BT)
        return self.scaled(x_BTD)

    def scaled(self, x_BTD: Tensor) -> Tensor:
        """Vectors given by the caller (`inputs_embeds`) are scaled like those looked up."""
        return x_BTD if self.scale is None else x_BTD * torch.tensor(self.scale, dtype=x_BTD.dtype, device=x_BTD.device)
