"""The inputs of `Transformer.forward`, and their validation.

Only `outside` reads values; all else reads shapes and dtypes: nothing waits for the device, no compiled graph breaks.
"""

# B batch, T positions given, S positions seen (past + T), D model size, C channels, H and W pixels

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.model.attention.cache import Cache

INTEGERS = (torch.int64, torch.int32)
LABELS = (torch.int64,)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Sizes = Mapping[str, int | None]  # of a tensor's dimensions, by their letters; None: any, but not 0

TARGET = {  # the arguments of a decoder beside an encoder
    "ids": "decoder_input_ids", "mask": "decoder_attention_mask", "positions": "decoder_position_ids",
    "documents": "decoder_document_ids",
}


@dc.dataclass(frozen=True)
class Inputs:
    """One stack's inputs."""

    ids: Tensor | None = None
    embeds: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    documents: Tensor | None = None
    types: Tensor | None = None
    pixels: Tensor | None = None
    prefix: Tensor | None = None

    def check(self, reads: Reads, past: int = 0, prefix: str = "") -> tuple[int, int]:
        """B and T (0 for images), if the inputs are valid. prefix: of their names in `forward`."""
        if sum(x is not None for x in (self.ids, self.embeds, self.pixels)) != 1:
            raise ConfigError("`input_ids`, `inputs_embeds` or `pixel_values` must be given, and only one of them.")
        if reads.n_channels is not None:
            if self.pixels is None:
                raise ConfigError("`pixel_values` must be given: the model reads images.")
            require("pixel_values", self.pixels, {"B": None, "C": reads.n_channels, "H": None, "W": None})
            return self.pixels.shape[0], 0
        if self.pixels is not None:
            raise ConfigError("`pixel_values` must not be given: the model reads tokens.")
        if self.embeds is not None:
            require("inputs_embeds", self.embeds, {"B": None, "T": None, "D": reads.dim})
        else:
            require(f"{prefix}input_ids", self.ids, {"B": None, "T": None}, INTEGERS)
        given: Any = self.ids if self.embeds is None else self.embeds
        B, T = given.shape[:2]
        if self.mask is not None:
            require(f"{prefix}attention_mask", self.mask, {"B": B, "S": None})
            if (n := self.mask.shape[1]) not in (T, past + T):
                wanted = f"{T} columns" + (f", or {past + T} with those of the cache" if past else "")
                raise ConfigError(f"`{prefix}attention_mask` must have {wanted}, but has {n} instead.")
        if self.positions is not None:
            one = isinstance(self.positions, Tensor) and self.positions.shape[:1] == (1,)  # for all rows
            require(f"{prefix}position_ids", self.positions, {"B": 1 if one else B, "T": T}, INTEGERS)
        ids = {f"{prefix}document_ids": self.documents, "token_type_ids": self.types, "prefix_mask": self.prefix}
        for name, x in ids.items():
            if x is not None:
                require(name, x, {"B": B, "T": T}, () if x is self.prefix else INTEGERS)
        return B, T


@dc.dataclass(frozen=True)
class Reads:
    """What a model reads. n_channels: of images; None: tokens. pools: its head has one result per row.

    check_labels: `Head.check_labels`.
    """

    dim: int
    n_channels: int | None
    n_blocks: int
    two_stacks: bool
    pools: bool
    check_labels: Callable[[object, int, int], None]

    def check(self, main: Inputs, target: Inputs, labels: Any, cache: Any, logits_to_keep: Any) -> None:
        """Validate one forward's arguments.

        Raises:
            ConfigError: a shape or dtype is wrong, or inputs do not fit this topology.
        """
        if cache is not None and (not isinstance(cache, Cache) or len(cache.layers) != self.n_blocks):
            what = "another model's" if isinstance(cache, Cache) else type(cache).__name__
            raise ConfigError(f"`past_key_values` must be what this model's last call returned, but is {what} instead.")
        past = 0 if cache is None else cache.length
        if self.two_stacks:
            B, T = self._check_pair(main, target, labels, cache, past)
        elif given := [name for field, name in TARGET.items() if getattr(target, field) is not None]:
            raise ConfigError(f"`{given[0]}` must not be given: the model has one stack.")
        else:
            B, T = main.check(self, past)
        if labels is not None:
            self.check_labels(labels, B, T)
        held = [len(buffer) for layer in (cache.layers if cache is not None else ()) for buffer in layer.buffers[:1]]
        if held and held[0] != B:
            needed = f"{B} rows, as many as the inputs"
            raise ConfigError(f"`past_key_values` must hold {needed}, but holds {held[0]} instead.")
        self._check_kept(logits_to_keep, B, T, labels)

    def _check_pair(self, main: Inputs, target: Inputs, labels: Any, cache: Any, past: int) -> tuple[int, int]:
        if target.ids is None and self.pools and main.ids is not None:
            target = dc.replace(target, ids=main.ids)  # the decoder reads the source again
        elif target.ids is None:
            if labels is None or self.pools:
                raise ConfigError("`decoder_input_ids` or `labels` must be given: the model has a decoder too.")
            require("labels", labels, {"B": None, "T": None}, LABELS)
            target = dc.replace(target, ids=labels)
        B, T = target.check(self, past, "decoder_")
        if cache is not None and cache.encoder_length:
            return B, T  # the encoder's output is in the cache
        n_sources, _ = main.check(self)
        if n_sources != B:
            name = "labels" if target.ids is labels else "decoder_input_ids"
            raise ConfigError(f"`{name}` must have as many rows as the source ({n_sources}), but has {B} instead.")
        return B, T

    def _check_kept(self, kept: Any, B: int, T: int, labels: Any) -> None:
        is_mask = isinstance(kept, Tensor)
        if not is_mask and (not isinstance(kept, int) or kept < 0):
            raise ConfigError(f"`logits_to_keep` must be at least 0, or a mask, but is {kept!r} instead.")
        if self.pools and (is_mask or kept):
            raise ConfigError("`logits_to_keep` must be 0 for a model whose head has one result per row.")
        if is_mask:
            require("logits_to_keep", kept, {"B": B, "T": T}, (torch.bool,))
        elif kept and labels is not None:
            raise ConfigError(f"`logits_to_keep` must be 0 or a mask where labels are given, but is {kept} instead.")


def require(name: str, x: Any, sizes: Sizes, dtypes: tuple[torch.dtype, ...] = (), more: str = "") -> None:
    """Raise a ConfigError unless x is a tensor of these sizes and one of these dtypes. more: added to the shape."""
    if not isinstance(x, Tensor):
        raise ConfigError(f"`{name}` must be a tensor, but is {type(x).__name__} instead.")
    wanted = tuple(sizes.values())
    pairs = zip(x.shape, wanted, strict=False)
    if x.dim() != len(wanted) or any(n < 1 if size is None else n != size for n, size in pairs):
        shape = ", ".join(letter if size is None else str(size) for letter, size in sizes.items())
        raise ConfigError(f"`{name}` must have the shape [{shape}]{more}, but has {list(x.shape)} instead.")
    if dtypes and x.dtype not in dtypes:
        either = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(f"`{name}` must be of {either}, but is of {str(x.dtype).removeprefix('torch.')} instead.")


def explained(error: Exception, name: str, x: Tensor | None, n: int | None) -> Exception:
    """The ConfigError for a look-up's IndexError if a value of x caused it, else the error itself."""
    return error if x is None or n is None else outside(name, x, n) or error


def outside(name: str, x: Tensor, n: int) -> ConfigError | None:
    """The error if a value of x is not from 0 to n - 1, else None. Waits for the device."""
    found = x[(x < 0) | (x >= n)].tolist()
    return ConfigError(f"`{name}` must be from 0 to {n - 1}, but holds {found[0]} instead.") if found else None
