"""Weights in files, as pieces of our tensors: a rank reads only what it holds."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.hf.digest import sha256_of
from txtrain.hf.name_map import Shape
from txtrain.model.lora import Pair
from txtrain.model.shapes_only import with_storage
from txtrain.model.transformer import Transformer

Range = tuple[int, int]  # from the first index to before the second
Box = Sequence[Range]  # one for each dimension


@dc.dataclass(frozen=True)
class Piece:
    """A box of one of our tensors, in a file.

    begin: its first index along each dimension. read: a box within it, relative to `begin`, on the CPU. look: compares
    it with its checksum, and returns whether its numbers are finite, if that is asked; None: it has no checksum.
    """

    name: str
    begin: Shape
    shape: Shape
    read: Callable[[Box], Tensor]
    look: Callable[[bool], bool] | None = None

    def is_fine(self, finite: bool) -> bool:
        """Whether its numbers are finite, if that is asked.

        Raises:
            ConfigError: they differ from those that were written.
        """
        if self.look is not None:
            return self.look(finite)
        return not finite or is_finite(self.read([(0, n) for n in self.shape]))


def piece_of(name: str, tensor: Tensor) -> Piece:
    """A whole tensor on the CPU, as a piece."""
    shape = tuple(tensor.shape)
    return Piece(name, (0,) * len(shape), shape, lambda box: tensor[tuple(slice(*side) for side in box)])


@dc.dataclass(frozen=True)
class Held:
    """A rank's part of one tensor. indices: for each dimension of `tensor`, indices of the whole one, ascending."""

    tensor: Tensor
    indices: tuple[Tensor, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Held:
        return cls(tensor, tuple(torch.arange(n, device="cpu") for n in tensor.shape))

    def take(self, piece: Piece) -> None:
        """Read the piece's values that are held here."""
        places, within = [], []
        for index, begin, n in zip(self.indices, piece.begin, piece.shape, strict=True):
            first, last = torch.searchsorted(index, torch.tensor([begin, begin + n], device="cpu")).tolist()
            if first == last:
                return
            places.append(slice(first, last))
            within.append(index[first:last] - begin)
        values = piece.read([(int(index[0]), int(index[-1]) + 1) for index in within])
        for dim, index in enumerate(within):
            if len(index) < values.shape[dim]:
                values = values.index_select(dim, index - index[0])
        self.tensor[tuple(places)].copy_(values)


def _nothing() -> None:
    """The files are not held open."""


@dc.dataclass(frozen=True)
class Source:
    """A model on the meta device, and the pieces in files that fill it; names and shapes are checked."""

    path: Path
    model: Transformer
    pieces: Sequence[Piece]
    close: Callable[[], None] = _nothing  # the files, which are open as long as they may be removed

    @property
    def names(self) -> frozenset[str]:
        return frozenset(piece.name for piece in self.pieces)

    def identity(self) -> str:
        """A hash of the weights: of their files, or if there are none, of the values."""
        if self.path != Path():
            return sha256_of(self.path)
        sha = hashlib.sha256()
        for piece in sorted(self.pieces, key=lambda piece: piece.name):
            values = piece.read([(0, n) for n in piece.shape]).contiguous().flatten()
            sha.update(piece.name.encode() + values.view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def check(self, model: nn.Module) -> None:
        """Raise a ConfigError if the model has other tensors, by name and shape."""
        compare(shapes_of(self.model), shapes_of(model), str(self.path))

    def load(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transformer:
        """The whole model, in eval mode. Memory: it and its largest tensor. dtype: None: torch's default."""
        with_storage(self.model.to(dtype or torch.get_default_dtype()), device)
        fill(self.model.state_dict(), self.pieces)
        return self.model.eval()


class Whole(Mapping[str, Tensor]):
    """Tensors of a source by name, each read whole when it is asked for, in the dtype of the source's model.

    The last one is kept: stacked experts are asked for one after the other.
    """

    def __init__(self, source: Source) -> None:
        self._like = source.model.state_dict()
        self._pieces: dict[str, list[Piece]] = {}
        for piece in source.pieces:
            self._pieces.setdefault(piece.name, []).append(piece)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            made = torch.empty(self._like[name].shape, dtype=self._like[name].dtype, device="cpu")
            fill({name: made}, self._pieces[name])
            self._last = name, made
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], pieces: Sequence[Piece], held: Callable[[Tensor], Held] = Held.whole) -> None:
    """Read pieces into tensors of these names, in place; of a sharded one each rank reads its part."""
    for piece in pieces:
        held(tensors[piece.name]).take(piece)


def merged(pieces: Sequence[Piece], adapter: Mapping[str, Pair]) -> list[Piece]:
    """Pieces of a checked base with an adapter merged into what is read of them, in float32. adapter: by matrix."""

    def read(piece: Piece, pair: Pair, box: Box) -> Tensor:
        place = tuple(slice(b + first, b + last) for b, (first, last) in zip(piece.begin, box, strict=True))
        return pair.added_to(piece.read(box).float(), place)

    found = []
    for piece in pieces:
        pair = adapter.get(piece.name, adapter.get(piece.name.removesuffix(".weight")))
        found.append(piece if pair is None else dc.replace(piece, read=partial(read, piece, pair), look=None))
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity. A finite sum proves it; an infinite one may be an overflow."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float32 if tensor.element_size() < 4 else None)
    return math.isfinite(total.item()) or bool(tensor.isfinite().all())


def part_of(pieces: Sequence[Piece], box: Box) -> Tensor:
    """A box of one tensor, from the pieces in which it lies; float32, on the CPU."""
    part = torch.empty([last - first for first, last in box], device="cpu")
    held = Held(part, tuple(torch.arange(first, last, device="cpu") for first, last in box))
    for piece in pieces:
        held.take(piece)
    return part


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Name -> shape of each of its tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def compare(saved: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    """Raise a ConfigError if names or shapes differ. where: the place of the saved ones."""
    if saved != wanted:
        name = min(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise ConfigError(other_tensor(name, saved, wanted, where))


def other_tensor(name: str, saved: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> str:
    """The sentence for a tensor that differs."""
    there, here = saved.get(name, "absent"), wanted.get(name, "absent")
    return f"{where} is of another model: {name} is {there} there, {here} here."
