"""DataModule: from a config to batches, one of which is this process's share of one optimizer step."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from txtrain.config import Train
from txtrain.data.cache import TokenFile, build_folder, cache_root
from txtrain.data.order import GlobalOrder, OrderHash, ShareSampler
from txtrain.data.packing import PackedSamples
from txtrain.data.samples import ListedSamples, OrderedSamples, Rows
from txtrain.data.sources import SampleSource, TextSource, build_source, describe, has_validation, is_text, settle
from txtrain.data.split import Corpus, digest, is_held_out
from txtrain.data.tokenise import tokenise
from txtrain.data.tokenizer import Tokenizer, allow_threads, train_tokenizer
from txtrain.errors import ConfigError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
_PROMPT = re.compile(r"\s*(?:\S+\s+){0,5}\S+")


class DataModule(L.LightningDataModule):
    """The training and validation batches of a run.

    A batch holds `input_ids` and `labels` (-100: not a target), `document_ids` unless documents may attend to each other, all int64
    [B, T], and `sample_index`, int64 [B]. After `prepare()`: `tokenizer` (None for a source of ready samples), `n_train`, `n_val`
    (samples), `source` (for the screen), `fingerprint` (of text, tokenizer and packing), `token_bytes`.

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
        train, val = self._from_text(source) if is_text(source) else self._from_samples(source)  # type: ignore[arg-type]
        self.n_train, self.n_val = len(train), len(val)
        self.source = describe(source, config.data.type)
        self.order = GlobalOrder(self.n_train, config.data.global_batch_size, config.seed, config.trainer.overfit_batches)
        self.order_hash = OrderHash(self.order)  # order_hash(step): of the samples of steps 1..step
        self._train, self._val = train, val

    def _from_text(self, source: TextSource) -> tuple[Rows, Rows]:
        config, data = self.config, self.config.data
        corpus = Corpus(source, data.val_fraction)
        self.tokenizer = self._tokenizer(corpus)
        self.token_bytes = self.tokenizer.token_bytes()
        key = digest(corpus.fingerprint, self.tokenizer.fingerprint)
        tokenizer = self.tokenizer
        folder = build_folder(cache_root(data.cache_dir) / key, lambda empty: tokenise(corpus, tokenizer, empty))
        self.fingerprint = digest(key, config.seq_len, data.cross_document_attention)
        self._val_tokens = TokenFile(folder, "validation")
        train, val = (PackedSamples(tokens, config.seq_len, data.cross_document_attention) for tokens in (TokenFile(folder, "train"), self._val_tokens))
        remedy = "a longer data.val_path" if has_validation(source) else "a larger data.val_fraction, or data.val_path"
        _refuse_short(train, "training", "more text")
        _refuse_short(val, "validation", remedy)
        return train, val

    def _tokenizer(self, corpus: Corpus) -> Tokenizer:
        name, vocab_size = self.config.data.tokenizer, self.config.model.vocab_size
        if name == "train":
            key = digest(corpus.fingerprint, "byte-level BPE", vocab_size)
            made = build_folder(
                cache_root(self.config.data.cache_dir) / f"tokenizer-{key}",
                lambda empty: train_tokenizer(corpus.training_texts(), vocab_size).save(empty),
            )
            tokenizer = Tokenizer.load(made)
            if tokenizer.vocab_size < vocab_size:
                log.warning("the text is too small for a vocabulary of %d: its tokenizer has %d tokens", vocab_size, tokenizer.vocab_size)
        else:
            tokenizer = Tokenizer.load(name)
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"`model.vocab_size` must be at least {tokenizer.vocab_size}, the tokens of data.tokenizer={name}, but is {vocab_size} instead. "
                f"Nearest: {tokenizer.vocab_size}."
            )
        return tokenizer

    def _from_samples(self, source: SampleSource) -> tuple[Rows, Rows]:
        self.tokenizer = self.token_bytes = None
        data, samples = self.config.data, source.samples("train")
        if has_validation(source):
            held_out = source.samples("validation")
            train, val = ListedSamples(samples, np.arange(len(samples))), ListedSamples(held_out, np.arange(len(held_out)))
        else:
            held = np.array([is_held_out(k, data.val_fraction) for k in range(len(samples))], dtype=np.bool_)
            train, val = ListedSamples(samples, np.flatnonzero(~held)), ListedSamples(samples, np.flatnonzero(held))
        for part, rows in (("training", train), ("validation", val)):
            if not len(rows):
                raise ConfigError(f"`data={data.type}` must have at least one {part} sample, but has none: {len(samples)} in all.")
        known = source.identity() if hasattr(source, "identity") else repr([samples[i] for i in (0, len(samples) // 2, len(samples) - 1)])
        self.fingerprint = digest(repr(data), len(train), len(val), known)
        return train, val

    # ------------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of each global step, from start_step on, without end."""
        self.prepare()
        assert self._train is not None
        rank, world_size = self._rank()
        return self._loader(OrderedSamples(self._train, self.order), ShareSampler(self.order, rank, world_size, self.start_step))

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """Global batches, the same at every call: rows spread evenly over the validation set where the limit leaves some out."""
        self.prepare()
        size = self.config.data.global_batch_size
        n = min(self.n_val, self.config.trainer.limit_val_batches * size)
        rows = np.arange(n) * self.n_val // max(n, 1)
        batches = [rows[i : i + size].tolist() for i in range(0, n, size)]
        return self._loader(OrderedSamples(self._val), batches) if batches else []

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
        """The first words of the first n validation documents; fewer if there are fewer, none without a tokenizer."""
        self.prepare()
        if self.tokenizer is None:
            return []
        documents = (self._val_tokens.document(i)[:64].tolist() for i in range(min(n, self._val_tokens.n_documents)))
        return [found.group() for ids in documents if (found := _PROMPT.match(self.tokenizer.decode(ids)))]


def _as_it_is(batch: Any) -> Any:
    """The dataset gives whole batches: nothing is left to collate."""
    return batch


def _refuse_short(samples: PackedSamples, part: str, remedy: str) -> None:
    if not len(samples):
        tokens = samples.tokens
        raise ConfigError(
            f"`data.seq_len` must be at most {len(tokens)}, the tokens of the {part} text ({tokens.n_documents} documents), "
            f"but is {samples.seq_len} instead. Give {remedy}, or a smaller data.seq_len."
        )
