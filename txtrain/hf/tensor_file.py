"""Files of tensors: safetensors, one tensor at a time, and torch's zip files, whose code is not run.

safetensors' own reader maps the file into memory, and its writer copies all tensors first: the process would grow to
twice the model. Here it grows by one tensor.

    8 bytes: n, little-endian | n bytes of JSON: name -> dtype, shape, [begin, end) | the tensors, without gaps
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.hf.name_map import Shape, n_elements
from txtrain.hf.tensor_names import read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The format's other dtypes may be in a file (as old buffers are), but not as parameters.
_BUFFERS = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8}
_BUFFERS |= {"I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
NUMBERS = {name: dtype for name, dtype in (DTYPES | _BUFFERS).items() if name != "BOOL"}  # in checkpoints
_SIZES = {name: dtype.itemsize for name, dtype in (DTYPES | _BUFFERS).items()} | {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), 1), "U16": 2, "U32": 4, **dict.fromkeys(("U64", "C64"), 8),
}

NOTHING: Mapping[str, str] = MappingProxyType({})
_MAX_DIMS = 64  # as in torch; a product of a million long numbers takes hours
_PIECE = 1 << 20  # bytes, which are still in the CPU cache when they are used


class Entry(NamedTuple):
    shape: Shape
    dtype: str  # safetensors' name


class SafetensorsFile:
    """A file whose header is valid and consistent with its size; tensors are read on request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._begin: dict[str, int] = {}
        self._held: int | None = None  # a descriptor
        header, data = read_header(path)
        self.metadata: Any = header.get("__metadata__")
        end = 0
        for name, said in sorted(header.items(), key=_begin_of):
            if name == "__metadata__":
                continue
            entry, begin, length = self._entry(name, said)
            if begin != end:
                raise self._broken(f"{name} begins at byte {begin}, where {end} is expected")
            self.entries[name], self._begin[name], end = entry, data + begin, begin + length
        if data + end != (size := path.stat().st_size):
            raise self._broken(f"it is to have {data + end:,} bytes, but has {size:,}")

    def _entry(self, name: str, said: Any) -> tuple[Entry, int, int]:
        try:
            dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
            sound = len(shape) <= _MAX_DIMS and all(type(v) is int and 0 <= v < 2**63 for v in (*shape, begin, end))
            sound = sound and end - begin == n_elements(shape) * _SIZES[dtype]
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise self._broken(f"it describes {name} as {str(said)[:100]}")
        return Entry(tuple(shape), dtype), begin, end - begin

    def hold(self) -> None:
        """Keep the file open until `release` (or the object's end): it can then be read even once its name is gone."""
        self._held = os.open(self.path, os.O_RDONLY)
        self._closes = weakref.finalize(self, os.close, self._held)

    def release(self) -> None:
        if self._held is not None:
            self._closes()
            self._held = None

    def _broken(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path} must be a whole safetensors file, but {why}.")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, in its own memory. rows: begin and end in its first dimension; None: all."""
        shape, dtype = self.entries[name]
        if rows is not None:
            shape = rows[1] - rows[0], *shape[1:]
        tensor = torch.empty(shape, dtype=(DTYPES | _BUFFERS)[dtype], device="cpu")
        for _ in self.fill(name, tensor, 0 if rows is None else rows[0] * n_elements(shape[1:])):
            pass
        return tensor

    def fill(self, name: str, tensor: Tensor, first: int = 0) -> Iterator[memoryview]:
        """Read one tensor, from element `first`, into contiguous memory of its dtype; yields pieces as they come."""
        file = os.open(self.path, os.O_RDONLY) if self._held is None else self._held
        at = self._begin[name] + first * tensor.element_size()
        try:
            for piece in pieces(tensor):
                done = 0
                while done < len(piece):
                    got = os.preadv(file, [piece[done:]], at)
                    if not got:
                        raise self._broken(f"it ends within {name}")
                    done, at = done + got, at + got
                yield piece
        finally:
            if file != self._held:
                os.close(file)


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor on the CPU, which share its memory, a megabyte at a time."""
    data = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]


def _begin_of(item: tuple[str, Any]) -> tuple[int, int]:
    try:
        begin, end = item[1]["data_offsets"]
        return int(begin), int(end)  # both: an empty tensor ends where the next begins
    except (TypeError, KeyError, ValueError, OverflowError):
        return -1, -1  # not a tensor: `_entry` refuses it


# What the pickle of tensors by name names. torch's list has more, such as bytearray: ten bytes make one of any size.
_GLOBALS = {
    "collections.OrderedDict", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
    *(f"torch.{name}" for name in vars(torch) if name.endswith("Storage")), "torch.storage.UntypedStorage",
}


def _check_globals(path: Path, is_zip: bool) -> None:
    """Raise ValueError if a pickle that `torch.load` would read names anything else, and whatever damage raises."""
    with path.open("rb") as f:
        # Before the zip format: a magic number, a version, facts of the system, the tensors, keys of their storages.
        pickle = io.BytesIO(torch.PyTorchFileReader(str(path)).get_record("data.pkl")) if is_zip else f
        for _ in range(1 if is_zip else 5):
            for op, said, _ in pickletools.genops(pickle):
                if op.name == "GLOBAL" and str(said).replace(" ", ".", 1) not in _GLOBALS:
                    raise ValueError(f"it names {said}")


class PickleFile:
    """pytorch_model.bin: only tensors are unpickled; the newer zip format is mapped, not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                mapped = f.read(4) == b"PK\x03\x04"  # as torch tells it; what is mapped cannot grow to what it claims
            if mapped and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
                raise ValueError("torch does not compress, and compressed data may be of any size")
            _check_globals(path, is_zip=mapped)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the pickle's age
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as e:  # torch's own messages advise to unpickle unsafely
            why = "it is damaged, or would run code. Nothing of it was run"
            remedy = "Remedy: weights in model.safetensors, which cannot hold code."
            raise ConfigError(f"{path} must hold tensors and nothing else, but does not: {why}. {remedy}") from e
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold tensors by name, but holds a {type(loaded).__name__}.")
        self._tensors: dict[str, Tensor] = dict(loaded)
        self.entries = {name: self._entry(name, tensor) for name, tensor in loaded.items()}

    def _entry(self, name: Any, tensor: Any) -> Entry:
        plain = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        plain = plain and tensor.device.type == "cpu"
        # With a stride of 0 a small file could claim any size.
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConfigError(f"{self.path} must hold plain tensors by name, but {str(name)[:100]!r} is not one.")
        words = {dtype: word for word, dtype in DTYPES.items()}
        return Entry(tuple(tensor.shape), words.get(tensor.dtype, str(tensor.dtype)))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        found = self._tensors[name].detach()
        return found if rows is None else found[slice(*rows)]


def write_safetensors(
    path: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] = NOTHING,
) -> None:
    """Write tensors one by one; each is made when its turn comes, so that memory holds one.

    metadata: further text in the header.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + n_elements(shape) * dtypes[name].itemsize
        header[name] = {"dtype": words[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with files.new(path) as f:
        files.reserve(f.fileno(), 8 + len(text) + end)
        f.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            f.write(tensor(name).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def bytes_of(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(n_elements(shape) * dtypes[name].itemsize for name, shape in shapes.items())
