"""Image classification (ViT: Dosovitskiy et al. 2020, 2010.11929)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from txtrain.objectives.base import Batch, Counted, Shown, Statistics, n_right, stacked
from txtrain.objectives.classification import Classes
from txtrain.run_config import RunConfig


class ImageClassification(Classes):
    """Cross-entropy of the class, in nats per image. Validation: without smoothing, and top-1 and top-5 accuracy."""

    inputs = ("pixel_values",)
    metrics = ("top1", "top5")

    def measured(self, logits_BC: Tensor, labels: Tensor, count: Tensor) -> Counted:
        return {"top1": (n_right(logits_BC, labels), count), "top5": (n_among(logits_BC, labels, 5), count)}

    def of_each(self, logits_BC: Tensor, labels: Tensor) -> Statistics:
        ones = torch.ones_like(labels)
        return {
            "top1": stacked(logits_BC.argmax(-1) == labels, ones), "top5": stacked(is_among(logits_BC, labels, 5), ones)
        }

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        return [self._shown(module, batch, check) for batch in data.examples(config.sample.n, 1)]

    @staticmethod
    def _shown(module: Any, batch: Batch, check: Callable[[], None]) -> Shown:
        """A validation image with its class and the most likely one."""
        check()
        image_CHW, weight = batch["pixel_values"][0], next(module.model.parameters())
        logits_C = module.model(pixel_values=image_CHW[None].to(weight.device, weight.dtype)).logits[0]
        share, predicted = logits_C.float().softmax(-1).max(-1)
        darkest, brightest = image_CHW.aminmax()
        # to 0..1: pixels are normalised by the data's mean and deviation
        stretched = (image_CHW - darkest) / (brightest - darkest).clamp(min=1e-6)
        return Shown(f"label {int(batch['labels'][0])}", f"predicted {int(predicted)} ({float(share):.2f})", stretched)


def n_among(logits_BC: Tensor, labels_B: Tensor, k: int) -> Tensor:
    """Number of labels among the k most likely classes (all, if there are fewer than k classes)."""
    return is_among(logits_BC, labels_B, k).sum()


def is_among(logits_BC: Tensor, labels_B: Tensor, k: int) -> Tensor:
    """[B]: whether the label is among them."""
    best_BK = logits_BC.topk(min(k, logits_BC.shape[-1])).indices
    return (best_BK == labels_B[:, None]).any(-1)
