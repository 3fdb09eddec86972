"""`txtrain prepare`: tokenise a run's data ahead of time; a second start continues an interrupted one."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from txtrain.config.composed import Composed
from txtrain.config.schema import Prepare
from txtrain.data.fitted_tokenizer import make_tokenizer
from txtrain.data.prepare import marked_corpus
from txtrain.data.sources.source import (
    Marked,
    Split,
    as_named,
    build_source,
    describe,
    method_of,
    n_bytes,
    pairs,
    settle,
    validation_sets,
)
from txtrain.data.store.formats import INDEX, read_index
from txtrain.data.store.progress import Progress
from txtrain.data.store.shard_writer import ShardWriter, forget, unfinished
from txtrain.data.store.split import Corpus, MarkedCorpus, digest
from txtrain.data.store.tokenize import write_skipped, write_tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.objectives.base import build_objective
from txtrain.training.teach import teach, teacher_of


def run_prepare(job: Composed) -> int:
    """Write the folder, or the part of it that is missing.

    Raises:
        ConfigError: the data are missing or not text, or the folder holds something else.
    """
    config: Prepare = job.config
    assert config.out is not None
    folder = files.path_of(config.out, "out")
    files.check_writable(folder, "out")
    if config.objective.prepares:
        teacher_of(config)
    corpus, tokenizer = _text(config)
    with files.writing(folder, "out"):
        return _fill(corpus, tokenizer, folder, config)


def _fill(corpus: Corpus | MarkedCorpus, tokenizer: Tokenizer, folder: Path, config: Prepare) -> int:
    key, there = digest(corpus.fingerprint, tokenizer.fingerprint), folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with files.locked(folder) as ours:
            if not ours:
                there = True  # the other's
                raise ConfigError(
                    f"`out` must be a folder that no process writes to, but one is preparing {config.out!r}."
                )
            if _is_done(folder, key, config):
                print(f"{folder} is complete: nothing left to do.")
            else:
                _write(corpus, tokenizer, key, folder, config)
            if config.objective.prepares:
                there = True  # the tokens are kept if a later step fails
                teach(config, folder)
                objective, data = config.objective, config.data
                print(
                    f"{folder} has the teacher's distributions. To learn from them, beside those: objective=distill "
                    f"objective.top_k={objective.top_k} objective.temperature={objective.temperature} "
                    f"data.packing={data.packing} data.seq_len={config.seq_len}"
                )
    except ConfigError:
        if not there:
            shutil.rmtree(folder)
        raise
    return 0


def _text(config: Prepare) -> tuple[Corpus | MarkedCorpus, Tokenizer]:
    """The documents and their tokenizer. Without fallback data: a prepared folder is used for long."""
    data: Any = config.data
    source = build_source(settle(as_named(config))[0])
    special_tokens = build_objective(config).special_tokens
    if method_of(source) == "marked":
        return marked_corpus(source, config, special_tokens)
    if method_of(source) != "documents":
        raise ConfigError(f"`data` must be a source of text to be tokenised, but is {data.type} instead.")
    if validation_sets(source):
        raise ConfigError("`data.val_path` must be one path, or null, to be prepared: give the named ones to the run.")
    corpus = Corpus(source, data.val_fraction)
    return corpus, make_tokenizer(corpus, config, special_tokens)


def _is_done(folder: Path, key: str, config: Prepare) -> bool:
    """Whether the folder is complete.

    Raises:
        ConfigError: it was made, or begun, by another command.
    """
    if (folder / INDEX).is_file():
        if read_index(folder, "out")["key"] != key:
            raise ConfigError(f"`out` must be a new folder, but {config.out!r} holds other text or other tokens.")
        forget(folder)  # the state of an unfinished run, which a kill between the last two steps leaves
        return True
    begun = unfinished(folder)
    if begun is None and any(p.name != files.OWNER_LOCK and p.suffix != ".tmp" for p in folder.iterdir()):
        raise ConfigError(f"`out` must be a new or empty folder, but {config.out!r} is not empty.")
    if begun is not None and begun["key"] != key:
        raise ConfigError(f"`out` must be a new folder, but {config.out!r} was begun for another text or tokenizer.")
    if begun is not None and begun["shard_tokens"] != config.prepare.shard_tokens:
        raise ConfigError(
            f"`prepare.shard_tokens` must be {begun['shard_tokens']}, with which {config.out!r} was begun, "
            f"but is {config.prepare.shard_tokens} instead."
        )
    return False


def _write(corpus: Corpus | MarkedCorpus, tokenizer: Tokenizer, key: str, folder: Path, config: Prepare) -> None:
    marked = isinstance(corpus, MarkedCorpus)
    writer = ShardWriter(folder, key, tokenizer.vocab_size, config.prepare.shard_tokens, marked)
    if writer.n_documents:
        print(f"{folder}: goes on after {writer.n_documents:,} documents.", file=sys.stderr)
    writer.save(now=True)  # first of all: marks the folder as ours
    tokenizer.save(folder / "tokenizer")
    documents: Iterator[Any] = corpus.documents()
    rest = itertools.islice(documents, writer.n_documents, None)
    with Progress("tokenising", n_bytes(corpus.source)) as progress:
        for size in _marked(rest, writer) if marked else write_tokens(rest, tokenizer, writer):
            progress.advance(size)
            writer.save()
    train, validation = writer.n_tokens("train"), writer.n_tokens("validation")
    if not train:
        writer.close()
        raise ConfigError("`data` must have training text, but has none: too little to divide. Give more text.")
    write_skipped(folder, corpus.source)
    source: Any = corpus.source
    about = {"pairs": pairs(source), "seq_len": config.seq_len} if marked else {}
    writer.finish(source=describe(corpus.source, config.data.type), tokenizer=tokenizer.fingerprint, **about)
    progress.done(f"tokenised {{size}} in {{seconds}}: {train:,} training and {validation:,} validation tokens")
    chosen = f" data.packing={config.data.packing} data.seq_len={config.seq_len}" if marked else ""
    chosen += f" objective={config.objective.type}" if marked else ""
    print(
        f"{folder} is complete. To train on it: txtrain data=memmap data.path={config.out}{chosen}, with "
        f"model.vocab_size={tokenizer.vocab_size} or more"
    )


def _marked(documents: Iterable[tuple[Split, Marked]], writer: ShardWriter) -> Iterator[int]:
    """Write conversations or preferences; yields the number of bytes of the tokens of each."""
    for split, text in documents:
        writer.append_marked(split, text)
        yield len(text.ids) * writer.dtype.itemsize
