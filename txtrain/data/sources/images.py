"""data=images: a folder per class, arrays, IDX files (MNIST's format), or a set for `load_dataset`."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txtrain.data.sources.files import Limits, files_identity, missing, open_unpacked
from txtrain.data.sources.hub import load_dataset, set_errors
from txtrain.data.sources.origins import Origins, refuse_shared
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError, hint, shorten
from txtrain.ground.files import path_of
from txtrain.ground.plain_files import check_file, map_npy, npz_names, read_npz

_SUFFIXES = (".png", ".jpg", ".jpeg")
# What a picture may be, whatever its name: for EPS Pillow calls Ghostscript, and other formats may hold an EPS.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_DAMAGED = (OSError, ValueError, SyntaxError, struct.error, zlib.error, EOFError, IndexError, MemoryError)
_VALIDATION_FOLDERS = ("validation", "val", "test")
_ARRAYS = (  # of an .npz
    ("x_train", "y_train", "x_test", "y_test"),
    ("images", "labels", "val_images", "val_labels"),
    ("x", "y", "x_val", "y_val"),
)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ImageFiles:
    """Images by path.

    Args:
        path: a folder with a folder per class (or with folders `train` and `validation`, `val` or `test` of such); an
            .npz; an .npy, with `labels`; an IDX file, or a folder of them; else a name or file for load_dataset.
        val_path: the same, for validation.
        labels, val_labels: .npy files of labels for .npy images.

    Raises:
        ConfigError: a path is none of these, images and labels do not match, or validation images are training ones.
    """

    def __init__(
        self, path: str | None, val_path: str | None, labels: str | None, val_labels: str | None, name: str | None,
        split: str, val_split: str | None, columns: tuple[str, str], max_expansion: float = Limits().max_expansion,
    ) -> None:
        if not path:
            raise ConfigError(
                "`data.path` must be given with data=images: a folder of class folders, an .npz or .npy, IDX files, "
                "or a hub set."
            )
        self.path, self.name, self.columns = path, name, columns
        self.limits = Limits(max_expansion)
        self.files: list[Path] = []
        self.classes: list[str] | None = None  # of folders: those of the training folder
        self._origins = Origins()
        found = self._open(path, "data.path", labels, split)
        if val_path or val_split:
            key = "data.val_path" if val_path else "data.val_split"
            found["validation"] = self._open(val_path or path, key, val_labels, val_split or split)["train"]
            refuse_shared(found["train"].read_from, found["validation"].read_from, key)
        self.found = found
        self.has_validation = "validation" in found

    def images(self, split: Split) -> Opened:
        return self.found[split]

    def identity(self) -> str:
        return f"images {files_identity(self.files)} {[images.known for images in self.found.values()]}"

    def describe(self) -> str:
        return f"{sum(len(images.labels) for images in self.found.values()):,} images of {self.path}"

    # ------------------------------------------------------------------------------------------------------------- open

    def _open(self, spec: str, key: str, labels: str | None, split: str) -> dict[Split, Opened]:
        path = path_of(spec, key)
        if path.is_dir():
            return self._folder(path, key)
        if path.suffix == ".npz":
            return self._npz(_existing(path, key), key)
        if path.suffix == ".npy":
            beside = "data.labels" if key == "data.path" else "data.val_labels"
            if not labels:
                raise ConfigError(f"`{key}`: {path} must have its labels in `{beside}=FILE.npy`.")
            pictures, classes = _existing(path, key), _existing(path_of(labels, beside), beside)
            self.files += [pictures, classes]
            return {
                "train": ArrayImages(
                    map_npy(pictures, f"`{key}`: {pictures}"), map_npy(classes, f"`{key}`: {classes}"), key, [pictures]
                )
            }
        if "idx" in path.name:
            return {"train": self._idx(_existing(path, key), key)}
        return {"train": self._set(spec, key, split)}

    def _folder(self, path: Path, key: str) -> dict[Split, Opened]:
        pictures = sorted(p for p in path.iterdir() if p.is_file() and "images" in p.name and "idx3" in p.name)
        if pictures:
            training = [p for p in pictures if p.name.startswith("train")]
            others = [p for p in pictures if p not in training]
            found: dict[Split, Opened] = {"train": self._idx((training or others)[0], key)}
            return found | {"validation": self._idx(others[0], key)} if training and others else found
        if not (path / "train").is_dir():
            return {"train": self._classes(path, key)}
        held = next((path / name for name in _VALIDATION_FOLDERS if (path / name).is_dir()), None)
        train = self._classes(path / "train", key)
        if held is None:
            return {"train": train}
        return {"train": train, "validation": self._classes(held, key)}

    def _classes(self, path: Path, key: str) -> FolderImages:
        made = FolderImages(path, key, self.classes)
        self.classes = made.classes
        self.files += made.files
        return made

    def _idx(self, path: Path, key: str) -> Opened:
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        if beside == path or not beside.is_file():
            raise ConfigError(f"`{key}`: {path} must have its labels beside it, but there is no {beside.name}.")
        self.files += [path, beside]
        return ArrayImages(read_idx(path, key, self.limits), read_idx(beside, key, self.limits), key, [path])

    def _npz(self, path: Path, key: str) -> dict[Split, Opened]:
        where = f"`{key}`: {path}"
        arrays = npz_names(path, where)
        self.files.append(path)
        for names in _ARRAYS:
            if names[0] in arrays and names[1] in arrays:
                pairs = {"train": names[:2]} | (
                    {"validation": names[2:]} if names[2] in arrays and names[3] in arrays else {}
                )
                read = partial(read_npz, path, where=where, max_expansion=self.limits.max_expansion)
                made = {k: ArrayImages(read(x), read(y), key, [path]) for k, (x, y) in pairs.items()}
                return made  # type: ignore[return-value]
        wanted = " or ".join("/".join(names[:2]) for names in _ARRAYS)
        raise ConfigError(f"`{key}`: {path} must hold {wanted}, but holds {shorten(', '.join(arrays))}.")

    def _set(self, spec: str, key: str, split: str) -> SetImages:
        with set_errors(key, spec, split, "local images or a set for load_dataset"):
            rows = load_dataset(spec, self.name, split)
        self._origins.add_set(spec, self.name, split, rows, key)
        return SetImages(rows, self.columns)


def _existing(path: Path, key: str) -> Path:
    if not path.is_file():
        raise ConfigError(missing(str(path), key, "an existing file or folder"))
    return path


def read_idx(path: Path, key: str, limits: Limits) -> NDArray[Any]:
    """An array in MNIST's format: two zeros, dtype, number of dimensions, sizes (big-endian), values. Unpacks .gz."""
    with open_unpacked(path, key, limits) as f:
        magic = f.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or magic[3] not in (1, 2, 3, 4):
            raise ConfigError(f"`{key}` must be an IDX file, but {path} has no IDX header.")
        dtype, sizes = np.dtype(_IDX_TYPES[magic[2]]), f.read(4 * magic[3])
        shape = struct.unpack(f">{len(sizes) // 4}I", sizes[: len(sizes) // 4 * 4])
        wanted, raw = math.prod(shape) * dtype.itemsize, bytearray()
        while len(raw) <= wanted and (chunk := f.read(1 << 20)):  # `wanted` may be absurd: read no more than there is
            raw += chunk
    if len(shape) != magic[3] or len(raw) != wanted:
        more = "or more " if len(raw) > wanted else ""
        raise ConfigError(
            f"`{key}`: {path} must hold {' x '.join(map(str, shape))} values, but is {len(raw):,} bytes {more}long."
        )
    return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="))


# --------------------------------------------------------------------------------------------------------------- images


class ArrayImages:
    """Images [N, H, W] or [N, H, W, C], integers from 0 to 255 or floats from 0 to 1; labels [N]."""

    known = ""  # identifies the contents, besides files

    def __init__(
        self, images: NDArray[Any], labels: NDArray[Any], said: str = "data.path", read_from: Sequence[Path] = ()
    ) -> None:
        if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
            raise ConfigError(
                f"`{said}` must be images [N, H, W] or [N, H, W, C] with labels [N], "
                f"but they are {list(images.shape)} and {list(labels.shape)} instead."
            )
        self.array = _pixels(images, f"`{said}`")
        self.labels, self.read_from = _labels(labels, f"`{said}`"), read_from

    def read(self, i: int) -> NDArray[Any]:
        image: NDArray[Any] = self.array[i]
        return image


class FolderImages:
    """Pictures in a folder per class, decoded when they are read.

    Args:
        classes: their names in the order of their numbers; None: those of the folder, sorted.

    Raises:
        ConfigError: there is no picture, or a folder of another class.
    """

    known = ""

    def __init__(self, path: Path, key: str, classes: list[str] | None = None) -> None:
        here = sorted(p.name for p in path.iterdir() if p.is_dir())
        self.key, self.classes = key, here if classes is None else classes
        if other := next((name for name in here if name not in self.classes), None):
            allowed = f"the classes of the training images ({shorten(', '.join(self.classes))})"
            raise ConfigError(f"`{key}`: {path} must have {allowed}, but has {other} too.{hint(other, self.classes)}")
        found = [
            [p for p in sorted((path / name).rglob("*")) if p.suffix.lower() in _SUFFIXES] for name in self.classes
        ]
        self.files = self.read_from = [p for files in found for p in files]
        self.labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(files) for files in found])
        if not self.files:
            raise ConfigError(
                f"`{key}`: the folder {path} must hold a folder of {', '.join(_SUFFIXES)} for each class, "
                "or IDX files, but holds neither."
            )
        self._need_pillow(key)

    @staticmethod
    def _need_pillow(key: str) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"`{key}`: to read pictures, Pillow must be installed: pip install 'txtrain[images]'."
            ) from None

    def read(self, i: int) -> NDArray[Any]:
        with _picture(self.key, str(self.files[i])), _opened(self.files[i]) as picture:
            return _decoded(picture)


class SetImages:
    """Rows of a set with a column of pictures and one of classes. The library does not decode them: it would open
    whatever path or address a row names, in any column."""

    read_from = ()  # files; sets are known by their names

    def __init__(self, rows: Any, columns: tuple[str, str]) -> None:
        for column in columns:
            if column not in rows.column_names:
                names = rows.column_names
                raise ConfigError(
                    f"`data.columns` must be two of {', '.join(names)}, "
                    f"but is {list(columns)} instead.{hint(column, names)}"
                )
        self.columns, self.known = columns, rows._fingerprint
        self.pictures, self.classes = (rows.select_columns([name]).with_format("arrow") for name in columns)
        self.mode = getattr((rows.features or {}).get(columns[0]), "mode", None)
        FolderImages._need_pillow("data.path")

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        return _labels(np.asarray(self.classes[:].column(0).to_pylist()), f"`data.columns`: {self.columns[1]}")

    def read(self, i: int) -> NDArray[Any]:
        from PIL import ImageOps

        where = f"row {i} of the set"
        with _picture("data.path", where):
            found = self.pictures[i].column(0)[0].as_py()
            if not isinstance(found, dict):
                return _pixels(np.asarray(found), f"`data.columns`: {self.columns[0]} in {where}")
            with _opened(_encoded(found, where)) as stored:
                picture = ImageOps.exif_transpose(stored)  # as the library does, and the mode
                return _decoded(picture.convert(self.mode) if self.mode else picture)


def _encoded(found: dict[str, Any], where: str) -> io.BytesIO | Path:
    """The picture in a row, or its file, as the library stores them.

    Raises:
        ConfigError: the file is not one that the library downloaded.
    """
    if isinstance(found.get("bytes"), bytes):
        return io.BytesIO(found["bytes"])
    from datasets import config
    from huggingface_hub import constants

    path = path_of(str(found.get("path")), "data.path").absolute()
    caches = [Path(folder).resolve() for folder in (config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]
    if not any(path.resolve().is_relative_to(folder) for folder in caches):
        said = shorten(repr(found.get("path")))
        raise ConfigError(f"`data.path`: {where} must hold its picture, but names {said}, which is not in the set.")
    check_file(path, limit=None)
    return path


Opened = ArrayImages | FolderImages | SetImages


def _labels(labels: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Raises ConfigError: they are no classes."""
    if len(labels) and (labels.dtype.kind not in "iu" or labels.min() < 0):
        least = f" from {labels.min()} on" if labels.dtype.kind in "iuf" else f", the first {shorten(repr(labels[0]))}"
        raise ConfigError(f"{where} must have labels that are integers from 0 on, but they are {labels.dtype}{least}.")
    return labels.astype(np.int64)


def _pixels(images: NDArray[Any], where: str) -> NDArray[Any]:
    """Integers as uint8. Raises ConfigError: they are in no range of pixels."""
    integers, numbers = images.dtype.kind in "iu", images.dtype.kind in "biuf"
    if not numbers or (images.size and not (images.min() >= 0 and images.max() <= (255 if integers else 1))):
        found = f"from {images.min()} to {images.max()}" if numbers else f"such as {shorten(repr(images.flat[0]))}"
        allowed = "integers from 0 to 255 or floats from 0 to 1"
        raise ConfigError(f"{where} must be {allowed}, but is {images.dtype} {found} instead.")
    return images.astype(np.uint8) if integers else images


@contextmanager
def _picture(key: str, where: str) -> Iterator[None]:
    """Pillow's errors as ours, among them its refusal of decompression bombs."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's error needs twice as many pixels
        try:
            yield
        except ConfigError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError, *_DAMAGED) as e:
            raise ConfigError(f"`{key}`: {where} must be an intact image, but is not: {shorten(e)}.") from e


def _opened(file: Path | io.BytesIO) -> Any:
    """A picture of a format that Pillow decodes itself."""
    from PIL import Image

    Image.init()
    return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])


def _decoded(picture: Any) -> NDArray[Any]:
    """Gray or RGB, 8 bits (16-bit gray as floats); palettes and transparency are converted."""
    if picture.mode.startswith("I"):
        return np.array(picture, dtype=np.float32) / 65535
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
    return np.array(picture)
