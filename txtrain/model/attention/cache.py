"""The key-value cache of decoding."""

# B batch, K key-value heads, S keys held, T new positions, H head size

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from txtrain.model.flops import GROWTH


class _Buffers:
    """Tensors whose first dimension is the batch."""

    buffers: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.buffers = tuple(x.index_select(0, rows) for x in self.buffers)


class LayerCache(_Buffers):
    """Keys and values of one layer, [B, K, S, H] each. With a window, only the last `window - 1` are kept.

    A windowed layer's buffer fills up; then its last window - 1 positions move to the front. So the positions held are
    one contiguous, ordered slice, and they move once in GROWTH tokens.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.start = self.end = 0  # of the slice held

    @property
    def n_held(self) -> int:
        """Keys that the next token finds here: all, or the last window - 1."""
        held = self.end - self.start
        return held if self.window is None else min(held, self.window - 1)

    def update(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append [B, K, T, H] each; returns all keys that the T new positions may need, [B, K, S, H] each."""
        n_new = new[0].shape[2]
        self.start = self.end - self.n_held
        if not self.buffers or self.end + n_new > self.buffers[0].shape[2]:
            self._make_room(new)
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, self.end : self.end + n_new] = x
        self.end += n_new
        return tuple(buffer[:, :, self.start : self.end] for buffer in self.buffers)

    def select(self, rows: Tensor) -> None:
        """As above; what is copied is what is held, not the room for more."""
        chosen = [x[:, :, self.start : self.end].index_select(0, rows) for x in self.buffers]
        self.buffers, self.start, self.end = (), 0, 0
        if chosen:
            self.update(*chosen)

    def _make_room(self, new: tuple[Tensor, ...]) -> None:
        held = self.end - self.start
        needed = held + new[0].shape[2]
        capacity = needed + GROWTH
        if self.window is not None:
            capacity = max(needed, self.window - 1 + min(self.window, GROWTH))
        old = tuple(x[:, :, self.start : self.end] for x in self.buffers or new)
        if self.buffers and capacity == self.buffers[0].shape[2]:
            old = tuple(x.clone() for x in old)  # source and target may overlap
        else:
            self.buffers = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in new)
        for buffer, x in zip(self.buffers, old, strict=True):
            buffer[:, :, :held] = x
        self.start, self.end = 0, held


class CrossCache(_Buffers):
    """Keys and values of one layer's cross-attention, projected from the encoder's output at first use."""

    def once(self, output_BSD: Tensor | None, project: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if not self.buffers:
            assert output_BSD is not None
            self.buffers = project(output_BSD)
        return self.buffers


class Cache:
    """The past of all layers: `past_key_values`, updated in place. valid_BS: True for real tokens; None: all are."""

    def __init__(self, windows: list[int | None], with_cross: bool = False) -> None:
        self.layers = [LayerCache(w) for w in windows]
        self.cross = [CrossCache() for _ in windows] if with_cross else []
        self.encoder_length = 0  # 0: the encoder has not run yet
        self.encoder_valid_BS: Tensor | None = None
        self.length = 0  # tokens read, whatever the windows
        self.valid_BS: Tensor | None = None
        self.positions_BS: Tensor | None = None  # position ids [B or 1, S], where the caller gave them

    def get_seq_length(self) -> int:
        """Tokens read so far (Hugging Face's name)."""
        return self.length

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; beam search repeats rows."""
        for part in (*self.layers, *self.cross):
            part.select(rows)
        if self.encoder_valid_BS is not None:
            self.encoder_valid_BS = self.encoder_valid_BS.index_select(0, rows)
        if self.valid_BS is not None:
            self.valid_BS = self.valid_BS.index_select(0, rows)
        if self.positions_BS is not None and len(self.positions_BS) > 1:
            self.positions_BS = self.positions_BS.index_select(0, rows)


def append(past: Tensor | None, new: Tensor) -> Tensor:
    """One row is that of all."""
    if past is None:
        return new
    B = max(len(past), len(new))
    return torch.cat((past.expand(B, -1), new.expand(B, -1)), dim=1)
