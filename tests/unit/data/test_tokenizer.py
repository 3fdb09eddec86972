import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.conftest import SHARED
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import ChatTemplate, Tokenizer, byte_alphabet, byte_tokenizer, train_tokenizer
from txtrain.errors import ConfigError

TOKENIZERS = SHARED / "tokenizers"
needs_shared = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the shared tokenizers are not beside the checkout")
TEXTS = ["the cat sat on the mat\n", "  the  dog, the cat; 12 héllo\n\n日本 "] * 20


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_byte_ids_are_the_bytes_of_utf_8(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_alphabet_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_specials_are_never_read_out_of_text() -> None:
    for tokenizer in (byte_tokenizer(), train_tokenizer(TEXTS, 300)):
        ids = tokenizer.encode("a <|endoftext|> b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a <|endoftext|> b"


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_trained_tokenizer_loses_nothing_and_counts_bytes(text: str) -> None:
    tokenizer = trained()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def trained(made: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006  (made once)
    if not made:
        made.append(train_tokenizer(TEXTS, 300))
    return made[0]


def test_training_stops_where_the_text_has_no_more_pairs() -> None:
    assert train_tokenizer(TEXTS, 270).vocab_size == 270
    assert 257 < train_tokenizer(["abab " * 10], 5000).vocab_size < 300


def test_a_share_of_the_texts_is_spread_over_all_of_them() -> None:
    texts = ["abab " * 10, "cdcd " * 10] * 3
    assert train_tokenizer(texts, 300, 0.5).fingerprint == train_tokenizer(texts[1::2], 300).fingerprint
    assert train_tokenizer(texts, 300, 0.5).fingerprint != train_tokenizer(texts, 300).fingerprint


def test_training_is_the_same_in_another_process() -> None:
    code = f"from txtrain.data.tokenizer.tokenizer import train_tokenizer; print(train_tokenizer({TEXTS!r}, 300).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert other.stdout.strip() == train_tokenizer(TEXTS, 300).fingerprint


def test_saved_and_loaded_is_the_same_for_us_and_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 0, None)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 0
    assert theirs(TEXTS[1], add_special_tokens=False).input_ids == tokenizer.encode(TEXTS[1])


def test_truncation_and_padding_of_a_file_are_not_obeyed(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend.enable_truncation(3)
    tokenizer.backend.enable_padding(length=8)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("the cat sat on the mat") == trained().encode("the cat sat on the mat")


def test_special_ids_come_from_the_folders_own_words(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.WordLevel({"a": 0, "STOP": 1, "GO": 2, "<pad>": 3}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="eos_token"):
        load_tokenizer(tmp_path)
    config = {"eos_token": {"content": "STOP", "special": True}, "bos_token": "GO"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 1, 3)


@pytest.mark.parametrize("name", ["/nowhere/tokenizer.json", "./nowhere", "a b", "x/y/z"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        load_tokenizer(name)


@pytest.mark.usefixtures("no_hub")
def test_a_mistyped_word_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean bytes\?"):
        load_tokenizer("byte")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, content in (("tokenizer.json", b"{}"), ("tokenizer.model", b"\xff\xff\xff"), ("readme.md", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ConfigError, match="must hold one of"):
        load_tokenizer(tmp_path.parent)


# ------------------------------------------------------------------------------------------------ against the original libraries

PANGRAM = " The quick brown fox; 12,345 don't — ½ héllo 日本\n\n  end"

# Made once with the libraries that own these formats: transformers 5.24 (GPT-2, BERT), sentencepiece 0.2.3.
ORIGINAL = {
    "gpt2": "383 2068 7586 21831 26 1105 11 27712 836 470 851 25208 289 2634 18798 10545 245 98 17312 105 628 220 886",
    "mistral-v1": "28705 415 2936 9060 285 1142 28745 28705 28740 28750 28725 28770 28781 28782 949 28742 28707 1040 28705 29039 "
    "295 28797 584 28709 28705 29142 29119 13 13 28705 948",
    "spm-1000": "68 936 84 35 115 24 72 20 297 111 7 356 602 3 0 555 274 32 14 7 0 7 356 0 602 7 52 0 86 20 7 0 553",
    "bert-base-uncased": "1996 4248 2829 4419 1025 2260 1010 23785 2123 1005 1056 1517 1092 7592 1864 1876 2203",
}


@needs_shared
@pytest.mark.parametrize("name", ORIGINAL)
def test_ids_are_those_of_the_formats_own_library(name: str) -> None:
    assert load_tokenizer(TOKENIZERS / name).encode(PANGRAM) == [int(i) for i in ORIGINAL[name].split()]


@needs_shared
@pytest.mark.parametrize(
    ("name", "ids"),
    [("gpt2", (50256, 50256, None)), ("mistral-v1", (1, 2, None)), ("spm-1000", (1, 2, None)), ("bert-base-uncased", (101, 102, 0))],
)
def test_what_begins_ends_and_pads_a_text(name: str, ids: tuple[int, int, int | None]) -> None:
    tokenizer = load_tokenizer(TOKENIZERS / name)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids


@needs_shared
@pytest.mark.parametrize(("name", "slack"), [("gpt2", 0), ("mistral-v1", 1)])
def test_token_bytes_add_up_to_the_texts(name: str, slack: int) -> None:
    tokenizer = load_tokenizer(TOKENIZERS / name)
    text = (SHARED / "lm" / "tinyshakespeare.txt").read_text()[:50_000] + PANGRAM
    n_bytes = int(tokenizer.token_bytes()[np.array(tokenizer.encode(text))].sum())
    assert n_bytes == len(text.encode()) + slack  # SentencePiece puts a space before the text
    assert tokenizer.decode(tokenizer.encode(text)) == text


FILED = {  # written unlike we would
    "tokenizer_config.json": '{"padding_side":"left", "model_max_length": 64,\n "eos_token":"<|endoftext|>","tokenizer_class":"PreTrainedTokenizerFast"}',
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "chat_template.jinja": "{{ messages }}\r\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}


def filed(folder: Path) -> dict[str, bytes]:
    """A folder as of another tool, with code in it; its tokenizer's files."""
    train_tokenizer(TEXTS, 300).save(folder)
    (folder / "additional_chat_templates").mkdir()
    for name, text in FILED.items():
        (folder / name).write_bytes(text.encode())
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    made = contents_of(folder)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    return made


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_travel_byte_for_byte(tmp_path: Path) -> None:
    given = filed(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert contents_of(tmp_path / "b") == given
    load_tokenizer(tmp_path / "b" / "tokenizer.json").save(tmp_path / "c")
    assert contents_of(tmp_path / "c") == given


def test_a_file_of_another_format_beside_the_given_one_stays_behind(tmp_path: Path) -> None:
    given = filed(tmp_path / "a")
    (tmp_path / "a" / "vocab.txt").write_text("[UNK]")
    (tmp_path / "a" / "tokenizer.json").rename(tmp_path / "a" / "mine.json")
    load_tokenizer(tmp_path / "a" / "mine.json").save(tmp_path / "b")
    assert contents_of(tmp_path / "b") == given


def test_another_chat_template_replaces_those_files_alone(tmp_path: Path) -> None:
    given = filed(tmp_path / "a")
    load_tokenizer(tmp_path / "a").with_template(ChatTemplate({"default": "new"}, "x")).save(tmp_path / "b")
    kept = {name: content for name, content in given.items() if "chat_template" not in name}
    assert contents_of(tmp_path / "b") == kept | {"chat_template.jinja": b"new"}


def test_a_larger_tokenizer_is_written_anew_with_its_settings(tmp_path: Path) -> None:
    filed(tmp_path / "a")
    (tmp_path / "a" / "vocab.json").write_text("{}")
    load_tokenizer(tmp_path / "a").with_specials(["[MASK]"]).save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert (config["padding_side"], config["model_max_length"]) == ("left", 64)
    found = contents_of(tmp_path / "b")
    assert found["chat_template.jinja"] == FILED["chat_template.jinja"].replace("\r", "").encode() or found["chat_template.jinja"] == FILED["chat_template.jinja"].encode()
    assert "vocab.json" not in found
    assert load_tokenizer(tmp_path / "b").find("[MASK]") == load_tokenizer(tmp_path / "a").vocab_size


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    filed(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "a" / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="must stay in its folder"):
        load_tokenizer(tmp_path / "a")
