"""Other ways to compute one step, put on for the length of a run: by their names in equivalence.py. Each makes sure that it was taken."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from txtrain.model import stack
from txtrain.model.head import heads
from txtrain.model.head import loss as head_loss


class Variation(pl.Callback):
    """Attributes of classes and modules that are others while a run lasts."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def teardown(self, trainer, module, stage):
        while self._before:
            owner, name, value = self._before.pop()
            setattr(owner, name, value)


class Kernel(Variation):
    """Attention by this kernel alone: whatever would be chosen, or (forced=False) because it is."""

    def __init__(self, wanted: str, forced: bool = True) -> None:
        super().__init__()
        self.wanted, self.forced = wanted, forced
        self.chosen: list[str] = []

    def on_fit_start(self, trainer, module):
        choose = stack.choose_kernel

        def chosen(*given: Any, **named: Any) -> str:
            self.chosen.append(choose(*given, **named))
            return self.wanted if self.forced else self.chosen[-1]

        self.replace(stack, "choose_kernel", chosen)

    def on_fit_end(self, trainer, module):
        assert self.chosen
        if self.forced:
            assert set(self.chosen) != {self.wanted}, f"{self.wanted} is what is chosen anyway"
        else:
            assert set(self.chosen) == {self.wanted}, set(self.chosen)


class Chunks(Variation):
    """The loss by chunks of 5 tokens."""

    def on_fit_start(self, trainer, module):
        self.n_chunks = self.n_losses = 0
        chunk = head_loss._chunk

        def counted(*given: Any) -> Any:
            self.n_chunks += 1
            return chunk(*given)

        def rows_per_chunk(vocabulary: Any, weight_VD: Tensor) -> int:
            self.n_losses += 1
            return 5

        self.replace(head_loss, "_chunk", counted)
        self.replace(head_loss.Vocabulary, "rows_per_chunk", rows_per_chunk)

    def on_fit_end(self, trainer, module):
        assert self.n_chunks > 2 * self.n_losses > 0, (self.n_chunks, self.n_losses)


class AllLogits(Variation):
    """The loss as torch's cross-entropy of all logits at once."""

    def on_fit_start(self, trainer, module):
        self.n_losses = 0

        def loss(self_: Any, *given: Any, **named: Any) -> Tensor:
            self.n_losses += 1
            return heads.Head.loss(self_, *given, **named)

        self.replace(heads.LMHead, "loss", loss)
        self.replace(heads.MLMHead, "loss", loss)

    def on_fit_end(self, trainer, module):
        assert self.n_losses


class Apart(Variation):
    """The documents of packed rows, each in a row of its own with padding behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = self.apart = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.packed += len(batch["input_ids"])
        unpack(batch)
        self.apart += len(batch["input_ids"])

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        unpack(batch)

    def on_fit_end(self, trainer, module):
        assert self.apart > 2 * self.packed > 0, (self.apart, self.packed)




def unpack(batch: dict[str, Tensor]) -> None:
    """In place. Of a causal or masked model's batch (labels beside input_ids), or of one between two stacks."""
    two_stacks = "decoder_document_ids" in batch
    sides = {"document_ids": ("input_ids",) if two_stacks else ("input_ids", "labels")} | ({"decoder_document_ids": ("labels",)} if two_stacks else {})
    rows = [(b, d) for b in range(len(batch["input_ids"])) for d in sorted({int(d) for side in sides for d in batch[side][b]})]
    made = {"sample_index": batch["sample_index"][[b for b, _ in rows]]}
    for side, names in sides.items():
        parts = [batch[side][b] == d for b, d in rows]
        length = max(int(part.sum()) for part in parts)
        real = torch.stack([torch.arange(length, device=part.device) < part.sum() for part in parts])
        for name in names:
            made[name] = torch.full(real.shape, -100 if name == "labels" else 0, device=real.device)
            made[name][real] = torch.cat([batch[name][b][part] for (b, _), part in zip(rows, parts, strict=True)])
        made[side] = (~real).long()  # padding is a document of its own, as data.packing=best_fit has it
        if side == "document_ids":
            made["attention_mask"] = real.long()
    batch.clear()
    batch.update(made)


VARIATIONS = {
    "formula": lambda: Kernel("plain"),
    "drawn mask": lambda: Kernel("sdpa_masked"),
    "by flag": lambda: Kernel("sdpa", forced=False),
    "chunks": Chunks,
    "all logits": AllLogits,
    "apart": Apart,
}
