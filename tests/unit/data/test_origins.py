"""No validation row is a training row, whatever the source."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from txtrain.data.sources import hub
from txtrain.data.sources.source import build_source
from txtrain.errors import ConfigError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROW = {
    "text": "a text", "label": "a", "question": "1+1", "answer": "2", "messages": TURNS, "prompt": "Hi", "chosen": "Hello",
    "rejected": "No", "translation": {"de": "eins", "en": "one"}, "image": [[0, 1], [2, 3]],
}
OF_FILES = ["text", "chat", "preferences", "labels", "problems"]
OF_SETS = ["hf", "hf stream", "chat", "preferences", "labels", "translation", "images"]


@pytest.fixture(autouse=True)
def written(tmp_path: Path, monkeypatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hub.load_dataset.cache_clear()
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 30), ("b", 10), ("c", 5)):
        Path("set").mkdir(exist_ok=True)
        Path(f"set/{name}.jsonl").write_text("".join(json.dumps(ROW | {"text": f"{name} {i}", "label": i % 2}) + "\n" for i in range(n)))
    local = lambda path, name, split: hub.load_dataset("set/a.jsonl", name, split)  # noqa: E731
    monkeypatch.setattr("txtrain.data.sources.chat.load_dataset", local)
    monkeypatch.setattr("txtrain.data.sources.labels.load_dataset", local)


@pytest.fixture
def source(make_config):
    def make(kind: str, path, val_path=None, **keys):
        if kind == "images":
            pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
        kind, *stream = kind.split()
        keys |= {"streaming": True} if stream else {}
        keys |= {"columns": ("de", "en")} if kind == "translation" else {}
        keys |= {"seq_len": None} if kind == "images" else {}
        return build_source(make_config(kind, {"path": path, "val_path": val_path, **keys}))

    return make


@pytest.mark.parametrize("kind", OF_FILES)
def test_a_file_is_in_one_split_alone(kind, source):
    os.symlink("b.jsonl", "set/link.jsonl")
    several = "set/a.jsonl", "set/b.jsonl"
    for path, val_path in ((several, "set/b.jsonl"), ("set", several), ("set/b.jsonl", "set"), (several, "set/link.jsonl")):
        with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path, but both name \S+\.jsonl"):
            source(kind, path, val_path)
    assert source(kind, several, "set/c.jsonl").has_validation


@pytest.mark.parametrize("kind", ["chat", "labels"])
def test_a_copy_of_the_training_file_is_no_validation(kind, source):
    shutil.copy("set/b.jsonl", "copy.jsonl")
    with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path, but \S+copy\.jsonl has its contents"):
        source(kind, "set/b.jsonl", "copy.jsonl")


@pytest.mark.parametrize("kind", OF_SETS)
def test_slices_of_a_set_share_no_rows(kind, source):
    path = "somebody/set" if kind in ("chat", "preferences", "labels") else "set/a.jsonl"
    same = r"`data\.val_(path|split)` must not be data\.(path|split), but both are train of"
    with pytest.raises(ConfigError, match=same):
        source(kind, path, path)
    with pytest.raises(ConfigError, match=same):
        source(kind, path, val_split="train")
    if "stream" in kind:
        return
    with pytest.raises(ConfigError, match=r"`data\.val_split` must not overlap data\.split, but train\[:10%\] and train\[1:\] share rows 1 to 2 of train"):
        source(kind, path, split="train[1:]", val_split="train[:10%]")
    assert source(kind, path, split="train[10%:]", val_split="train[:10%]").has_validation


@pytest.mark.parametrize("kind", ["hf", "hf stream"])
def test_a_file_of_the_sets_folder_is_no_validation(kind, source):
    for path, val_path in (("set", "set/b.jsonl"), ("set/b.jsonl", "set")):
        with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path, but both name \S*set/b\.jsonl"):
            source(kind, path, val_path)
    shutil.move("set/b.jsonl", "set/validation.jsonl")
    assert source(kind, "set", "set/validation.jsonl").has_validation


def test_validation_rows_that_all_splits_hold_are_training_rows(source):
    shutil.move("set/b.jsonl", "set/validation.jsonl")
    assert not source("hf", "set", split="all").has_validation
    with pytest.raises(ConfigError, match="share rows 0 to 9 of validation"):
        source("hf", "set", split="all", val_split="validation")


def test_images_and_pairs_of_files_are_in_one_split_alone(source):
    pixels, labels = np.zeros((4, 2, 2), np.uint8), np.arange(4)
    np.savez("all.npz", x=pixels, y=labels)
    np.savez("others.npz", x=pixels, y=labels)
    for name in ("one", "two"):
        Path(f"{name}.txt").write_text(f"{name}\n")
    with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path, but both name \S*all\.npz"):
        source("images", "all.npz", "all.npz")
    assert source("images", "all.npz", "others.npz").has_validation
    with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path, but both name \S+one\.txt"):
        source("translation", "one.txt", "two.txt", target_path="two.txt", val_target_path="one.txt")
