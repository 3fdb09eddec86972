"""RMS norm as one node equals torch's to the last digit."""

import pytest
import torch
import torch.nn.functional as F

from txtrain.model.norm import fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 48), (2, 5, 3, 16), (6, 33)])
def test_values_and_gradients_are_torchs(monkeypatch, shape, weighted, dtype):
    monkeypatch.setattr(fused, "CACHED_ELEMENTS", 100)  # several parts
    g = torch.Generator().manual_seed(0)
    x, given = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=g).to(dtype)
    found = []
    for compute in (fused.rms_norm, F.rms_norm):
        leaves = [y.clone().requires_grad_() for y in ((x, weight) if weighted else (x,))]
        y = compute(leaves[0], shape[-1:], leaves[1] if weighted else None, 1e-5)
        found.append((y.detach(), *torch.autograd.grad((y * given).sum(), leaves)))
    for ours, torchs in zip(*found, strict=True):
        assert torch.equal(ours, torchs), float((ours - torchs).abs().max())


def test_heads_that_lie_apart_keep_their_layout():
    x = torch.randn(2, 5, 3, 16).transpose(1, 2).requires_grad_()
    y = fused.rms_norm(x, (16,), torch.ones(16), 1e-5)
    assert y.stride() == x.stride()
    assert torch.equal(y, F.rms_norm(x, (16,), torch.ones(16), 1e-5))


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(8)
    fused.rms_norm(x, (8,), weight, 1e-5).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_so_are_gradients_where_the_input_is_added_to_what_is_made_of_the_norm():
    """Floating sums depend on their order: that of the input's gradient is torch's."""
    g = torch.Generator().manual_seed(1)
    x, w, matrix, given = (torch.randn(*shape, generator=g) for shape in ((4, 31, 32), (32,), (32, 32), (4, 31, 32)))
    found = []
    for compute in (fused.rms_norm, F.rms_norm):
        leaf = x.clone().requires_grad_()
        stream = leaf * 1
        y = stream + compute(stream, (32,), w, 1e-5) @ matrix
        (y + compute(y, (32,), w, 1e-5) @ matrix).backward(given)
        found.append(leaf.grad)
    assert torch.equal(*found)
