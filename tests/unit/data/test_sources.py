import socket
import time
from pathlib import Path

import pytest

import txtrain
from tests.unit.data.conftest import SHARED
from txtrain.data.sources import hub
from txtrain.data.sources.hub_text import HubDataset
from txtrain.data.sources.python_docs import PythonDocs
from txtrain.data.sources.source import build_source, settle
from txtrain.data.sources.text import TextFiles
from txtrain.data.sources.wikitext import WikiText, articles
from txtrain.errors import ConfigError

# ------------------------------------------------------------------------------------------------------------------ data=text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md"):
        (root / name).write_text(f"text of {name}\n")
    (root / "empty.txt").write_text("")
    return root


def test_a_folder_gives_all_its_txt_sorted(folder: Path) -> None:
    assert list(TextFiles(str(folder)).documents("train")) == [f"text of {name}\n" for name in ("a.txt", "b.txt", "deep/c.txt")]


def test_globs_files_and_lists_count_a_file_once(folder: Path) -> None:
    files = TextFiles((str(folder / "*.md"), str(folder / "b.txt"), str(folder / "**" / "*.txt")))
    assert [p.name for p in files.files["train"]] == ["notes.md", "b.txt", "a.txt", "c.txt"]


def test_identity_follows_contents_and_not_times(folder: Path) -> None:
    before = TextFiles(str(folder)).identity()
    (folder / "a.txt").touch()
    assert TextFiles(str(folder)).identity() == before
    (folder / "a.txt").write_text("text of A.txt\n")
    assert TextFiles(str(folder)).identity() != before


def problem(folder: Path, path: str | tuple[str, ...], val_path: str | None = None) -> str:
    with pytest.raises(ConfigError) as e:
        list(TextFiles(path, val_path).documents("train"))
    assert len(e.value.problems) == 1
    return str(e.value)


def test_mistakes_in_paths_are_told_with_the_remedy(folder: Path) -> None:
    assert "Did you mean" in problem(folder, str(folder / "b.tx"))
    assert "data.path" in problem(folder, "/nowhere/at/all")
    assert "a.txt" in problem(folder, str(folder), str(folder / "a.txt"))
    assert "empty" in problem(folder, str(folder / "empty.txt"))
    assert "matches none" in problem(folder, str(folder / "*.csv"))
    (folder / "bare").mkdir()
    assert ".txt" in problem(folder, str(folder / "bare"))


@pytest.mark.parametrize(("raw", "told"), [(b"abc\xff\xfe", "0xff at offset 3"), (b"ab\0cd", "0x00 at offset 2")])
def test_a_binary_file_is_refused_with_the_byte(folder: Path, raw: bytes, told: str) -> None:
    (folder / "x.txt").write_bytes(raw)
    message = problem(folder, str(folder / "x.txt"))
    assert told in message
    assert "x.txt" in message


def test_byte_order_mark_and_windows_lines_are_read_as_text(folder: Path) -> None:
    (folder / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(TextFiles(str(folder / "w.txt")).documents("train")) == ["one\ntwo\n"]


# -------------------------------------------------------------------------------------------------------------- data=wikitext


def test_articles_begin_at_titles_and_not_at_sections() -> None:
    lines = [" \n", " = First = \n", " text = here = \n", " = = Section = = \n", " = Second = \n", " text\n"]
    assert list(articles(lines)) == ["".join(lines[:4]), "".join(lines[4:])]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside the checkout")
def test_wikitext_2_validation_has_its_60_articles() -> None:
    path = SHARED / "lm" / "wikitext-2" / "valid.txt"
    documents = list(WikiText(str(path), None, "wikitext-2-raw-v1").documents("train"))
    assert len(documents) == 60
    assert "".join(documents) == path.read_text()


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_a_small_run_trains_on_python_docs_and_says_so(make_config) -> None:
    config, reason = settle(make_config("wikitext", {"seq_len": 24}, name="gpt2-wikitext"))
    assert config.data.type == "python_docs"
    assert (config.data.seq_len, config.data.tokenizer) == (24, "bytes")
    assert config.name == "gpt2-wikitext-fallback"
    assert "127.0.0.1:9" in reason
    assert settle(config) == (config, None)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("given", "environment", "why"),
    [
        ({"data": {"offline_fallback": "never"}}, {}, "never"),
        ({"size": "gpt2_xl"}, {}, "gpt2_xl"),
        ({"trainer": {"accelerator": "gpu"}}, {}, "GPU"),
        ({"trainer": {"devices": 2}}, {}, "several processes"),
        ({}, {"WORLD_SIZE": "2"}, "several processes"),
        ({}, {"SLURM_JOB_ID": "7"}, "SLURM"),
    ],
)
def test_nothing_larger_falls_back(make_config, monkeypatch, given, environment, why) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=why) as e:
        settle(make_config("wikitext", **given))
    assert "data=python_docs" in str(e.value)
    assert "data.path=" in str(e.value)


@pytest.mark.usefixtures("no_hub")
def test_a_cached_wikitext_is_read_without_a_hub(make_config, tmp_path: Path) -> None:
    make_hub_cache(tmp_path / "hf" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / "abc123")
    config = make_config("wikitext", {"name": "wikitext-2-raw-v1"})
    assert settle(config) == (config, None)
    source = build_source(config)
    assert list(source.documents("train")) == [" = Title = \n\n the train text\n"]
    assert list(source.documents("validation")) == [" = Title = \n\n the validation text\n"]
    assert hub.why_unreachable.cache_info().misses == 0, "the hub was asked although the cache has the set"


def make_hub_cache(folder: Path) -> None:
    """What `load_dataset` leaves behind after a download."""
    import datasets

    folder.mkdir(parents=True)
    splits = datasets.SplitDict()
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_dict({"text": [" = Title = \n", "", f" the {split} text\n"]})
        with datasets.arrow_writer.ArrowWriter(path=str(folder / f"wikitext-{split}.arrow"), features=rows.features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        splits.add(datasets.SplitInfo(name=split, num_examples=3, dataset_name="wikitext"))
    info = datasets.DatasetInfo(features=rows.features, splits=splits, builder_name="parquet", dataset_name="wikitext", config_name="wikitext-2-raw-v1")
    info.version = datasets.Version("0.0.0")
    info.write_to_directory(str(folder))


def test_a_hub_that_never_answers_costs_little_and_once(monkeypatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "_PATIENCE", 0.5)
        hub.why_unreachable.cache_clear()
        began = time.monotonic()
        assert hub.why_unreachable()
        assert hub.why_unreachable()
    hub.why_unreachable.cache_clear()
    seconds = time.monotonic() - began
    assert seconds < 1.2, f"two questions took {seconds:.1f} s with a patience of 0.5 s"


def test_the_patience_is_within_the_promise() -> None:
    assert hub._PATIENCE < 15


# -------------------------------------------------------------------------------------------------------------------- data=hf


@pytest.fixture
def rows(tmp_path: Path, monkeypatch) -> Path:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hub.load_dataset.cache_clear()
    folder = tmp_path / "set"
    folder.mkdir()
    for split, n in (("train", 30), ("validation", 5)):
        (folder / f"{split}.jsonl").write_text("".join(f'{{"text": "{split} row {i}", "n": {i}}}\n' for i in range(n)))
    return folder


def load(folder: Path, split: str = "train", val_split: str | None = None, text_column: str = "text") -> HubDataset:
    return HubDataset(str(folder), None, split, val_split, None, text_column)


def test_a_local_folder_of_jsonl_gives_its_rows_and_its_validation(rows: Path) -> None:
    source = load(rows)
    assert source.has_validation
    assert list(source.documents("train")) == [f"train row {i}" for i in range(30)]
    assert list(source.documents("validation")) == [f"validation row {i}" for i in range(5)]


def test_a_single_file_is_a_set_too(rows: Path) -> None:
    source = load(rows / "train.jsonl")
    assert not source.has_validation
    assert len(list(source.documents("train"))) == 30


def test_identity_follows_rows_and_split(rows: Path) -> None:
    before = load(rows, "train[:20]", "validation").identity()
    hub.load_dataset.cache_clear()
    assert load(rows, "train[:20]", "validation").identity() == before
    assert load(rows, "train[:21]", "validation").identity() != before
    with (rows / "train.jsonl").open("a") as f:
        f.write('{"text": "one more", "n": 1}\n')
    hub.load_dataset.cache_clear()
    assert load(rows, "train[:20]", "validation").identity() != before


def test_a_malformed_file_and_a_loaders_name_are_the_users_mistake(rows: Path) -> None:
    (rows / "train.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(ConfigError, match="train"):
        load(rows)
    with pytest.raises(ConfigError, match="loader"):
        HubDataset("json", None, "train", None, None, "text")


def test_slices_of_one_split_may_not_overlap(rows: Path) -> None:
    source = load(rows, "train[:80%]", "train[80%:]")
    assert len(list(source.documents("train"))) == 24
    assert len(list(source.documents("validation"))) == 6
    with pytest.raises(ConfigError, match="rows 20 to 23 of train"):
        load(rows, "train[:80%]", "train[20:]")


def test_wrong_column_split_and_path_name_what_there_is(rows: Path) -> None:
    with pytest.raises(ConfigError, match=r"text, n.*Did you mean text\?"):
        load(rows, text_column="txt")
    with pytest.raises(ConfigError, match="int64"):
        load(rows, text_column="n")
    with pytest.raises(ConfigError, match="trian"):
        load(rows, "trian")


@pytest.mark.usefixtures("no_hub")
def test_an_unknown_set_without_a_hub_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"no-such/set .* is unavailable.*127.0.0.1:9"):
        HubDataset("no-such/set", None, "train", None, None, "text")


# ----------------------------------------------------------------------------------------------------------- data=python_docs


@pytest.mark.slow
def test_python_docs_are_megabytes_of_text_and_the_same_twice() -> None:
    documents = list(PythonDocs().documents("train"))
    size = sum(map(len, documents))
    assert size > 2e6, f"{size / 1e6:.1f} MB"
    assert documents == list(PythonDocs().documents("train"))
    assert any("JSON" in d and "def dumps(" in d for d in documents)


# ------------------------------------------------------------------------------------------------------------ the user's own


@pytest.mark.usefixtures("own_axis")
def test_constructor_parameters_come_from_the_data_group_the_run_and_the_model(make_config) -> None:
    @txtrain.component("data", "mine")
    class Mine:
        def __init__(self, vocab_size: int, seq_len: int, seed: int, repeats: int = 3) -> None:
            self.got = (vocab_size, seq_len, seed, repeats)

        def documents(self, split):
            yield "a"

    assert build_source(make_config("mine", {"seq_len": None, "repeats": 5}, seed=9)).got == (512, 48, 9, 5)


@pytest.mark.usefixtures("own_axis")
def test_a_source_that_cannot_be_used_says_what_is_missing(make_config) -> None:
    @txtrain.component("data", "no_texts")
    class NoTexts:
        def __init__(self, n: int = 1) -> None: ...

    @txtrain.component("data", "no_default")
    class NoDefault:
        def __init__(self, colour) -> None: ...

    with pytest.raises(ConfigError, match=r"documents\(split\), pairs\(split\), problems\(split\), images\(split\), samples\(split\)"):
        build_source(make_config("no_texts"))
    with pytest.raises(ConfigError, match="'colour'"):
        build_source(make_config("no_default"))
