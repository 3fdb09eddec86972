"""Embeddings of tokens, and of an image's patches."""

# B batch, T positions, D model size, V vocabulary, C channels, H and W pixels

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError


class TokenEmbedding(nn.Module):
    """One vector per token; a tied head reads the same weight.

    scale: times sqrt(dim) (Vaswani et al. 2017; Gemma), rounded to the vectors' dtype as in the published models.
    n_types: number of segments, whose vectors are added (BERT). norm: over the sum with the position; the model applies
    it. padding_idx: a token whose vector gets no gradient from look-ups.
    """

    n_channels = None  # of images, which it does not read

    def __init__(
        self, dim: int, vocab_size: int, scale: bool = False, n_types: int = 0, padding_idx: int | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim, padding_idx)
        self.segment = nn.Embedding(n_types, dim) if n_types else None
        self.norm, self.n_types = norm, n_types
        self.scale = math.sqrt(dim) if scale else None

    @property
    def weight_VD(self) -> Tensor:
        return self.token.weight

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.token(input_ids_BT)
        if self.scale is None:
            return x_BTD
        return x_BTD * torch.tensor(self.scale, dtype=x_BTD.dtype, device=x_BTD.device)

    def add_types(self, x_BTD: Tensor, token_type_ids_BT: Tensor | None) -> Tensor:
        """x plus the segments' vectors; by default all tokens are of segment 0."""
        if self.segment is not None:
            of_segment = self.segment.weight[0] if token_type_ids_BT is None else self.segment(token_type_ids_BT)
            return x_BTD + of_segment
        if token_type_ids_BT is not None:
            why = "the model has no segments (model.embedding.n_types is 0)"
            raise ConfigError(f"`token_type_ids` must not be given: {why}.")
        return x_BTD


class PatchEmbedding(nn.Module):
    """A linear map of each patch, row by row, after the class token's vector (ViT, 2010.11929)."""

    weight_VD = None  # no weight for a tied head

    def __init__(
        self, dim: int, patch_size: int, n_channels: int, class_token: bool, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.patch = nn.Conv2d(n_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.norm = norm

    def reset_parameters(self) -> None:
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)

    def forward(self, pixel_values_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Vectors [B, T, D], and the rows and columns of patches.

        Raises:
            ConfigError: a side is no multiple of the patch's.
        """
        height, width = pixel_values_BCHW.shape[-2:]
        p = self.patch.stride[0]
        if height % p or width % p:
            size = f"{height} x {width}"
            raise ConfigError(f"`pixel_values` must be a multiple of {p} pixels high and wide, but is {size} instead.")
        x_BTD = self.patch(pixel_values_BCHW.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_BTD = torch.cat((self.class_token.expand(len(x_BTD), -1, -1), x_BTD), dim=1)
        return x_BTD, (height // p, width // p)
