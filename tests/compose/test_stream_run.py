"""A run on a streamed set: k steps, a stop and a resume are the uninterrupted run."""

import json
from pathlib import Path

from tests.training import RUN, TINY, rows, weights
from txtrain.cli.main import main


def test_a_resumed_stream_is_the_uninterrupted_one(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"Row {i} of the set says {i * i}."}) + "\n" for i in range(600)))
    shape = [line for line in (*TINY, *RUN) if not line.startswith("data=")]
    line = [*shape, "data=hf", "data.path=a.jsonl", "data.streaming=true", "data.val_fraction=0.1", "scheduler=constant"]
    assert main([*line, "trainer.max_steps=10", "run_dir=whole"]) == 0
    assert main([*line, "trainer.max_steps=4", "run_dir=parts"]) == 0
    assert main([*line, "trainer.max_steps=10", "run_dir=parts"]) == 0
    assert [r for r in rows(Path("whole")) if r["step"] != "4"] == [r for r in rows(Path("parts")) if r["step"] != "4"]
    assert weights(Path("whole")) == weights(Path("parts"))
    assert main([*line, "trainer.max_steps=null", "trainer.max_epochs=1"]) == 2
