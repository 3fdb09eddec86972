"""A block is one graph: nothing in it goes back to Python when it is compiled."""

import pytest
import torch

import txtrain
from tests.cases import some
from tests.distributed.equivalence import KINDS
from tests.distributed.runs import overrides

HALF = "trainer.precision=bf16-mixed"


def whole(monkeypatch, **how):
    """From here on a graph that breaks is an error; how many blocks were compiled."""
    compile_, seen = torch.compile, []

    def compiled(function, **named):
        seen.append(function)
        return compile_(function, **{"fullgraph": True} | how | named)

    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    return seen


@pytest.mark.parametrize("kind", some(KINDS, ("experts",)))
def test_a_blocks_graph_is_whole(kind, tmp_path, monkeypatch):
    """Forward and backward, training and validation; traced, not compiled, which takes a minute and finds nothing more."""
    blocks = whole(monkeypatch, backend="eager")
    more = ["trainer.compile=true", "trainer.fast_dev_run=1"]
    result = txtrain.train(txtrain.compose(overrides(tmp_path, KINDS[kind], "run", *more)))
    assert result.metrics["loss"] > 0
    assert len(blocks) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_graph_is_whole_on_a_gpu(kind, recompute, tmp_path, monkeypatch):
    """Where masks are declared to flex attention, and documents are laid end to end."""
    given = [o for o in overrides(tmp_path, KINDS[kind], "run") if not o.startswith("trainer.accelerator=")]
    run = [*given, "trainer.accelerator=gpu", HALF, f"trainer.activation_checkpointing={recompute}", "trainer.max_steps=3"]
    plain = txtrain.train(txtrain.compose([*(o for o in run if "run_dir=" not in o), f"run_dir={tmp_path / 'plain'}"]))
    blocks = whole(monkeypatch)
    compiled = txtrain.train(txtrain.compose([*run, "trainer.compile=true"]))
    assert len(blocks) >= 2
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=2e-2)
