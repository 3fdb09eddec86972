"""Sources of rows (pairs, problems, labelled texts, images, questions, ready samples) to samples."""

from __future__ import annotations

import dataclasses as dc
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from txtrain.data.base_config import DataConfig
from txtrain.data.fitted_tokenizer import fitted, make_tokenizer
from txtrain.data.prepared import Prepared, skipped_in
from txtrain.data.samples.images import prepare_images
from txtrain.data.samples.labels import LABEL_FILES, LabelledCorpus, LabelledSamples, frame_of
from txtrain.data.samples.pairs import PairCorpus, PairSamples
from txtrain.data.samples.prompts import ProblemCorpus, PromptSamples
from txtrain.data.samples.questions import QuestionRows, encode
from txtrain.data.samples.rows import ListedSamples, probe
from txtrain.data.samples.text import SampleMaker
from txtrain.data.sources.source import SPLITS, SampleSource, has_validation, identity, skipped
from txtrain.data.store.cache import TOKEN_FILES, TokenFile, cached
from txtrain.data.store.split import digest, held_out
from txtrain.data.store.tokenize import Limit, tokenise, write_skipped
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.run_config import RunConfig

log = logging.getLogger(__name__)

_OF_0_1_0 = {  # keys of every source
    "type", "tokenizer", "seq_len", "global_batch_size", "micro_batch_size", "cross_document_attention", "packing",
    "val_fraction", "num_workers", "cache_dir",
}
_LARGE = 1_000_000_000  # bytes of text: at most so much is tokenised by a run on several nodes


def limit_of(config: RunConfig) -> Limit | None:
    n_nodes = config.trainer.num_nodes
    return Limit(_LARGE, f"trainer.num_nodes={n_nodes}") if n_nodes > 1 else None


def _pairs(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    data = config.data
    corpus = PairCorpus(source, data.val_fraction, config.extent.whole)
    tokenizer = make_tokenizer(corpus, config, objective.special_tokens)
    key = digest(corpus.fingerprint, tokenizer.fingerprint)
    fill = partial(tokenise, corpus, tokenizer, with_bos=False, limit=limit_of(config))
    folder = cached(data.cache_dir, key, fill, TOKEN_FILES)
    train, validation = (
        PairSamples(TokenFile(folder, split), tokenizer, config.seq_len)
        for split in (("validation", "validation") if config.extent.whole else SPLITS)
    )
    allowed = f"pair of at most data.seq_len={config.seq_len} tokens a side"
    _check_lengths((train, validation), data.type, allowed, f"pairs are longer than data.seq_len={config.seq_len}")
    known = digest(key, config.seq_len)
    return Prepared(train, validation, known, tokenizer, lengths=train.lengths, skipped=skipped_in(folder))


def _check_lengths(splits: Iterable[PairSamples | PromptSamples], source: str, allowed: str, longer: str) -> None:
    """Refuse a split without rows that are short enough; say how many are left out. longer: what those are."""
    for rows, part in zip(splits, ("training", "validation"), strict=True):
        if not len(rows):
            none = f"but has none: {rows.n_all} in all"
            raise ConfigError(f"`data={source}` must have at least one {part} {allowed}, {none}.")
        if left_out := rows.n_all - len(rows):
            log.warning("%d of %d %s %s and left out", left_out, rows.n_all, part, longer)


def _problems(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    data, corpus = config.data, ProblemCorpus(source)
    tokenizer = make_tokenizer(corpus, config, objective.special_tokens)
    longest, _ = config.objective.lengths(config.seq_len)
    train, validation = (
        PromptSamples([*source.problems(split)], tokenizer, longest, answered=objective.masks) for split in SPLITS
    )
    of_all = f"of data.seq_len={config.seq_len}, less what is to be written"
    allowed = f"problem of at most {longest} tokens ({of_all})"
    _check_lengths((train, validation), data.type, allowed, f"problems are longer than {longest} tokens")
    known = digest(corpus.fingerprint, tokenizer.fingerprint, longest, objective.masks)
    return Prepared(train, validation, known, tokenizer)


def _labelled(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    data, model = config.data, config.model
    corpus = LabelledCorpus(source, data.val_fraction, config.extent.whole)
    tokenizer = make_tokenizer(corpus, config, objective.special_tokens).framed(model.topology)
    key = digest(corpus.fingerprint, tokenizer.fingerprint)

    def fill(empty: Path) -> None:
        tokenise(corpus, tokenizer, empty, with_bos=False, limit=limit_of(config))
        corpus.write_labels(empty)

    folder = cached(data.cache_dir, key, fill, (*TOKEN_FILES, *LABEL_FILES.values()))
    frame = frame_of(tokenizer, len(source.texts), config.seq_len)
    pad_id = tokenizer.padding_id
    train, validation = (
        LabelledSamples(
            TokenFile(folder, split), np.load(folder / LABEL_FILES[split], allow_pickle=False), frame, config.seq_len,
            pad_id, model.embedding.n_types
        )
        for split in (("validation", "validation") if config.extent.whole else SPLITS)
    )
    for rows, part in ((train, "training"), (validation, "validation")):
        if not len(rows):
            remedy = "" if part == "training" else " Give data.val_path, or a larger data.val_fraction."
            raise ConfigError(f"`data={data.type}` must have at least one {part} row, but has none.{remedy}")
        if rows.n_cut:
            longer = "%d of %d %s texts are longer than data.seq_len=%d and cut"
            log.warning(longer, rows.n_cut, len(rows), part, config.seq_len)
    known = digest(key, config.seq_len)
    return Prepared(train, validation, known, tokenizer, lengths=train.lengths, skipped=skipped_in(folder))


def _images(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    train, validation, known = prepare_images(source, config)
    return Prepared(train, validation, known)


def _samples(source: SampleSource, config: RunConfig, objective: SampleMaker) -> Prepared:
    data, samples = config.data, source.samples("train")
    if config.extent.whole:
        parts = [("train", samples, np.arange(len(samples)))] * 2
    elif has_validation(source):
        others = source.samples("validation")
        parts = [("train", samples, np.arange(len(samples))), ("validation", others, np.arange(len(others)))]
    else:
        held = held_out(len(samples), data.val_fraction)
        parts = [("train", samples, np.flatnonzero(~held)), ("train", samples, np.flatnonzero(held))]
    below = config.model.vocab_size if config.model.embedding.grid() is None else None
    train, validation = (ListedSamples(found, rows, f"samples({split!r})", below) for split, found, rows in parts)
    for part, listed in (("training", train), ("validation", validation)):
        if not len(listed):
            few = f"at least one {part} sample, but has none: {len(samples)} in all"
            raise ConfigError(f"`data={data.type}` must have {few}.")
        probe(listed)
    known = identity(source, lambda: repr([samples[i] for i in (0, len(samples) // 2, len(samples) - 1)]))
    return Prepared(train, validation, digest(_told(data), len(train), len(validation), known))


def _told(data: DataConfig) -> str:
    """The keys that change samples. As version 0.1.0 wrote `repr(data)`, whose runs go on: with those that may differ
    on a resume at their defaults, and without keys that every source has had since, where these are at theirs.
    """
    since = {f.name for f in dc.fields(DataConfig)} - _OF_0_1_0
    values = {f.name: f.default if f.metadata.get("free") else getattr(data, f.name) for f in dc.fields(data)}
    kept = [f.name for f in dc.fields(data) if f.name not in since or values[f.name] != f.default]
    return f"{type(data).__qualname__}({', '.join(f'{name}={values[name]!r}' for name in kept)})"


def _questions(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    data, two_stacks = config.data, config.model.topology == "encoder_decoder"
    if data.tokenizer == "train":
        raise ConfigError("`data.tokenizer` must be given with questions, on which none is trained: the model's.")
    tokenizer = fitted(load_tokenizer(data.tokenizer), data.tokenizer, config, objective.special_tokens)
    items = [encode(one, tokenizer, config.seq_len, two_stacks) for one in source.questions("train")]
    held = np.ones(len(items), np.bool_) if config.extent.whole else held_out(len(items), data.val_fraction)
    train, validation = (
        QuestionRows(items, np.flatnonzero(which), tokenizer, config.seq_len, two_stacks)
        for which in (held if config.extent.whole else ~held, held)
    )
    if not len(validation):
        raise ConfigError(f"`data={data.type}` must have at least one question, but has none for validation.")
    known = digest(source.identity(), tokenizer.fingerprint, config.seq_len, None if held.all() else data.val_fraction)
    return Prepared(train, validation, known, tokenizer, skipped=_listed(source, data.cache_dir))


def _listed(source: Any, cache_dir: str | None) -> tuple[Path, ...]:
    """The list of the skipped rows of a source that has no tokens in the cache, in a folder of its own there."""
    if not (rows := skipped(source)):
        return ()
    return skipped_in(cached(cache_dir, f"skipped-{digest(rows)}", lambda empty: write_skipped(empty, source)))


Way = Callable[[Any, RunConfig, SampleMaker], Prepared]
WAYS: dict[str, Way] = {
    "pairs": _pairs,
    "problems": _problems,
    "labelled": _labelled,
    "images": _images,
    "samples": _samples,
    "questions": _questions,
}
