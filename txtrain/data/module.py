"""DataModule: from a config to batches, one of which is this process's share of one optimizer step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from txtrain.config import Train
from txtrain.data.lengths import LengthOrder
from txtrain.data.order import GlobalOrder, Indices, OrderHash, ShareSampler
from txtrain.data.prepared import prepare
from txtrain.data.samples import OrderedSamples, Rows
from txtrain.data.sources import build_source, describe, settle
from txtrain.data.tokenizer import Tokenizer, allow_threads
from txtrain.errors import ConfigError
from txtrain.objectives.build import build_objective

Batch = dict[str, Tensor]
_PROMPT = re.compile(r"\s*(?:\S+\s+){0,5}\S+")


class DataModule(L.LightningDataModule):
    """The training and validation batches of a run.

    A batch holds what the objective reads: of text `input_ids` and `labels` (-100: not a target), `document_ids` unless documents may
    attend to each other, all int64 [B, T]; of images `pixel_values`, float32 [B, C, H, W], and `labels` [B]; and always `sample_index`,
    int64 [B]. After `prepare()`: `tokenizer` (None without text), `n_train`, `n_val` (samples), `source` (for the screen),
    `fingerprint` (of contents, tokenizer and packing), `token_bytes`.

    start_step: set it before fit; the first training batch is the one of this step (0-based).
    fallback: why the data are not those that were asked for (`txtrain.data.sources.settle`), or None.
    """

    tokenizer: Tokenizer | None
    source: str
    fingerprint: str
    token_bytes: NDArray[np.int32] | None
    order: GlobalOrder

    def __init__(self, config: Train, fallback: str | None = None) -> None:
        super().__init__()
        self.config, self.fallback = config, fallback
        self.start_step = 0
        self._train: Rows | None = None

    # ------------------------------------------------------------------------------------------------------------ prepare

    def prepare_data(self) -> None:
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        self.prepare()

    def prepare(self) -> None:
        """Everything that takes time, once: find the text, train or load the tokenizer, tokenise into the cache.

        Raises:
            ConfigError: the data cannot be had, are not text, do not fill one sequence, or the tokenizer does not fit the model.
        """
        if self._train is not None:
            return
        self.config, reason = settle(self.config)
        self.fallback = self.fallback or reason
        config = self.config
        source = build_source(config)
        made = prepare(source, config, build_objective(config))
        self.tokenizer, self.fingerprint, self._val_text = made.tokenizer, made.fingerprint, made.text
        self.token_bytes = None if made.tokenizer is None else made.tokenizer.token_bytes()
        self.n_train, self.n_val = len(made.train), len(made.validation)
        self.source = describe(source, config.data.type)
        self.order = self._order(made.lengths)
        self.order_hash = OrderHash(self.order)  # order_hash(step): of the samples of steps 1..step
        self._train, self._val = made.train, made.validation

    def _order(self, lengths: Indices | None) -> GlobalOrder:
        config, size = self.config, self.config.data.global_batch_size
        if lengths is None or len(lengths) < size:
            return GlobalOrder(self.n_train, size, config.seed, config.trainer.overfit_batches)
        return LengthOrder(self.n_train, size, config.seed, config.trainer.overfit_batches, lengths=lengths)

    # ------------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of each global step, from start_step on, without end."""
        self.prepare()
        assert self._train is not None
        rank, world_size = self._rank()
        return self._loader(OrderedSamples(self._train, self.config.seed, self.order), ShareSampler(self.order, rank, world_size, self.start_step))

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """Global batches, the same at every call: rows spread evenly over the validation set where the limit leaves some out."""
        self.prepare()
        size = self.config.data.global_batch_size
        n = min(self.n_val, self.config.trainer.limit_val_batches * size)
        rows = np.arange(n) * self.n_val // max(n, 1)
        batches = [rows[i : i + size].tolist() for i in range(0, n, size)]
        return self._loader(OrderedSamples(self._val, self.config.seed), batches) if batches else []

    def examples(self, n: int, batch_size: int) -> Iterator[Batch]:
        """n validation samples (all, if there are fewer), spread evenly over the set, the same at every call."""
        self.prepare()
        n = min(n, self.n_val)
        rows = np.arange(n) * self.n_val // max(n, 1)
        samples = OrderedSamples(self._val, self.config.seed)
        return (samples.__getitems__(rows[i : i + batch_size].tolist()) for i in range(0, n, batch_size))

    def _rank(self) -> tuple[int, int]:
        """(rank, world size), checked against the batch."""
        if self.trainer is None:
            return 0, 1
        size, world_size = self.config.data.global_batch_size, self.trainer.world_size
        if size % world_size:
            low = size // world_size * world_size
            near = ", ".join(str(n) for n in (low, low + world_size) if n)
            raise ConfigError(f"`data.global_batch_size` must be a multiple of the {world_size} processes, but is {size} instead. Nearest: {near}.")
        return self.trainer.global_rank, world_size

    def _loader(self, samples: OrderedSamples, batches: Iterable[list[int]]) -> DataLoader[Batch]:
        data = self.config.data
        if data.num_workers:
            allow_threads(False)
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=data.num_workers,
            persistent_workers=data.num_workers > 0,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available() and self.config.trainer.accelerator != "cpu",
            generator=torch.Generator(),  # the loader draws a seed for its workers; never from the generator that the run resumes
        )

    # ------------------------------------------------------------------------------------------------------------ samples

    def prompts(self, n: int) -> list[str]:
        """The first words of the first n validation documents; fewer if there are fewer, none where there are no documents."""
        self.prepare()
        if self.tokenizer is None or self._val_text is None:
            return []
        documents = self._val_text.beginnings(n, 64)
        return [found.group() for ids in documents if (found := _PROMPT.match(self.tokenizer.decode(ids.tolist())))]


def _as_it_is(batch: Any) -> Any:
    """The dataset gives whole batches: nothing is left to collate."""
    return batch
