"""From a source to samples that are read by row: one function per kind of source."""

from __future__ import annotations

import dataclasses as dc
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.data.config import MixtureConfig
from txtrain.data.fitted_tokenizer import fitted, make_tokenizer
from txtrain.data.prepare_rows import WAYS, Way, limit_of
from txtrain.data.prepared import Prepared, skipped_in
from txtrain.data.samples.best_fit import FORMAT as best_fit_format
from txtrain.data.samples.best_fit import PLAN_FILES, write_plan
from txtrain.data.samples.rows import Rows
from txtrain.data.samples.text import SampleMaker, TokenisedText
from txtrain.data.sources.mixture import MixedRows
from txtrain.data.sources.source import (
    SPLITS,
    MarkedSource,
    Source,
    TextSource,
    as_named,
    build_source,
    chat_template,
    describe,
    has_validation,
    method_of,
    pairs,
    settle,
    validation_sets,
)
from txtrain.data.store.cache import MARK_FILES, TOKEN_FILES, TokenFile, TokenWriter, cached
from txtrain.data.store.split import FORMAT, Corpora, Corpus, MarkedCorpus, ValidationSet, digest
from txtrain.data.store.stream import StreamTokens
from txtrain.data.store.tokenize import tokenise, write_skipped
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.registry import TABLE
from txtrain.run_config import RunConfig

log = logging.getLogger(__name__)

_PLANNED = {"concat": (), "best_fit": (best_fit_format,), "none": (best_fit_format, "each alone")}  # in fingerprints


def prepare(source: Source, config: RunConfig, objective: SampleMaker) -> Prepared:
    """Train or load the tokenizer, tokenise the text into the cache, find the images: all that takes time.

    Raises:
        ConfigError: the data do not fill one sample, or the tokenizer does not fit the model.
    """
    made = _WAYS[method_of(source) or ""](source, config, objective)
    if made.skipped:
        files = ", ".join(map(str, made.skipped))
        log.warning("%s bad rows are left out (data.bad_rows=skip), listed in %s", f"{made.n_skipped:,}", files)
    return made


# ----------------------------------------------------------------------------------------------------------------- text


def _text(
    source: TextSource, config: RunConfig, objective: SampleMaker, tokenizer: Tokenizer | None = None
) -> Prepared:
    """tokenizer: that of the mixture; None: the one that the config names."""
    data = config.data
    corpus = Corpus(source, data.val_fraction)
    tokenizer = tokenizer or make_tokenizer(corpus, config, objective.special_tokens)
    if config.extent.whole:
        key, folder = _tokenised(ValidationSet(source), tokenizer, config)
        every = TokenFile(folder, "validation")
        whole = _packed((every, every), tokenizer, key, config, objective, "more")
        return dc.replace(whole, skipped=skipped_in(folder))
    key, folder = _tokenised(corpus, tokenizer, config)
    sets = validation_sets(source)
    if not sets:
        remedy = "a longer data.val_path" if has_validation(source) else "a larger data.val_fraction, or data.val_path"
        both = TokenFile(folder, "train"), TokenFile(folder, "validation")
        return dc.replace(_packed(both, tokenizer, key, config, objective, remedy), skipped=skipped_in(folder))
    made, folders = [], [folder]
    for name, one in sets.items():
        other, beside = _tokenised(ValidationSet(one), tokenizer, config)
        folders.append(beside)
        splits = TokenFile(folder, "train"), TokenFile(beside, "validation")
        made.append(_packed(splits, tokenizer, digest(key, other), config, objective, f"a longer data.val_path.{name}"))
    named = {name: part.validation for name, part in zip(sets, made, strict=True)}
    validation, fingerprint = MixedRows([*named.values()]), digest(*(part.fingerprint for part in made))
    skipped = skipped_in(*folders)
    return dc.replace(made[0], validation=validation, named=named, fingerprint=fingerprint, skipped=skipped)


def _marked(source: MarkedSource, config: RunConfig, objective: SampleMaker) -> Prepared:
    """Texts with a mask of the tokens to be trained."""
    data, (corpus, tokenizer) = config.data, marked_corpus(source, config, objective.special_tokens)
    key = digest(corpus.fingerprint, tokenizer.fingerprint)

    def fill(empty: Path) -> None:
        writer = TokenWriter(empty, tokenizer.vocab_size, marked=True)
        with writer.open():
            for split, text in corpus.documents():
                writer.append_marked(split, text)
        write_skipped(empty, source)
        writer.finish(source=describe(source, data.type), tokenizer=tokenizer.fingerprint, pairs=pairs(source))

    folder = cached(data.cache_dir, key, fill, (*TOKEN_FILES, *MARK_FILES))
    train, validation = TokenFile(folder, "train"), TokenFile(folder, "validation")
    splits = (validation if config.extent.whole else train), validation
    made = _packed(splits, tokenizer, key, config, objective, "data.val_path, or a larger data.val_fraction")
    return dc.replace(made, skipped=skipped_in(folder))


def marked_corpus(
    source: MarkedSource, config: RunConfig, special_tokens: Sequence[str]
) -> tuple[MarkedCorpus, Tokenizer]:
    """The texts of such a source, and the tokenizer with its chat template."""
    fraction = config.data.val_fraction
    tokenizer = make_tokenizer(Corpus(source, fraction), config, special_tokens)
    if (template := chat_template(source)) is not None:
        tokenizer = tokenizer.with_template(template)
    return MarkedCorpus(source, fraction, tokenizer, config.extent.whole), tokenizer


def _tokenised(corpus: Corpus | ValidationSet, tokenizer: Tokenizer, config: RunConfig) -> tuple[str, Path]:
    """The cache key of a text with this tokenizer, and its folder in the cache."""
    key = digest(corpus.fingerprint, tokenizer.fingerprint)
    fill = partial(tokenise, corpus, tokenizer, limit=limit_of(config))
    return key, cached(config.data.cache_dir, key, fill, TOKEN_FILES)


def _mixture(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    """The samples of all sources, with one tokenizer, and a validation set per source."""
    if config.data.tokenizer == "train" and any(type(one).tokenizer is None for one in source.parts().values()):
        raise ConfigError(
            "`data.tokenizer` must be given with a data=memmap among data.sources: "
            "a folder of `txtrain prepare` has one in FOLDER/tokenizer."
        )
    configs = {name: as_named(dc.replace(config, data=config.data.part(name))) for name in source.parts()}
    sources = {
        name: _told(name, lambda one=one: build_source(settle(one)[0]))  # type: ignore[misc]
        for name, one in configs.items()
    }
    texts = {name: s for name, s in sources.items() if method_of(s) == "documents"}
    corpora = [Corpus(s, configs[name].data.val_fraction) for name, s in texts.items()]
    tokenizer = make_tokenizer(Corpora(tuple(corpora)), config, objective.special_tokens)
    made: dict[str, Prepared] = {}
    for name, s in sources.items():
        way = partial(_text, tokenizer=tokenizer) if name in texts else _tokens
        made[name] = _told(name, lambda way=way, s=s, name=name: way(s, configs[name], objective))  # type: ignore[misc]
    shares = source.shares([len(part.train) for part in made.values()])
    named = {
        (f"{name}.{one}" if part.named else name): rows
        for name, part in made.items()
        for one, rows in (part.named or {"": part.validation}).items()
    }
    return Prepared(
        train=MixedRows([part.train for part in made.values()]),
        validation=MixedRows([*named.values()]),
        fingerprint=digest(
            "mixture",
            *((name, part.fingerprint, str(share)) for (name, part), share in zip(made.items(), shares, strict=True)),
        ),
        tokenizer=tokenizer,
        text=next(iter(made.values())).text,
        named=named,
        shares={name: (len(part.train), share) for (name, part), share in zip(made.items(), shares, strict=True)},
        skipped=tuple(file for part in made.values() for file in part.skipped),
    )


def _told(name: str, make: Callable[[], Any]) -> Any:
    """The result of `make`; its errors about `data` name this source of a mixture."""
    try:
        return make()
    except ConfigError as e:
        raise ConfigError(*(_of_source(name, problem) for problem in e.problems)) from e


def _of_source(name: str, problem: str) -> str:
    if re.match(rf"`data\.({'|'.join(MixtureConfig.shared)})\b", problem):
        return f"{problem} (data.sources.{name})"
    return re.sub(r"`data\b", f"`data.sources.{name}", problem, count=1)


def _packed(
    splits: tuple[Any, Tokens], tokenizer: Tokenizer | None, key: str, config: RunConfig, objective: SampleMaker,
    remedy: str,
) -> Prepared:
    """The objective's samples of both splits. key: of text and tokenizer. remedy: for too little validation text."""
    across, packing, kind = config.data.cross_document_attention, config.data.packing, splits[1].kind
    reads = config.objective.reads
    if kind != config.data.kind and reads is not None and kind not in reads:
        able = [name for name, option in TABLE["objective"].items() if kind in (option.config.reads or (kind,))]
        wanted = f"{' or '.join(able)} for {kind}, which data.path holds"
        raise ConfigError(f"`objective` must be {wanted}, but is {config.objective.type} instead.")
    if splits[1].pairs and packing == "concat":
        why = "best_fit or none for preferences, since both answers of a prompt are in one sequence"
        raise ConfigError(f"`data.packing` must be {why}, but is {packing} instead. Nearest: best_fit.")
    if any(tokens.mask is not None for tokens in splits) and not objective.masks:
        fitting = "causal_lm or sft with data of which only some tokens are trained"
        raise ConfigError(f"`objective` must be {fitting}, but is {config.objective.type} instead.")
    plans = [_plan(tokens, key, config) if packing != "concat" else None for tokens in splits]
    texts = [
        TokenisedText(tokens, tokenizer, config.seq_len, across, plan, config.extent, _overlaps(config))
        for tokens, plan in zip(splits, plans, strict=True)
    ]
    train, validation = (objective.samples(text) for text in texts)
    _refuse_short(train, texts[0], "training", "more text")
    _refuse_short(validation, texts[1], "validation", remedy)
    fingerprint = digest(key, config.seq_len, across, *_PLANNED[packing])
    return Prepared(train, validation, fingerprint, tokenizer, text=splits[1])


def _overlaps(config: RunConfig) -> bool:
    """Whether pieces of a document share a token, so that every one but the first is predicted."""
    return config.extent.rest and bool(config.objective.slides)


def _plan(tokens: Tokens, key: str, config: RunConfig) -> Path:
    packing, overlap = config.data.packing, _overlaps(config)
    told = (*_PLANNED[packing], *(["overlap"] if overlap else []), config.seq_len, tokens.split)
    together, each = packing == "best_fit", 1 + tokens.pairs
    fill = partial(write_plan, tokens, config.seq_len, together=together, each=each, overlap=overlap)
    name = f"plan-{digest(key, *told)}"
    return cached(config.data.cache_dir, name, fill, PLAN_FILES)


def _refuse_short(samples: Rows, text: TokenisedText, part: str, remedy: str) -> None:
    if not len(samples):
        tokens = text.tokens
        if tokens.mask is not None:
            wanted = f"{part} texts with a token that is trained"
            raise ConfigError(f"`data` must have {wanted}, but has none. Give {remedy}, or a larger data.seq_len.")
        if not tokens.n_documents:
            why = "white space aside, there is too little to divide"
            raise ConfigError(f"`data` must have {part} text, but has none: {why}. Give {remedy}.")
        raise ConfigError(
            f"`data.seq_len` must be at most {len(tokens)}, the tokens of the {part} text ({tokens.n_documents} "
            f"documents), but is {text.seq_len} instead. Give {remedy}, or a smaller data.seq_len."
        )


# --------------------------------------------------------------------------------------------------------------- tokens


def _tokens(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    tokenizer: Tokenizer | None = source.tokenizer
    below, eos_id = config.model.vocab_size, None
    if tokenizer is not None:
        tokenizer = fitted(tokenizer, config.data.tokenizer or config.data.path, config, objective.special_tokens)
        below, eos_id = tokenizer.vocab_size, tokenizer.eos_id
    parts = [source.every] * 2 if config.extent.whole else [source.tokens(split) for split in SPLITS]
    train, validation = (
        Tokens(part, split, eos_id, below, pairs(source)) for part, split in zip(parts, SPLITS, strict=True)
    )
    for tokens in (train, validation):
        tokens.probe()
    remedy = "a larger data.val_fraction, or data.val_path"
    key = digest(source.key, "whole") if config.extent.whole else source.key  # plans have the names of splits
    made = _packed((train, validation), tokenizer, key, config, objective, remedy)
    return dc.replace(made, skipped=skipped_in(*source.folders))


# --------------------------------------------------------------------------------------------------------------- stream


def _stream(source: Any, config: RunConfig, objective: SampleMaker) -> Prepared:
    """Streamed training tokens, and as much validation text as the run reads, kept in the cache."""
    data: Any = config.data
    tokenizer = fitted(load_tokenizer(data.tokenizer), data.tokenizer, config, objective.special_tokens)
    n_tokens = max(config.trainer.limit_val_batches, 1) * data.global_batch_size * config.seq_len + 1
    key = digest(FORMAT, source.identity(), tokenizer.fingerprint)

    def fill(empty: Path) -> None:
        writer = TokenWriter(empty, tokenizer.vocab_size)
        with writer.open():
            for text in source.validation():
                bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
                writer.append("validation", [*bos, *tokenizer.encode(text), tokenizer.eos_id], ends=True)
                if writer.n_tokens >= n_tokens:
                    break
        write_skipped(empty, source)
        writer.finish(source=source.describe(), tokenizer=tokenizer.fingerprint)

    folder = cached(data.cache_dir, digest(key, n_tokens), fill, TOKEN_FILES)
    validation = TokenFile(folder, "validation")
    readers, buffer = data.stream_readers, data.shuffle_buffer
    if readers > 1 or buffer:
        key = digest(key, readers, buffer, source.n_files)
    stream = StreamTokens(source, tokenizer, config.seed, readers, buffer)
    remedy = "a larger data.val_fraction, or another data.val_split"
    made = _packed((stream, validation), tokenizer, key, config, objective, remedy)
    return dc.replace(made, stream=stream, skipped=skipped_in(folder))


_WAYS: dict[str, Way] = {
    "marked": _marked,
    "documents": _text,
    "tokens": _tokens,
    "parts": _mixture,
    "stream": _stream,
    **WAYS,
}
