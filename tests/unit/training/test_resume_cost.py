"""What a resumed run does not do twice: of 2,000 layers each costs as long as a start."""

import pytest

from tests.training import tiny
from txtrain.checkpoint import reader
from txtrain.training.run import train


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_resumed_run_reads_its_headers_once_and_initialises_nothing(tmp_path, monkeypatch, strategy):
    given = (f"run_dir={tmp_path / 'run'}", "trainer.limit_val_batches=0", f"strategy={strategy}")
    train(tiny(tmp_path, *given, "trainer.max_steps=1"))

    def initialised(*_):
        raise AssertionError("a weight that is read was initialised first")

    monkeypatch.setattr("txtrain.model.init.Initialiser.__init__", initialised)
    parsed, real = [], reader.SafetensorsFile
    monkeypatch.setattr(reader, "SafetensorsFile", lambda path: parsed.append(path.name) or real(path))
    assert train(tiny(tmp_path, *given, "trainer.max_steps=2")).status == "complete"
    assert len(parsed) == len(set(parsed)) == 1
