"""The tokenizer of a run: loaded, or trained on its text, with the special tokens of its objective."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from txtrain.data.sources.files import chunks_of
from txtrain.data.store.cache import cached
from txtrain.data.store.split import Corpora, Corpus, digest
from txtrain.data.tokenizer.folder import TOKENIZER_FILES
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer, train_tokenizer
from txtrain.errors import ConfigError
from txtrain.run_config import RunConfig

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # they need torch, which `txtrain plan` does without
    from txtrain.data.samples.labels import LabelledCorpus
    from txtrain.data.samples.pairs import PairCorpus
    from txtrain.data.samples.prompts import ProblemCorpus

    AnyCorpus = Corpus | Corpora | PairCorpus | ProblemCorpus | LabelledCorpus


def make_tokenizer(corpus: AnyCorpus, config: RunConfig, special_tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer that data.tokenizer names, with the special tokens that the objective needs.

    Raises:
        ConfigError: it has more tokens than the model.
    """
    name = config.data.tokenizer
    if name == "train":
        return fitted(_trained(corpus, config, special_tokens), name, config)
    return fitted(load_tokenizer(name), name, config, special_tokens)


def fitted(tokenizer: Tokenizer, name: Any, config: RunConfig, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer with the missing special tokens added. name: the value of data.tokenizer."""
    given, tokenizer = tokenizer.vocab_size, tokenizer.with_specials(special_tokens)
    if tokenizer.vocab_size > given and name != "bytes":
        added = tokenizer.vocab_size - given
        log.warning("data.tokenizer=%s gets %d special tokens that the objective needs", name, added)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"`model.vocab_size` must be at least {tokenizer.vocab_size}, the tokens of data.tokenizer={name}, "
            f"but is {config.model.vocab_size} instead. Nearest: {tokenizer.vocab_size}."
        )
    return tokenizer


def _trained(corpus: AnyCorpus, config: RunConfig, special_tokens: Sequence[str]) -> Tokenizer:
    vocab_size, most = config.model.vocab_size, config.data.tokenizer_sample
    key = digest(corpus.fingerprint, "byte-level BPE", vocab_size, *special_tokens, most)

    def fill(empty: Any) -> None:
        n = sum(len(chunk) for text in corpus.training_texts() for chunk in chunks_of(text))
        if n > most:
            said = "the tokenizer is trained on %s of the text's %s characters (data.tokenizer_sample)"
            log.warning(said, f"{most:,}", f"{n:,}")
        trained = train_tokenizer(corpus.training_texts(), vocab_size - len(special_tokens), min(1.0, most / max(1, n)))
        trained.with_specials(special_tokens).save(empty)

    tokenizer = load_tokenizer(cached(config.data.cache_dir, f"tokenizer-{key}", fill, TOKENIZER_FILES))
    if tokenizer.vocab_size < vocab_size:
        short = "the text is too small for a vocabulary of %d: its tokenizer has %d tokens"
        log.warning(short, vocab_size, tokenizer.vocab_size)
    return tokenizer
