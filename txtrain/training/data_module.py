"""DataModule: the batches that a config describes; each is this rank's share of one optimizer step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from txtrain.config.schema import Train
from txtrain.data.prepare import prepare
from txtrain.data.prepared import Prepared
from txtrain.data.samples.length_order import LengthOrder
from txtrain.data.samples.order import GlobalOrder, OrderHash, ShareSampler
from txtrain.data.samples.rows import FILLER, OrderedSamples, Rows
from txtrain.data.sources.files import Skipped
from txtrain.data.sources.mixture import MixtureOrder
from txtrain.data.sources.source import Split, build_source, describe, settle, skipped
from txtrain.data.store.stream import StreamOrder, StreamTokens
from txtrain.data.store.stream_position import Positions
from txtrain.data.store.tokenize import SKIPPED
from txtrain.data.tokenizer.tokenizer import Tokenizer, allow_threads
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.convert import checked
from txtrain.objectives.base import Objective, build_objective
from txtrain.training.batches import as_bits
from txtrain.training.signals import ignore

Batch = dict[str, Tensor]
_PROMPT = re.compile(r"\s*(?:\S+\s+){0,5}\S+")


class DataModule(L.LightningDataModule):
    """The training and validation batches of a run.

    A batch holds what the objective reads: of text `input_ids` and `labels` (-100: not a target), `document_ids` unless
    documents may attend to each other, all int64 [B, T]; of images `pixel_values`, float32 [B, C, H, W], and `labels`
    [B]; and always `sample_index`, int64 [B]. After `prepare()`: `tokenizer` (None without text), `n_train`, `n_val`
    (samples), `source` (for the screen), `fingerprint` (of contents, tokenizer and packing), `token_bytes`.

    start_step: set it before fit; the first training batch is the one of this step (0-based).

    Args:
        settled: where config comes from `settle`: why the data are not those that were asked for, or "" if they
            are. None: it is settled here.
        objective: by default config.objective's.

    Raises:
        ConfigError: config is not a valid configuration.
    """

    tokenizer: Tokenizer | None
    source: str
    fingerprint: str
    token_bytes: NDArray[np.int32] | None
    order: GlobalOrder

    def __init__(self, config: Train, settled: str | None = None, objective: Objective | None = None) -> None:
        super().__init__()
        self.config, self._settled, self._objective = checked(config, Train, "config"), settled, objective
        self.fallback = settled or None
        self.given = config  # before `settle`
        self.start_step = 0
        self.start_position: Positions | None = None  # of a stream; set beside start_step on resume
        self._stream: StreamTokens | None = None
        self._train: Rows | None = None
        self.skipped: tuple[Path, ...] = ()  # files that list the skipped rows
        self.n_skipped = 0  # their number
        self._met: Skipped | None = None  # those that a stream has met
        self._mixed: tuple[str, ...] = ()  # names of a mixture's sources

    # ---------------------------------------------------------------------------------------------------------- prepare

    def prepare_data(self) -> None:
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        self.prepare()

    def prepare(self) -> None:
        """Find the text, train or load the tokenizer, tokenise into the cache. Does nothing when called again.

        Raises:
            ConfigError: the data cannot be read, do not fill one sequence, or the tokenizer does not fit the model.
        """
        if self._train is not None:
            return
        if self._settled is None:
            self.config, self.fallback = settle(self.config)
        config = self.config
        source = build_source(config)
        objective = self._objective or build_objective(config)
        made = prepare(source, config, objective)
        self.tokenizer, self.fingerprint, self._val_text = made.tokenizer, made.fingerprint, made.text
        self.token_bytes = None if made.tokenizer is None else made.tokenizer.token_bytes()
        self.n_train, self.n_val = len(made.train), len(made.validation)
        self.source = describe(source, config.data.type)
        self.val_names, self._stream = tuple(made.named), made.stream
        self.skipped, self.n_skipped = made.skipped, made.n_skipped
        met = skipped(source) if made.stream is not None else None
        self._met = met if isinstance(met, Skipped) else None
        own = objective.order(self.n_train, config.seed, config.trainer.overfit_batches)
        self.order = self._order(made) if own is None else own
        self.order_hash = OrderHash(self.order)  # order_hash(step): of the samples of steps 1..step
        self._train, self._val, self._named = made.train, made.validation, made.named

    @property
    def pairs(self) -> bool:
        """Whether the samples are pairs of answers, of which one is preferred."""
        self.prepare()
        return self._val_text is not None and self._val_text.pairs

    @property
    def rows(self) -> Mapping[Split, Rows]:
        """The samples of each split, by row."""
        self.prepare()
        assert self._train is not None
        return {"train": self._train, "validation": self._val}

    def _order(self, made: Prepared) -> GlobalOrder:
        config, size = self.config, self.config.data.global_batch_size
        given = self.n_train, size, config.seed, config.trainer.overfit_batches
        if made.shares:
            sizes, shares = zip(*made.shares.values(), strict=True)
            self._mixed = tuple(made.shares)
            return MixtureOrder(*given, sizes=sizes, shares=shares)
        if made.stream is not None:
            return StreamOrder(*given, made.stream.n_readers, made.stream.buffer)
        if made.lengths is None or len(made.lengths) < size:
            return GlobalOrder(*given)
        return LengthOrder(*given, lengths=made.lengths)

    @property
    def sets(self) -> dict[str, Rows]:
        """The validation sets by name; one without a name."""
        self.prepare()
        return dict(self._named) or {"": self._val}

    def write_skipped(self, folder: Path) -> None:
        """Write a line for each skipped row of the data, if there are any. A stream adds to those that it met earlier,
        and goes on to do so.
        """
        file = folder / SKIPPED
        text = "".join(path.read_text(encoding="utf-8") for path in self.skipped)
        if self._met is not None:
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            known = before[: before.rfind("\n") + 1] + text
            lines = dict.fromkeys(f"{line}\n" for line in known.split("\n") if line)
            text = "".join(lines)
            self._met.list_in(file, lines)
        if text:
            files.write(file, text)

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says of the data. Of a stream: the skipped rows that it has met by now."""
        met = None if self._met is None else self._met.file
        n = sum(1 for _ in met.open("rb")) if met is not None and met.exists() else self.n_skipped
        return {"source": self.source, "fingerprint": self.fingerprint, "skipped_rows": n}

    # ---------------------------------------------------------------------------------------------------------- metrics

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns for metrics.csv: the loss on each named validation set; tokens and epochs of a mixture's sources."""
        return (
            *(f"val_loss/{name}" for name in self.val_names),
            *(f"{what}/{name}" for what in ("tokens", "epochs") for name in self._mixed),
        )

    def measures(self, step: int) -> dict[str, float]:
        """The values of those columns that are known without a validation."""
        if not isinstance(self.order, MixtureOrder):
            return {}
        counts = dict(zip(self._mixed, self.order.counts(step).tolist(), strict=True))
        epochs = {f"epochs/{name}": n / size for (name, n), size in zip(counts.items(), self.order.sizes, strict=True)}
        return {f"tokens/{name}": n * self.config.seq_len for name, n in counts.items()} | epochs

    # ---------------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of each global step, from start_step on, without end."""
        self.prepare()
        assert self._train is not None
        if self._stream is not None:
            self._stream.go_to(self.start_position or self._stream.start)
        samples = OrderedSamples(self._train, self.config.seed, self.order, self._stream)
        return self._loader(samples, ShareSampler(self.order, *self._rank(), self.start_step))

    def val_dataloader(self) -> Any:
        """This rank's share of the global batches, the same at every call; a limit selects rows evenly over the set.

        A list for named sets: each has its own loader and its own limit.
        """
        self.prepare()
        return (
            [self._val_loader(rows) for rows in self._named.values()] if self.val_names else self._val_loader(self._val)
        )

    def _val_loader(self, samples: Rows) -> DataLoader[Batch] | list[Batch]:
        size = self.config.data.global_batch_size
        n = min(len(samples), self.config.trainer.limit_val_batches * size)
        rows = np.arange(n) * len(samples) // max(n, 1)
        rank, world_size = self._rank()
        batches = [np.array_split(rows[i : i + size], world_size)[rank].tolist() or [FILLER] for i in range(0, n, size)]
        return self._loader(OrderedSamples(samples, self.config.seed), batches) if batches else []

    def examples(self, n: int, batch_size: int) -> Iterator[Batch]:
        """n validation samples (all, if there are fewer), spread evenly over the set, the same at every call."""
        self.prepare()
        n = min(n, self.n_val)
        rows = np.arange(n) * self.n_val // max(n, 1)
        samples = OrderedSamples(self._val, self.config.seed)
        return (samples.__getitems__(rows[i : i + batch_size].tolist()) for i in range(0, n, batch_size))

    def first(self, n: int | None, split: Split = "train") -> Iterator[tuple[Batch, list[list[int]]]]:
        """The first n samples that training reads, or of the validation set (all, if there are fewer), by batches.

        With each batch, the numbers in the source of what its samples came from. n: None: all of the set, or an epoch.

        Raises:
            ConfigError: all samples of a stream are asked for.
        """
        self.prepare()
        assert self._train is not None
        if n is None and split == "train" and self._stream is not None:
            why = "with data.streaming=true, whose end is not known"
            raise ConfigError(f"`preview.n` must be a number {why}, but is all instead.")
        rows, size = (self._train if split == "train" else self._val), self.order.global_batch_size
        n = len(rows) if n is None else n if split == "train" else min(n, len(rows))
        samples = OrderedSamples(rows, self.config.seed, self.order if split == "train" else None)
        for at in range(0, n, size):
            index = self.order.indices(at // size)[: n - at] if split == "train" else np.arange(at, min(at + size, n))
            batch = samples.__getitems__(index.tolist())
            yield batch, rows.sources(self.order.rows(index) if split == "train" else index)

    def _rank(self) -> tuple[int, int]:
        """(rank, world size) among the data-parallel ranks; the batch must be divisible by their number."""
        if self.trainer is None:
            return 0, 1
        parallel = getattr(getattr(self.trainer, "lightning_module", None), "parallel", None)
        if parallel is not None:
            return parallel.rank, parallel.size
        size, world_size = self.config.data.global_batch_size, self.trainer.world_size
        if size % world_size:
            low = size // world_size * world_size
            near = ", ".join(str(n) for n in (low, low + world_size) if n)
            raise ConfigError(
                f"`data.global_batch_size` must be a multiple of the {world_size} processes, but is {size} instead. "
                f"Nearest: {near}."
            )
        return self.trainer.global_rank, world_size

    def _loader(self, samples: OrderedSamples, batches: Iterable[list[int]]) -> DataLoader[Batch]:
        data = self.config.data
        as_given: Any = as_bits if self.config.trainer.precision == "bf16-true" else _as_it_is
        if data.num_workers:
            allow_threads(False)
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=data.num_workers,
            persistent_workers=data.num_workers > 0,
            worker_init_fn=ignore,
            collate_fn=as_given,
            pin_memory=torch.cuda.is_available() and self.config.trainer.accelerator != "cpu",
            generator=torch.Generator(),  # for the workers' seeds; the global one stays untouched
        )

    # ---------------------------------------------------------------------------------------------------------- samples

    def prompts(self, n: int) -> list[str]:
        """The first words of the first n validation documents, or of as many as there are."""
        self.prepare()
        if self.tokenizer is None or self._val_text is None:
            return []
        documents = self._val_text.beginnings(n, 64)
        return [found.group() for ids in documents if (found := _PROMPT.match(self.tokenizer.decode(ids.tolist())))]

    def before_trained(self, n: int) -> list[list[int]]:
        """The tokens before the first trained one in each of the first n validation documents; none without a mask."""
        self.prepare()
        if self._val_text is None or self._val_text.mask is None:
            return []
        found = []
        each = 1 + self._val_text.pairs  # both answers of a pair have one prompt
        for i in range(0, min(n * each, self._val_text.n_documents), each):
            first = int(np.argmax(self._val_text.mask.read(*self._val_text.offsets[i : i + 2].tolist())))
            found.append(self._val_text.document(i)[:first].tolist())
        return found


def _as_it_is(batch: Any) -> Any:
    """The dataset gives whole batches: there is nothing to collate."""
    return batch
