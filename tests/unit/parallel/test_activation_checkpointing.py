"""A block is one graph: nothing in it goes back to Python when it is compiled. What selective checkpointing keeps."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

import txtrain
from tests.cases import some
from tests.distributed.equivalence import KINDS
from tests.distributed.runs import overrides
from tests.models import ids, seeded, shake, tiny
from txtrain.model.ffn.moe_config import MoEConfig
from txtrain.parallel import activation_checkpointing
from txtrain.parallel.activation_checkpointing import wrap_blocks

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


class Products(TorchDispatchMode):
    """Counts grouped products."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


def test_selective_keeps_the_products_of_experts():
    """As many as without checkpointing: forward once, and two for each in the backward. Gradients are equal."""
    found = {}
    for how in ("none", "selective", "full"):
        model = shake(seeded(tiny(dim=32, n_layers=2, ffn=MoEConfig(type="moe", n_experts=4, top_k=2))))
        wrap_blocks(model, how, compiled=False)
        with Products() as products:
            model(ids(2, 9), labels=ids(2, 9)).loss.backward()
        found[how] = products.n, [p.grad for p in model.parameters()]
    assert (found["none"][0], found["selective"][0], found["full"][0]) == (18, 18, 24)
    for one, other in zip(found["none"][1], found["selective"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("experts", [False, True])
def test_selective_keeps_the_products_of_compiled_blocks_too(experts, monkeypatch):
    """By the compiler's own choice of what is recomputed, without its code, which takes a minute."""
    whole(monkeypatch, backend="aot_eager_decomp_partition")
    ffn = {"ffn": MoEConfig(type="moe", n_experts=4, top_k=2)} if experts else {}
    found = {}
    for how in ("none", "selective", "full"):
        model = shake(seeded(tiny(dim=32, n_layers=2, **ffn)))
        wrap_blocks(model, how, compiled=True)
        torch.compiler.reset()
        model(ids(2, 9), labels=ids(2, 9)).loss.backward()  # traces
        model.zero_grad()
        with torch.profiler.profile() as products:
            model(ids(2, 9), labels=ids(2, 9)).loss.backward()
        counts = {e.key: e.count for e in products.key_averages()}
        names = ("aten::mm", "aten::addmm", "aten::bmm", "txtrain::grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu")
        found[how] = sum(counts.get(name, 0) for name in names), [p.grad for p in model.parameters()]
    assert found["none"][0] == found["selective"][0] < found["full"][0]
    for one, other in zip(found["none"][1], found["selective"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_selective_takes_compiled_blocks_whose_graph_breaks(monkeypatch):
    """As where FSDP gathers experts: they may be there when the block is computed again, and other operations run."""
    compile_, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    torch.compiler.reset()
    model = shake(seeded(tiny(dim=32, n_layers=1)))
    (block,) = model.blocks
    forward = block.ffn.forward

    @torch.compiler.disable
    def gathered(x):
        calls.append(x)
        return forward(x.clone() if len(calls) == 2 else x)

    block.ffn.forward = gathered
    wrap_blocks(model, "selective", compiled=True)
    model(ids(2, 9), labels=ids(2, 9)).loss.backward()
    assert len(calls) == 2


def test_selective_keeps_attention_over_documents_end_to_end():
    """The kernel is of GPUs in half precision alone; torch registers it when it is first chosen."""
    importlib.import_module("torch.nn.attention.varlen")
    assert activation_checkpointing._policy(None, torch.ops.torch_attn._varlen_attn.default) is CheckpointPolicy.MUST_SAVE
    assert activation_checkpointing._policy(None, torch.ops.aten.add.Tensor) is CheckpointPolicy.PREFER_RECOMPUTE
