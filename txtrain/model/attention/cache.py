"""Keys and values of the tokens already read."""

# B batch, K key-value heads, S keys held, T new positions, H head size

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROWTH = 256  # positions by which a buffer grows: no copy of everything for each token


class LayerCache:
    """One layer's past: a few tensors of shape [B, K, S, H], sequence third. With a window, only the last `window - 1` are kept.

    The buffer of a windowed layer is a roll: tokens are appended until it is full, then the last window - 1 move to its front, so
    that what is held is always one contiguous, ordered slice, and a move happens once in GROWTH tokens.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.buffers: tuple[Tensor, ...] = ()
        self.start = 0  # of what is held, within the buffers
        self.end = 0

    @property
    def n_held(self) -> int:
        """Keys that the next token will find here: all, or the last window - 1."""
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

    def _make_room(self, new: tuple[Tensor, ...]) -> None:
        held = self.end - self.start
        needed = held + new[0].shape[2]
        capacity = needed + GROWTH if self.window is None else max(needed, self.window - 1 + min(self.window, GROWTH))
        if self.buffers and capacity == self.buffers[0].shape[2]:  # a roll: move to the front, in place
            for buffer in self.buffers:
                buffer[:, :, :held] = buffer[:, :, self.start : self.end].clone()
        else:
            old = self.buffers or tuple(x[:, :, :0] for x in new)
            self.buffers = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in new)
            for buffer, x in zip(self.buffers, old, strict=True):
                buffer[:, :, :held] = x[:, :, self.start : self.end]
        self.start, self.end = 0, held

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.buffers = tuple(b.index_select(0, rows) for b in self.buffers)

    def n_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers)


class MemoryCache:
    """What one layer's cross-attention attends to: projected from the other stack's output at first use, then kept."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] = ()

    def once(self, output_BSD: Tensor | None, project: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if not self.kept:
            assert output_BSD is not None
            self.kept = project(output_BSD)
        return self.kept

    def select(self, rows: Tensor) -> None:
        self.kept = tuple(x.index_select(0, rows) for x in self.kept)

    def n_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.kept)


class Cache:
    """The past of all layers; what a model returns as `past_key_values` and takes back. It is updated in place."""

    def __init__(self, windows: list[int | None], with_memory: bool = False) -> None:
        self.layers = [LayerCache(w) for w in windows]
        self.memories = [MemoryCache() for _ in windows] if with_memory else []
        self.memory_length = 0  # of the other stack's output; 0: not read yet
        self.memory_valid_BS: Tensor | None = None  # which of it is no padding; None: all
        self.length = 0  # tokens read, windows or not
        self.valid_BS: Tensor | None = None  # which of them are no padding; None: all
        self.positions_BS: Tensor | None = None  # their position ids, where the caller gave them

    def get_seq_length(self) -> int:
        """Tokens read so far (Hugging Face's name)."""
        return self.length

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order: finished ones leave, beams are copied."""
        for part in self._parts():
            part.select(rows)
        self.memory_valid_BS = None if self.memory_valid_BS is None else self.memory_valid_BS.index_select(0, rows)
        self.valid_BS = None if self.valid_BS is None else self.valid_BS.index_select(0, rows)
        self.positions_BS = None if self.positions_BS is None or self.positions_BS.shape[0] == 1 else self.positions_BS.index_select(0, rows)

    def n_bytes(self) -> int:
        return sum(part.n_bytes() for part in self._parts())

    def _parts(self) -> list[LayerCache | MemoryCache]:
        return [*self.layers, *self.memories]


def append(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat((past.expand(new.shape[0], -1), new), dim=1)
