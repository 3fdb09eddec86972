"""Weights in files, as pieces of our tensors: a rank reads only what it holds."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from txtrain.data.sources.files import files_identity
from txtrain.errors import ConfigError
from txtrain.hf.name_map import Shape
from txtrain.model.transformer import Transformer

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
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


@dc.dataclass(frozen=True)
class Source:
    """A model on the meta device, and the pieces in files that fill it; names and shapes are checked."""

    path: Path
    model: Transformer
    pieces: Sequence[Piece]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(piece.name for piece in self.pieces)

    def identity(self) -> str:
        """A hash of the weights: of their files, or if there are none, of the values."""
        files = () if self.path == Path() else sorted(p for p in self.path.iterdir() if p.suffix in _WEIGHTS)
        if files:
            return files_identity(files)
        sha = hashlib.sha256()
        for piece in sorted(self.pieces, key=lambda piece: piece.name):
            values = piece.read([(0, n) for n in piece.shape]).contiguous().flatten()
            sha.update(piece.name.encode() + values.view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def check(self, model: nn.Module) -> None:
        """Raise a ConfigError if the model has other tensors, by name and shape."""
        compare(_shapes(self.model), _shapes(model), str(self.path))

    def load(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transformer:
        """The whole model, in eval mode. Memory: it and its largest tensor. dtype: None: torch's default."""
        self.model.to(dtype or torch.get_default_dtype()).to_empty(device=device)
        fill(self.model.state_dict(), self.pieces)
        return self.model.eval()


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], pieces: Sequence[Piece], held: Callable[[Tensor], Held] = Held.whole) -> None:
    """Read pieces into tensors of these names, in place; of a sharded one each rank reads its part."""
    for piece in pieces:
        held(tensors[piece.name]).take(piece)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity. A finite sum proves it; an infinite one may be an overflow."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float32 if tensor.element_size() < 4 else None)
    return math.isfinite(total.item()) or bool(tensor.isfinite().all())


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def compare(saved: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    """Raise a ConfigError if names or shapes differ. where: the place of the saved ones."""
    if saved != wanted:
        name = min(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        raise ConfigError(f"{where} is of another model: {name} is {there} there, {here} here.")
