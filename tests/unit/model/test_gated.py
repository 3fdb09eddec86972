"""act(gate) * up as one node equals the formula to the last digit."""

import pytest
import torch

from txtrain.model.ffn import gated as module
from txtrain.model.ffn.dense import ACTIVATIONS
from txtrain.model.ffn.gated import gated


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_order", [True, False])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, name, dtype, in_order):
    monkeypatch.setattr(module, "CACHED_ELEMENTS", 64)  # several parts
    g = torch.Generator().manual_seed(0)
    gate, up, weight = (torch.randn(3, 8, 16, generator=g).to(dtype) for _ in range(3))
    gate = gate if in_order else gate.transpose(0, 1).contiguous().transpose(0, 1)
    act = ACTIVATIONS[name]
    found = []
    for compute in (gated, lambda act, gate, up: act(gate) * up):
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        y = compute(act, *leaves)
        found.append((y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


def test_it_keeps_two_tensors_and_the_formula_three():
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        gated(ACTIVATIONS["silu"], *(torch.randn(4, 8, requires_grad=True) for _ in range(2)))
    assert sizes == [32, 32]


def test_a_frozen_side_gets_no_gradient():
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    gated(ACTIVATIONS["silu"], gate, up).sum().backward()
    assert gate.grad is not None
    assert up.grad is None
