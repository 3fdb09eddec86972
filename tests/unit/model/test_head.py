import pytest
import torch
import torch.nn.functional as F

from txtrain.model.head import heads
from txtrain.model.head import loss as head_loss


def reference(x, weight, targets, denominator, softcap):
    logits = (x @ weight.T).float()
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / denominator


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_elements", [1, 97 * 5, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_loss_equals_the_whole_with_gradients(monkeypatch, softcap, chunk_elements, dtype):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", chunk_elements)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 16, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(97, 16, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, 97, (2, 9), generator=g)
    targets[0, 3:6] = -100
    denominator = torch.tensor(11.0)
    lm_head = heads.LMHead(16, 97, tied=True, softcap=softcap)
    got = lm_head.loss(x, weight, targets, denominator)
    expected = reference(x, weight, targets, denominator, softcap)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # the loss itself is float32
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(got * 3, (x, weight)), torch.autograd.grad(expected * 3, (x, weight)), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_a_frozen_side_gets_no_gradient_and_costs_none():
    x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(11, 8)
    loss = heads.LMHead(8, 11, tied=True, softcap=None).loss(x, weight, torch.tensor([[1, 2, 3, -100]]), torch.tensor(3.0))
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[0, 3].abs().max() == 0


def test_labels_are_shifted_by_one():
    assert head_loss.shifted(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]


def test_nothing_to_predict_gives_zero_not_nan():
    x, weight = torch.randn(1, 2, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = heads.LMHead(8, 11, tied=True, softcap=None).loss(x, weight, torch.full((1, 2), -100), torch.tensor(5.0))
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight)))


def test_autocast_computes_logits_in_bf16_and_the_loss_in_float32():
    x, weight = torch.randn(1, 6, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    targets = torch.randint(0, 31, (1, 6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = heads.LMHead(16, 31, tied=True, softcap=None).loss(x, weight, targets, torch.tensor(6.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(x, weight, targets, 6.0, None).item(), rel=2e-2)
    assert [g.dtype for g in torch.autograd.grad(loss, (x, weight))] == [torch.float32] * 2
