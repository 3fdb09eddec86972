"""Random crops and flips of training images, with torch alone."""

# B batch, C channels, H and W pixels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.data.draws import Draws


class Augment:
    """A window of the image's size, at a random place of the image whose edge goes on for so many pixels; in half of them mirrored."""

    def __init__(self, crop_padding: int, flip: bool) -> None:
        self.crop_padding, self.flip = crop_padding, flip

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        pixels = batch["pixel_values"]
        if self.crop_padding:
            pixels = self._cropped(pixels, draws)
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
