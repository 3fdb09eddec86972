"""Position schemes: one class with three hooks, which by default do nothing.

    add(x)        adds to the embedding                sinusoidal, learned
    rotation()    rotates q and k in every layer       RoPE and its scalings
    bias(...)     is added to the scores               T5's buckets, ALiBi

The stack calls each hook once per forward and hands the values to all its blocks.
"""

# B batch, T query positions, S key positions, N heads, H head size, R rotated part of it, D model size

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.position.config import LinearScaling, Llama3Scaling, RoPEScalingConfig, YaRNScaling
from txtrain.registry import resolve


class Rotation(NamedTuple):
    """cos and sin of every position's angles, [B or 1, 1, T, R / 2], in the dtype of the residual stream."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BNTR: Tensor) -> Tensor:
        """Pairs (i, i + R/2) rotated by their angle: the halves convention of GPT-NeoX and Hugging Face."""
        a, b = x_BNTR.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1).to(x_BNTR.dtype)


class Position(nn.Module):
    """No position (NoPE, Kazemnejad et al. 2023, 2305.19466), and the base of all schemes."""

    max_positions: int | None = None  # None: unlimited
    by_length: bool = False  # rotations depend on a row's largest position, so that padding must have a small one

    def add(self, x_BTD: Tensor, position_ids_BT: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """grid: rows and columns of an image's patches, which come last in x."""
        return x_BTD

    def rotation(self, position_ids_BT: Tensor, dtype: torch.dtype) -> Rotation | None:
        return None

    def bias(self, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor | None:
        """Added to the scores, [B or 1, N, T, S]."""
        return None


class Sinusoidal(Position):
    """Sine in the even dimensions, cosine in the odd ones, wavelengths from 2 pi to theta * 2 pi (Vaswani et al. 2017).

    layout: `halves` has all sines first, as the paper's own code and Marian do; only the order of dimensions differs.
    """

    def __init__(self, dim: int, theta: float, layout: str) -> None:
        super().__init__()
        self.dim, self.theta, self.interleaved = dim, theta, layout == "interleaved"

    def add(self, x_BTD: Tensor, position_ids_BT: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        half = torch.arange(0, self.dim, 2, dtype=torch.float32, device=x_BTD.device)
        angles = position_ids_BT[..., None].float() * torch.exp(half * (-math.log(self.theta) / self.dim))
        waves = (angles.sin(), angles.cos())
        table_BTD = torch.stack(waves, dim=-1).flatten(-2) if self.interleaved else torch.cat(waves, dim=-1)
        return x_BTD + table_BTD.to(x_BTD.dtype)


class Learned(Position):
    """One trained vector per position (BERT, GPT). For another resolution an image's table is interpolated (ViT)."""

    def __init__(self, dim: int, max_seq_len: int, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_seq_len, dim)
        self.max_positions, self.grid = max_seq_len, grid

    def add(self, x_BTD: Tensor, position_ids_BT: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if grid != self.grid and grid is not None:
            return x_BTD + self.interpolated(grid).to(x_BTD.dtype)
        return x_BTD + self.embedding(position_ids_BT)

    def interpolated(self, grid: tuple[int, int]) -> Tensor:
        """The table for other rows and columns, [1, T, D]: bicubic over the patches; the class token's vector stays."""
        assert self.grid is not None
        return over_patches(self.embedding.weight, self.grid, grid)[None]

    def takes(self, other: Learned) -> bool:
        """Whether `from_table` can be given the other's table: of text, or of images with as many class tokens."""
        if self.grid is None or other.grid is None:
            return self.grid is other.grid
        n, theirs = self.embedding.num_embeddings, other.embedding.num_embeddings
        return n - math.prod(self.grid) == theirs - math.prod(other.grid)

    def from_table(self, table_TD: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """A table for these positions from one that was learned for others, of images with that grid.

        A longer table of text is interpolated between its first and last row; a shorter one is the first rows.
        """
        if self.grid is not None and grid is not None:
            return over_patches(table_TD, grid, self.grid)
        n = self.embedding.num_embeddings
        if len(table_TD) >= n:
            return table_TD[:n]
        return F.interpolate(table_TD.T[None], size=n, mode="linear", align_corners=True)[0].T


def over_patches(table_TD: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A table of images for other rows and columns: bicubic over the patches; the class token's vector stays."""
    n_patches = math.prod(grid)
    class_token, patches = table_TD[:-n_patches], table_TD[-n_patches:]
    image = patches.T.reshape(1, -1, *grid)
    resized = F.interpolate(image, size=wanted, mode="bicubic", align_corners=False)
    return torch.cat((class_token, resized.flatten(2)[0].T))


class RelativeBias(Position):
    """T5 (Raffel et al. 2020, 1910.10683): a trained bias per head and bucket of distance, one table for all layers.

    Half of a direction's buckets are exact distances; the others grow logarithmically up to max_distance.
    """

    def __init__(self, n_heads: int, n_buckets: int, max_distance: int, causal: bool) -> None:
        super().__init__()
        self.n_buckets, self.max_distance, self.bidirectional = n_buckets, max_distance, not causal
        self.embedding = nn.Embedding(n_buckets, n_heads)

    def bucket(self, relative: Tensor) -> Tensor:
        """Bucket of key position minus query position."""
        n = self.n_buckets
        offset = torch.zeros_like(relative)
        if self.bidirectional:
            n //= 2
            offset = (relative > 0).to(relative.dtype) * n
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        exact = n // 2
        far = torch.log(distance.float() / exact) / math.log(self.max_distance / exact) * (n - exact)
        far = (exact + far.to(relative.dtype)).clamp(max=n - 1)
        return offset + torch.where(distance < exact, distance, far)

    def bias(self, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor:
        relative_BTS = k_positions_BS[:, None, :] - q_positions_BT[:, :, None]
        return self.embedding(self.bucket(relative_BTS)).permute(0, 3, 1, 2)


@lru_cache
def alibi_slopes(n_heads: int) -> tuple[float, ...]:
    """2^(-8/n), 2^(-16/n), ... for powers of two; else those of the power below, then every other of that above."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    if power < n_heads:
        slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return tuple(slopes)


class ALiBi(Position):
    """- slope * distance (Press et al. 2022, 2108.12409)."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(n_heads)

    def bias(self, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor:
        slopes_N = torch.tensor(self.slopes, device=q_positions_BT.device)
        distance_BTS = (q_positions_BT[:, :, None] - k_positions_BS[:, None, :]).abs()
        return -slopes_N[:, None, None] * distance_BTS[:, None]


class Frequencies(NamedTuple):
    """Radians per position of each pair, [R / 2] on the CPU, and the factor on cos and sin."""

    inverse: Tensor
    attention_factor: float


def base_frequencies(rotary_dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)


def linear_frequencies(c: LinearScaling, rotary_dim: int, theta: float) -> Frequencies:
    return Frequencies(base_frequencies(rotary_dim, theta) / c.factor, 1.0)


def unscaled_frequencies(c: RoPEScalingConfig, rotary_dim: int, theta: float) -> Frequencies:
    """Of a scaling that is another base (`resolved`), or that begins beyond a length (`stretched`)."""
    return Frequencies(base_frequencies(rotary_dim, theta), 1.0)


def yarn_frequencies(c: YaRNScaling, rotary_dim: int, theta: float) -> Frequencies:
    def dimension(rotations: float) -> float:
        """The pair that makes so many rotations over the original length."""
        n = c.original_max_position_embeddings
        return rotary_dim * math.log(n / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = ((torch.arange(rotary_dim // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    base = base_frequencies(rotary_dim, theta)
    return Frequencies(base / c.factor * ramp + base * (1 - ramp), yarn_attention_factor(c))


def yarn_attention_factor(c: YaRNScaling) -> float:
    if c.attention_factor is not None:
        return c.attention_factor

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(c.factor) + 1.0 if c.factor > 1 else 1.0

    return mscale(c.mscale) / mscale(c.mscale_all_dim) if c.mscale and c.mscale_all_dim else mscale(1.0)


def llama3_frequencies(c: Llama3Scaling, rotary_dim: int, theta: float) -> Frequencies:
    base, n = base_frequencies(rotary_dim, theta), c.original_max_position_embeddings
    wavelength = 2 * math.pi / base
    blend = (n / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    blended = (1 - blend) * base / c.factor + blend * base
    long, short = n / c.low_freq_factor, n / c.high_freq_factor
    kept = torch.where(wavelength < short, base, blended)
    return Frequencies(torch.where(wavelength > long, base / c.factor, kept), 1.0)


@lru_cache
def frequencies(rotary_dim: int, theta: float, scaling: RoPEScalingConfig | None) -> Frequencies:
    with torch.device("cpu"), torch.inference_mode(False):
        if scaling is None:
            return Frequencies(base_frequencies(rotary_dim, theta), 1.0)
        scale: Callable[[RoPEScalingConfig, int, float], Frequencies] = resolve("rope_scaling", scaling.rope_type)
        return scale(scaling, rotary_dim, theta)


def stretched(position_ids_BT: Tensor, max_seq_len: int, theta: float, factor: float, inverse: Tensor) -> Tensor:
    """Frequencies of dynamic NTK at each row's largest position, [B or 1, 1, 1, R / 2]; `inverse` up to max_seq_len.

    No host sync.
    """
    size = 2 * len(inverse)
    length = position_ids_BT.amax(1)[:, None, None, None] + 1
    grown = factor * length.clamp(min=max_seq_len) / max_seq_len - (factor - 1)
    base = theta * grown ** (size / max(size - 2, 1))
    shares = torch.arange(0, size, 2, dtype=torch.int64, device=base.device).float() / size
    return torch.where(length > max_seq_len, 1.0 / base**shares, inverse)


class RoPE(Position):
    """Rotary embedding (Su et al. 2021, 2104.09864) with the scalings of `config.RoPEScalingConfig`.

    Angles are computed from the position ids, in float32, once per forward. A buffer would be garbage after the meta
    device, and a table would limit the length.
    """

    def __init__(
        self, rotary_dim: int, theta: float, scaling: RoPEScalingConfig | None = None, max_seq_len: int = 0
    ) -> None:
        super().__init__()
        self.rotary_dim, self.theta, self.scaling, self.max_seq_len = rotary_dim, theta, scaling, max_seq_len
        self.by_length = scaling is not None and scaling.by_length

    def rotation(self, position_ids_BT: Tensor, dtype: torch.dtype) -> Rotation:
        inverse, factor = frequencies(self.rotary_dim, self.theta, self.scaling)
        inverse = inverse.to(position_ids_BT.device)
        if self.scaling is not None and self.by_length:
            inverse = stretched(position_ids_BT, self.max_seq_len, self.theta, self.scaling.factor, inverse)
        angles = position_ids_BT[:, None, :, None].float() * inverse
        return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))
