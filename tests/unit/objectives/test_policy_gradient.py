"""Advantages and surrogate losses equal formulas worked by hand, token by token, values and gradients."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from txtrain.objectives.policy_gradient import advantages, count, k3, surrogate, token_weights

LENGTHS = (5, 3, 1, 0)  # tokens of each row; the rest is padding, whose values must not matter
LOW, HIGH = 0.2, 0.3


def given() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    log_p, old, reference = (-2 + torch.randn(4, 6, generator=generator, dtype=torch.float64) * 0.4 for _ in range(3))
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    return log_p.requires_grad_(), old, reference, torch.tensor([1.3, -0.7, 0.9, 2.0], dtype=torch.float64), mask


def by_hand(loss: str, ratio: str, normalise: str, beta: float) -> tuple[float, Tensor]:
    """Value and gradient, in plain Python."""
    log_p, old, reference, advantage, _ = (tensor.detach() for tensor in given())
    n_rows, n_tokens = sum(n > 0 for n in LENGTHS), sum(LENGTHS)
    value, gradient = 0.0, torch.zeros(4, 6, dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        a = float(advantage[i])
        mean = sum(float(log_p[i, t] - old[i, t]) for t in range(n)) / max(n, 1)
        for t in range(n):
            p, o, f = float(log_p[i, t]), float(old[i, t]), float(reference[i, t])
            weight = {"sequence": 1 / n / n_rows, "token": 1 / n_tokens, "constant": 1 / 6 / n_rows}[normalise]
            r = math.exp(mean if ratio == "sequence" else p - o)
            bounded = min(max(r, 1 - LOW), 1 + HIGH)
            if loss == "cispo":
                value += weight * -bounded * a * p
                gradient[i, t] += weight * -bounded * a
            elif loss == "grpo":
                value += weight * -min(r * a, bounded * a)
                slope = 0.0 if bounded * a < r * a else -r * a
                if ratio == "token":
                    gradient[i, t] += weight * slope
                else:  # each token's ratio is that of all
                    gradient[i, :n] += weight * slope / n
            else:
                value += weight * -a * p
                gradient[i, t] += weight * -a
            value += weight * beta * (math.exp(f - p) - (f - p) - 1)
            gradient[i, t] += weight * beta * (1 - math.exp(f - p))
    return value, gradient


@pytest.mark.parametrize(
    ("loss", "ratio", "normalise", "beta"),
    [*itertools.product(("grpo", "cispo", "reinforce", "rloo"), ("token", "sequence"), ("sequence", "token", "constant"), (0, 0.3))],
)
def test_value_and_gradient_equal_the_formula(loss: str, ratio: str, normalise: str, beta: float) -> None:
    log_p, old, reference, advantage, mask = given()
    losses = surrogate(log_p, old, advantage, mask, loss=loss, ratio=ratio, clip_low=LOW, clip_high=HIGH).losses  # type: ignore[arg-type]
    losses = (losses + beta * k3(log_p, reference)).masked_fill(~mask, 0.0)
    value = (losses * token_weights(mask, normalise, 6).double()).sum() / count(mask, normalise)  # type: ignore[arg-type]
    value.backward()  # type: ignore[no-untyped-call]
    wanted, gradient = by_hand(loss, ratio, normalise, beta)
    assert log_p.grad is not None
    assert float(value) == pytest.approx(wanted, abs=1e-6)
    assert float((log_p.grad - gradient).abs().max()) < 1e-6


def test_the_ratio_is_clipped_where_that_is_worse_for_the_objective() -> None:
    log_r = torch.tensor([[0.5, -0.5, 0.1]]).expand(2, 3)
    mask, advantage = torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.0, -1.0])
    found = surrogate(log_r, torch.zeros(2, 3), advantage, mask, loss="grpo", ratio="token", clip_low=LOW, clip_high=HIGH)
    assert found.clipped.tolist() == [[True, False, False], [False, True, False]]
    assert found.deviations[0].tolist() == pytest.approx([math.exp(0.5) - 1, 1 - math.exp(-0.5), math.exp(0.1) - 1])


def test_advantages_equal_the_formula() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    mean, std = 0.625, math.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 3)
    assert torch.allclose(advantages(rewards, "grpo", False)[0], rewards[0] - mean)
    assert torch.allclose(advantages(rewards, "cispo", True)[0], (rewards[0] - mean) / (std + 1e-4))
    assert advantages(rewards, "grpo", True)[1].tolist() == [0, 0, 0, 0]  # a group without signal
    others = [r - (2.5 - r) / 3 for r in (1.0, 0.0, 0.5, 1.0)]
    assert torch.allclose(advantages(rewards, "rloo", False)[0], torch.tensor(others, dtype=torch.float64))
    assert torch.equal(advantages(rewards, "reinforce", False), rewards)


def test_k3_is_unbiased_and_never_negative() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    each = k3(p.log(), q.log())
    assert bool((each >= 0).all())
    assert float((p * each).sum()) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
