"""Random crops, rotations, shifts and flips of training images, with torch alone."""

# B batch, C channels, H and W pixels

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.data.samples.draws import Draws


class Augment:
    """Random changes of training images, drawn per image; outside of the image its edge is replicated.

    Args:
        crop_padding: pixels; a random crop of the image's size after padding each side by so many.
        rotation: degrees; a rotation about the centre by at most so many to either side, bilinear.
        shift: fraction of a side; a shift by at most so much in both directions, bilinear.
        flip: mirror half of the images.
    """

    def __init__(self, crop_padding: int = 0, rotation: float = 0.0, shift: float = 0.0, flip: bool = False) -> None:
        self.crop_padding, self.rotation, self.shift, self.flip = crop_padding, rotation, shift, flip

    def __bool__(self) -> bool:
        return bool(self.crop_padding or self.rotation or self.shift or self.flip)

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        pixels = batch["pixel_values"]
        if self.crop_padding:
            pixels = self._cropped(pixels, draws)
        if self.rotation or self.shift:
            pixels = self._moved(pixels, draws)
        if self.flip:
            mirrored = torch.from_numpy(draws.uniform("flip", 1)[:, 0] < 0.5)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return {**batch, "pixel_values": pixels}

    def _cropped(self, pixels_BCHW: Tensor, draws: Draws) -> Tensor:
        B, _, H, W = pixels_BCHW.shape
        p = self.crop_padding
        padded = F.pad(pixels_BCHW, (p, p, p, p), mode="replicate")
        top, left = (torch.from_numpy(draws.integer(name, 2 * p + 1)) for name in ("top", "left"))
        rows_BH = top[:, None] + torch.arange(H)
        columns_BW = left[:, None] + torch.arange(W)
        cropped_BHWC = padded[torch.arange(B)[:, None, None], :, rows_BH[:, :, None], columns_BW[:, None, :]]
        return cropped_BHWC.permute(0, 3, 1, 2).contiguous()

    def _moved(self, pixels_BCHW: Tensor, draws: Draws) -> Tensor:
        H, W = pixels_BCHW.shape[-2:]
        angle_B = math.radians(self.rotation) * (2 * draws.uniform("angle", 1)[:, 0] - 1)
        shift_B2 = 2 * self.shift * (2 * draws.uniform("shift", 2) - 1)  # in affine_grid's units a side is 2 long
        cos_B, sin_B = np.cos(angle_B), np.sin(angle_B)
        # H / W: the rotation is in pixels, not in sides.
        rows_B6 = np.stack((cos_B, -sin_B * H / W, shift_B2[:, 0], sin_B * W / H, cos_B, shift_B2[:, 1]), axis=1)
        affine_B23 = torch.from_numpy(rows_B6).float().view(-1, 2, 3)
        grid_BHW2 = F.affine_grid(affine_B23, list(pixels_BCHW.shape), align_corners=False)
        return F.grid_sample(pixels_BCHW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)
