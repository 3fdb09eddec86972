"""Image classification (ViT: Dosovitskiy et al. 2020, 2010.11929)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.objectives.base import Batch, Counted, Objective, Shown, Statistics, Terms, n_right, stacked
from txtrain.run_config import RunConfig


class ImageClassification(Objective):
    """Cross-entropy of the class, in nats per image. Validation: without smoothing, and top-1 and top-5 accuracy."""

    metrics = ("top1", "top5")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def denominators(self, batch: Batch) -> Terms:
        return {"loss": torch.tensor(len(batch["labels"]), device=batch["labels"].device)}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        logits_BC = model(pixel_values=batch["pixel_values"]).logits
        total = F.cross_entropy(
            logits_BC.float(), batch["labels"], reduction="sum", label_smoothing=self.label_smoothing
        )
        return {"loss": total / denominators["loss"]}

    def validate(self, model: Callable[..., Any], batch: Batch) -> Counted:
        logits_BC, labels_B = model(pixel_values=batch["pixel_values"]).logits, batch["labels"]
        count = self.denominators(batch)["loss"]
        loss = F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")
        return {
            "loss": (loss, count), "top1": (n_right(logits_BC, labels_B), count),
            "top5": (n_among(logits_BC, labels_B, 5), count)
        }

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        logits_BC, labels_B = model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"]
        ones = torch.ones_like(labels_B)
        return {
            "loss": stacked(F.cross_entropy(logits_BC, labels_B, reduction="none"), ones),
            "top1": stacked(logits_BC.argmax(-1) == labels_B, ones),
            "top5": stacked(is_among(logits_BC, labels_B, 5), ones),
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
