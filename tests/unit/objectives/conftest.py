"""Tiny runs of each objective, a text to make samples of, and draws for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training import RUN, write_chats, write_labels, write_preferences
from txtrain import compose
from txtrain.config.schema import Train
from txtrain.data.samples.draws import Draws
from txtrain.data.samples.text import TokenisedText
from txtrain.data.store.cache import TokenFile, TokenWriter
from txtrain.data.tokenizer.tokenizer import Tokenizer, byte_tokenizer

SHAPE = ("model.n_layers=2", "model.dim=32", "model.n_heads=2", "model.dropout=0", "optimizer.lr=0.01", "scheduler.warmup_steps=4")
TEXT = ("model.vocab_size=400", "model.max_seq_len=32", "data=text", "data.tokenizer=bytes")
KINDS: dict[str, tuple[str, ...]] = {
    "masked_lm": ("model=bert", "objective=masked_lm", "model.head.next_sentence=false", *TEXT),
    "masked_lm with pairs": ("model=bert", "objective=masked_lm", "objective.whole_word=true", *TEXT),
    "span_corruption": ("model=t5", "objective=span_corruption", "model.output_dropout=0", "model.ffn.dropout=0", *TEXT),
    "prefix_lm": ("model=gpt2", "objective=prefix_lm", *TEXT),
    "prefix_lm of two stacks": ("model=t5", "objective=prefix_lm", "model.output_dropout=0", "model.ffn.dropout=0", *TEXT),
    "seq2seq": ("model=transformer", "objective=seq2seq", "objective.label_smoothing=0.1", "objective.n_decoded=8", "data=reverse", "data.max_length=8"),
    "sft": ("model=gpt2", "objective=sft", "model.vocab_size=400", "model.max_seq_len=32"),
    "classification": ("model=bert", "data=labels", "model.vocab_size=400", "model.max_seq_len=32", "data.seq_len=32", "data.tokenizer=bytes", "model.head.n_classes=2"),
    "dpo": ("model=gpt2", "objective=dpo", "model.vocab_size=400", "model.max_seq_len=48"),
    "image_classification": ("model=vit", "objective=image_classification", "data=digits", "data.flip=true"),
}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Train]:
    """config(kind, *overrides): a run on a few hundred documents, or on the kind's own data."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(150):
        (folder / f"{i:03}.txt").write_text(f"The {i}th line says that {i} times {i % 7} is {i * (i % 7)}, which is what it is. " * (1 + i % 3))

    def make(kind: str, *overrides: str) -> Train:
        given = [*KINDS[kind], *SHAPE, *RUN, f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
        of_kind = [f"data.path={folder}"] if "data=text" in given else []
        of_kind += write_chats(tmp_path / "chats") if kind == "sft" else []
        of_kind += [f"data.path={write_labels(tmp_path / 'labels.csv')}"] if kind == "classification" else []
        of_kind += write_preferences(tmp_path / "preferences") if kind == "dpo" else []
        made = compose([*given, *of_kind, *overrides])
        assert isinstance(made, Train)
        return made

    return make


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, "train", np.arange(n))


def tokenised(folder: Path, documents: list[str], special_tokens: tuple[str, ...], seq_len: int, tokenizer: Tokenizer | None = None) -> TokenisedText:
    """Documents as the cache holds them: their beginning, bytes, their end."""
    tokenizer = (tokenizer or byte_tokenizer()).with_specials(special_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    with TokenWriter(folder, tokenizer.vocab_size).open() as writer:
        for text in documents:
            writer.append("train", [tokenizer.bos_id or 0, *tokenizer.encode(text), tokenizer.eos_id], ends=True)
    writer.finish()
    return TokenisedText(TokenFile(folder, "train"), tokenizer, seq_len)
