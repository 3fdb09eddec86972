"""Image sources, and their images as pixel_values."""

# B batch, C channels, H and W pixels

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.augment import Augment
from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Mapped, Rows, probe
from txtrain.data.sources.source import Split, has_validation, identity
from txtrain.data.store.split import digest, held_out
from txtrain.errors import ConfigError
from txtrain.run_config import RunConfig

_MEASURED = 2048  # training images from which mean and std are measured, if they are not given
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Images(Protocol):
    """One split. labels: [N], classes from 0 on."""

    @property
    def labels(self) -> NDArray[np.int64]: ...

    def read(self, i: int) -> NDArray[Any]:
        """Image i, [H, W] or [H, W, C]: uint8 from 0 to 255, or floats from 0 to 1."""
        ...


class ImageSource(Protocol):
    def images(self, split: Split) -> Images: ...


class ImageSamples(Rows):
    """Some images of a split in the model's size and channels, with mean 0 and std 1 per channel."""

    def __init__(self, images: Images, rows: Indices, size: int, n_channels: int) -> None:
        self.images, self.rows, self.size, self.n_channels = images, rows, size, n_channels
        self.mean, self.std = torch.zeros(n_channels), torch.ones(n_channels)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """pixel_values, float32 [B, C, H, W]; labels, int64 [B].

        Raises:
            ConfigError: an image cannot be read, or has other channels than the model.
        """
        picked = self.rows[rows]
        pixels = torch.stack([self._pixels(int(i)) for i in picked])
        return {
            "pixel_values": (pixels - self.mean[:, None, None]) / self.std[:, None, None],
            "labels": torch.from_numpy(self.images.labels[picked]),
        }

    def normalised(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, like: ImageSamples | None = None
    ) -> ImageSamples:
        """Set mean and std per channel, or measure them on images spread evenly over `like` (by default over these)."""
        if mean is None or std is None:
            like = like or self
            n = min(len(like), _MEASURED)
            raw = ImageSamples(like.images, like.rows, like.size, like.n_channels)
            pixels = raw.batch(np.arange(n) * len(like) // n)["pixel_values"]
            measured = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-6)
        self.mean = measured[0] if mean is None else _per_channel("mean", mean, self.n_channels)
        self.std = measured[1] if std is None else _per_channel("std", std, self.n_channels)
        return self

    def _pixels(self, i: int) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(self.images.read(i)))
        values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
        values = values[..., None] if values.ndim == 2 else values
        values = self._with_channels(values.permute(2, 0, 1), i)
        if values.shape[-2:] == (self.size, self.size):
            return values
        resized: Tensor = F.interpolate(values[None], (self.size, self.size), mode="bilinear", antialias=True)[0]
        return resized

    def _with_channels(self, image_CHW: Tensor, i: int) -> Tensor:
        given, n = len(image_CHW), self.n_channels
        if given == n:
            return image_CHW
        if given == 1:
            return image_CHW.expand(n, -1, -1)
        if given == 3 and n == 1:
            return torch.einsum("chw,c->hw", image_CHW, torch.tensor(_LUMINANCE))[None]
        files = getattr(self.images, "files", None)
        image = f"image {i}" if files is None else files[i]
        raise ConfigError(
            f"`model.embedding.n_channels` must be {given}, the channels of {image}, but is {n} instead. "
            f"Nearest: {given}."
        )


def _per_channel(name: str, values: tuple[float, ...], n: int) -> Tensor:
    if len(values) not in (1, n):
        raise ConfigError(
            f"`data.{name}` must be null, or 1 or {n} values (model.embedding.n_channels), "
            f"but is {list(values)} instead."
        )
    return torch.tensor(values).expand(n).clone()


def prepare_images(source: ImageSource, config: RunConfig) -> tuple[Rows, Rows, str]:
    """Both splits, and a fingerprint.

    Raises:
        ConfigError: a split has no images, or there are more classes than in the model.
    """
    data, embedding = config.data, config.model.embedding
    every = source.images("train")
    if config.extent.whole:
        if data.mean is None or data.std is None:
            raise ConfigError(
                "`data.mean` and `data.std` must be given to evaluate on all images of data.path: those with which the "
                "model was trained. With split=validation they are measured on the training images."
            )
        parts = [(every, np.arange(len(every.labels)))] * 2
    elif has_validation(source):
        others = source.images("validation")
        parts = [(every, np.arange(len(every.labels))), (others, np.arange(len(others.labels)))]
    else:
        held = held_out(len(every.labels), data.val_fraction)
        parts = [(every, np.flatnonzero(~held)), (every, np.flatnonzero(held))]
    for part, (_, rows) in zip(("training", "validation"), parts, strict=True):
        if not len(rows):
            raise ConfigError(
                f"`data={data.type}` must have at least one {part} image, but has none: {len(every.labels)} in all."
            )
    n_classes = 1 + max(int(images.labels.max()) for images, _ in parts)
    if n_classes > config.model.head.n_classes:
        raise ConfigError(
            f"`model.head.n_classes` must be at least {n_classes}, the classes of data={data.type}, "
            f"but is {config.model.head.n_classes} instead. Nearest: {n_classes}."
        )
    train, validation = (
        ImageSamples(images, rows, embedding.image_size, embedding.n_channels) for images, rows in parts
    )
    validation.normalised(data.mean, data.std, like=train)
    train.normalised(data.mean, data.std)
    for samples in (train, validation):
        probe(samples)
    known = identity(source, lambda: repr([len(every.labels), every.labels[:100].tolist()]))
    fraction = None if has_validation(source) or config.extent.whole else data.val_fraction
    fingerprint = digest(data.type, known, fraction, embedding.image_size, data.mean, data.std)
    augment = Augment(data.crop_padding, data.rotation, data.shift, data.flip)
    return Mapped(train, augment) if augment else train, validation, fingerprint
