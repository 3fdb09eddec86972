"""Losses and gradients on random log-probabilities equal those of trl's own trainers, where trl is installed (1.16 was).

Two differences are trl's choice, and are worked out here. Masked out completions still count in its mean over sequences
(`mask_truncated` leaves them out of the denominator). Its CISPO bounds the weight from above alone, by an absolute
number, as the paper's runs do (2506.13585, section 3.1): clip_low=1 here.
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from txtrain.objectives.policy_gradient import Loss, Normalise, Ratio, advantages, count, k3, surrogate, token_weights

LONGEST = 6
LENGTHS = (6, 3, 1, 4, 0, 5)  # 0: a truncated completion, masked out
TRL_TYPE = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}


def given() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = len(LENGTHS), LONGEST
    log_p, old, reference = (-2 + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5 for _ in range(3))
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    return log_p.requires_grad_(), old, reference, torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64), mask


def trl_loss(trainer: Any, log_p: Tensor, mask: Tensor, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """The loss method of a trainer's class on these log-probabilities, without the trainer."""
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_p, torch.zeros_like(log_p.detach()), None),
        get_high_entropy_mask=None, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)), **settings,
    )
    blank = torch.zeros(mask.shape, dtype=torch.long)
    asked = {"prompt_ids": blank, "prompt_mask": blank, "completion_ids": blank, "completion_mask": mask.long()}
    found: Tensor = trainer._compute_loss(fake, None, asked | {"num_items_in_batch": mask.sum()} | inputs)
    return found


def ours(loss: Loss, ratio: Ratio, normalise: Normalise, beta: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    log_p, old, reference, advantage, mask = given()
    losses = surrogate(log_p, old, advantage, mask, loss=loss, ratio=ratio, clip_low=low, clip_high=high).losses
    losses = (losses + beta * k3(log_p, reference)).masked_fill(~mask, 0.0)
    value = (losses * token_weights(mask, normalise, LONGEST).double()).sum() / count(mask, normalise)
    value.backward()  # type: ignore[no-untyped-call]
    assert log_p.grad is not None
    return value.detach(), log_p.grad


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss", "ratio", "normalise", "high"),
    [
        *itertools.product(["grpo"], ["token"], ["sequence", "token", "constant"], [0.2, 0.28]),
        ("grpo", "sequence", "sequence", 0.2), ("cispo", "token", "token", 0.3),
    ],
)
def test_loss_and_gradient_equal_trl(loss: Loss, ratio: Ratio, normalise: Normalise, high: float, beta: float) -> None:
    trainer = pytest.importorskip("trl", reason="trl, the oracle, is not installed").GRPOTrainer
    low = 1.0 if loss == "cispo" else 0.2
    value, gradient = ours(loss, ratio, normalise, beta, low, high)
    log_p, old, reference, advantage, mask = given()
    theirs = trl_loss(
        trainer, log_p, mask, {"advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": reference},
        loss_type="cispo" if loss == "cispo" else TRL_TYPE[normalise], importance_sampling_level=ratio, beta=beta,
        epsilon_low=0.2, epsilon_high=1 + high if loss == "cispo" else high,
    )
    theirs.backward()  # type: ignore[no-untyped-call]
    assert log_p.grad is not None
    kept = 1.0 if normalise == "token" else sum(n > 0 for n in LENGTHS) / len(LENGTHS)
    assert float(theirs) == pytest.approx(kept * float(value), abs=1e-6)
    assert float((log_p.grad - kept * gradient).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-3


def test_rloo_equals_trl_where_the_weights_are_those_that_sampled() -> None:
    """There trl's ratio of whole sequences is 1; 2402.14740 sums over a completion: normalise=constant, times LONGEST."""
    trainer = pytest.importorskip("trl", reason="trl, the oracle, is not installed").RLOOTrainer
    _, gradient = ours("rloo", "token", "constant", 0.0, 0.2, 0.2)
    log_p, _, _, advantage, mask = given()
    old = (log_p.detach() * mask).sum(1)
    trl_loss(
        trainer, log_p, mask, {"advantages": advantage, "old_logps": old}, epsilon_low=0.2, epsilon_high=0.2
    ).backward()  # type: ignore[no-untyped-call]
    assert log_p.grad is not None
    kept = sum(n > 0 for n in LENGTHS) / len(LENGTHS)
    assert float((log_p.grad - LONGEST * kept * gradient).abs().max()) < 1e-6


def test_advantages_equal_trl() -> None:
    """Its formula stands within a long method; the deviation is its function."""
    nanstd = pytest.importorskip("trl.trainer.utils", reason="trl, the oracle, is not installed").nanstd
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    scaled = plain / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    assert float((advantages(rewards, "grpo", True) - scaled).abs().max()) < 1e-6
    assert float((advantages(rewards, "grpo", False) - plain).abs().max()) < 1e-6
    others = (rewards.sum(1, keepdim=True) - rewards) / 7
    assert float((advantages(rewards, "rloo", False) - (rewards - others)).abs().max()) < 1e-6
