"""Keys of images. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from txtrain.data.base_config import DataConfig, UnpackedConfig
from txtrain.registry import config, knob


@config
class PixelConfig(DataConfig):
    """Keys of every source of images. Images are resized to the model's image_size and n_channels."""

    kind: ClassVar = "images"

    mean: tuple[float, ...] | None = None  # per channel, of pixels from 0 to 1; null: measured on training images
    std: tuple[float, ...] | None = knob(None, above=0)
    # In training: a random crop after padding each side by so many pixels of the edge.
    crop_padding: int = knob(0, at_least=0)
    # In training: a random rotation by at most so many degrees to either side.
    rotation: float = knob(0.0, at_least=0, at_most=180)
    # In training: a random shift by at most this fraction of a side, in both directions.
    shift: float = knob(0.0, at_least=0, below=1)
    flip: bool = False  # in training: half of the images are mirrored

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.seq_len is not None:
            positions = "images, whose positions are the model's patches"
            yield f"`data.seq_len` must be null for {positions}, but is {self.seq_len} instead."


@config
class ImagesConfig(PixelConfig, UnpackedConfig):
    """`data=images`: folders, arrays, IDX files, or a hub set."""

    path: str | None = knob(None, literal=True)
    val_path: str | None = None
    labels: str | None = None  # the .npy of labels for an .npy of images
    val_labels: str | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    columns: tuple[str, str] = ("image", "label")  # of a set


@config
class DigitsConfig(PixelConfig):
    """`data=digits`: the 1,797 handwritten digits of 8 x 8 pixels in scikit-learn."""
