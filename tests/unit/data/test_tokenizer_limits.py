"""A tokenizer from a stranger asks for no more than its limits, and changes no text in silence."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import MAX_IDS
from txtrain.errors import ConfigError

VOCABULARY = {"</s>": 0, "<unk>": 1, "a": 2, "b": 3, "ab": 4}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Any, kind: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", kind: [*steps]}


def table(size: int, rest: bytes) -> dict[str, str]:
    raw = base64.b64encode(struct.pack("<I", size) + rest).decode()
    return {"type": "Precompiled", "precompiled_charsmap": raw}


def after(single: list[Any], pair: list[Any] | None = None, ids: tuple[int, ...] = (0,)) -> dict[str, Any]:
    special = {"</s>": {"id": "</s>", "ids": [*ids], "tokens": ["</s>"] * len(ids)}}
    both = [SEQUENCE, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair or both, "special_tokens": special}


DOUBLED = replace({"String": "a"}, "aa")
WORD_PIECE = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "vocab": VOCABULARY}


def tokenizer(folder: Path, **parts: Any) -> Path:
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": VOCABULARY, "merges": [["a", "b"]]}
    said = {"version": "1.0", "added_tokens": [], "model": {**model, **parts.pop("model", {})}, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": sequence(*[DOUBLED] * 34)}, "`normalizer` must make a text at most 1,000 times as long"),
        ({"normalizer": sequence(DOUBLED, sequence(*[sequence(DOUBLED)] * 9))}, "may make it 1.02e+03"),
        ({"normalizer": sequence(*[replace({"Regex": ""}, "b")] * 10)}, "1.02e+03"),
        ({"normalizer": replace({"String": ""}, "b" * 1000)}, "1e+03"),
        ({"normalizer": replace({"String": "a"}, "b" * 10**6)}, "1e+06"),
        ({"normalizer": {"type": "Prepend", "prepend": "b" * 10**6}}, "1e+05"),
        ({"normalizer": table(4, bytes(4) + b"b" * 2000 + b"\0")}, "2e+03"),
        ({"decoder": sequence(*[DOUBLED] * 34, kind="decoders")}, "`decoder` must make a text at most"),
        ({"normalizer": sequence(*[{"type": "Lowercase"}] * 101)}, "at most 100 steps, but has 101"),
        ({"normalizer": table(2**32 - 4, bytes(64))}, "the size that it states"),
        ({"normalizer": table(3, bytes(64))}, "the size that it states"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "x"}}, "the size that it states"),
        ({"model": {"dropout": 0.5}}, "`model.dropout` must be null, but is 0.5"),
        ({"model": {**WORD_PIECE, "max_input_chars_per_word": 10**15}}, "at most 10,000, but is 1,000,000,000,000,000"),
        ({"model": {"vocab": {**VOCABULARY, "c": 2**32 - 1}}}, f"at most {MAX_IDS:,} ids"),
        ({"post_processor": after([END])}, "must leave the tokens of a text as they are"),
    ],
)
def test_what_takes_memory_or_time_or_changes_texts_is_refused(tmp_path: Path, parts: dict[str, Any], said: str) -> None:
    folder = tokenizer(tmp_path, **parts)
    with pytest.raises(ConfigError) as e:
        load_tokenizer(folder)
    assert said in str(e.value)
    assert str(folder) in str(e.value) or "data.tokenizer" in str(e.value)


def test_a_name_that_hides_behind_escapes_is_found(tmp_path: Path) -> None:
    path = tokenizer(tmp_path, normalizer=table(2**32 - 4, bytes(64))) / "tokenizer.json"
    path.write_text(path.read_text().replace("charsmap", r"ch\u0061rsmap"))
    with pytest.raises(ConfigError, match="the size that it states"):
        load_tokenizer(tmp_path)


def test_rules_of_models_are_within_the_limits(tmp_path: Path) -> None:
    steps = [{"type": "NFKC"}, replace({"Regex": " {2,}"}, " "), replace({"String": " "}, "▁"), {"type": "Prepend", "prepend": "▁"}]
    loaded = load_tokenizer(tokenizer(tmp_path, normalizer=sequence(*steps), post_processor=after([SEQUENCE, END])))
    assert loaded.encode("ab") == [1, 4]


@pytest.mark.parametrize(
    ("parts", "n", "said"),
    [
        (after([SEQUENCE, END], ids=(99,)), 1, "99 is no token"),
        (after([SEQUENCE], pair=[SEQUENCE, SEQUENCE]), 2, "special tokens around"),
        (after([SEQUENCE], pair=[SEQUENCE, END]), 2, "special tokens around"),
    ],
)
def test_special_tokens_around_texts_are_tokens_and_leave_none_out(
    tmp_path: Path, parts: dict[str, Any], n: int, said: str
) -> None:
    loaded = load_tokenizer(tokenizer(tmp_path, post_processor=parts))
    with pytest.raises(ConfigError, match=said):
        loaded.frame(n)


def test_a_tokenizer_that_has_no_a_is_framed_all_the_same(tmp_path: Path) -> None:
    model = {"vocab": {"</s>": 0, "é": 1}, "merges": [], "unk_token": None}
    loaded = load_tokenizer(tokenizer(tmp_path, model=model, post_processor=after([SEQUENCE, END])))
    assert loaded.frame(1).specials == ((), (0,))
    digits = {"type": "WordLevel", "vocab": {"</s>": 0, "1": 1}, "unk_token": "<unk>"}
    assert load_tokenizer(tokenizer(tmp_path, model=digits, post_processor=after([SEQUENCE, END]))).encode("1") == [1]


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "", ".", "x" * 101, "a\0b"])
def test_a_chat_template_is_not_called_like_a_path(tmp_path: Path, name: str) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "y"}]
    config = {"eos_token": "</s>", "chat_template": templates}
    (tokenizer(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="name of a chat template must be a word"):
        load_tokenizer(tmp_path)
