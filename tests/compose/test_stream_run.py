"""A run on a streamed set: k steps, a stop and a resume are the uninterrupted run."""

import json
from pathlib import Path

import pytest

from tests.training import RUN, TINY, rows, weights
from txtrain.checkpoint import format as checkpoint
from txtrain.cli.main import main
from txtrain.data.sources import hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hub.load_dataset.cache_clear()  # both read a.jsonl


def test_a_resumed_stream_is_the_uninterrupted_one(capsys):
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"Row {i} of the set says {i * i}."}) + "\n" for i in range(600)))
    shape = [line for line in (*TINY, *RUN) if not line.startswith("data=")]
    line = [*shape, "data=hf", "data.path=a.jsonl", "data.streaming=true", "data.val_fraction=0.1", "scheduler=constant"]
    assert main([*line, "trainer.max_steps=10", "run_dir=whole"]) == 0
    assert main([*line, "trainer.max_steps=4", "run_dir=parts"]) == 0
    assert main([*line, "trainer.max_steps=10", "run_dir=parts"]) == 0
    assert [r for r in rows(Path("whole")) if r["step"] != "4"] == [r for r in rows(Path("parts")) if r["step"] != "4"]
    assert weights(Path("whole")) == weights(Path("parts"))
    assert main([*line, "trainer.max_steps=null", "trainer.max_epochs=1"]) == 2
    assert main([*line, "trainer.max_steps=12", "run_dir=parts", "data.stream_readers=4"]) == 2
    assert "`data.stream_readers` must be 8 to continue parts, but is 4 instead" in capsys.readouterr().err


def test_a_stream_of_version_0_1_0_goes_on_as_it_began():
    """Its configuration lacks the keys, and its position is a token, an epoch and a row."""
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text("".join(json.dumps({"text": f"Row {i:03d} says {i * i:06d}."}) + "\n" for i in range(20)))
    shape = [line for line in (*TINY, *RUN) if not line.startswith("data=")]
    line = [*shape, "data=hf", "data.path=a.jsonl", "data.streaming=true", "data.val_split=null", "data.val_path=b.jsonl"]
    line += ["data.stream_readers=1", "data.shuffle_buffer=0", "scheduler=constant"]
    assert main([*line, "trainer.max_steps=10", "run_dir=whole"]) == 0
    assert main([*line, "trainer.max_steps=4", "run_dir=parts"]) == 0
    newest = Path("parts/checkpoints/step_00000004")
    token = 4 * 8 * 31 // 22 * 22  # each row has 20 bytes, a begin and an end
    for folder in (Path("parts"), newest):
        saved = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(saved.replace("  stream_readers: 1\n", "").replace("  shuffle_buffer: 0\n", ""))
    state = json.loads((newest / "state.json").read_text())
    assert state["stream_position"][0] == token
    (newest / "state.json").write_text(json.dumps(state | {"stream_position": [token, token // 22 // 20, token // 22 % 20]}))
    (newest / "complete").write_text(json.dumps(checkpoint.marker_of(newest)))
    assert main(["resume=parts", "trainer.max_steps=10"]) == 0
    assert [r for r in rows(Path("whole")) if r["step"] != "4"] == [r for r in rows(Path("parts")) if r["step"] != "4"]
    assert weights(Path("whole")) == weights(Path("parts"))
