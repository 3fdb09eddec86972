"""Losses, gradients and advantages equal those of trl's own trainers, where trl is installed (1.16 was).

Two differences are trl's choice, and are worked out here. Masked out completions still count in its mean over sequences
(`mask_truncated` leaves them out of the denominator). Its CISPO bounds the weight from above alone, by an absolute
number, as the paper's runs do (2506.13585, section 3.1): clip_low=1 here.
"""

import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from txtrain.objectives.policy_gradient import Loss, Normalise, Ratio, advantages, count, k3, surrogate, token_weights

LONGEST = 6
LENGTHS = (6, 3, 1, 4, 0, 5)  # 0: a truncated completion, masked out
NORMALISED: dict[str, Normalise] = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant", "cispo": "token"}


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
    ("kind", "ratio", "high"),
    [*((kind, "token", high) for kind in ("grpo", "bnpo", "dapo", "dr_grpo") for high in (0.2, 0.28)), ("grpo", "sequence", 0.2), ("cispo", "token", 0.3)],
)
def test_loss_and_gradient_equal_trl(kind: str, ratio: Ratio, high: float, beta: float) -> None:
    """kind: trl's `loss_type`. Its bnpo divides by the tokens of one micro-batch, dapo by those of all: here they are one."""
    trainer = pytest.importorskip("trl", reason="trl, the oracle, is not installed").GRPOTrainer
    loss: Loss = "cispo" if kind == "cispo" else "grpo"
    low, normalise = 1.0 if loss == "cispo" else 0.2, NORMALISED[kind]
    value, gradient = ours(loss, ratio, normalise, beta, low, high)
    log_p, old, reference, advantage, mask = given()
    theirs = trl_loss(
        trainer, log_p, mask, {"advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": reference},
        loss_type=kind, importance_sampling_level=ratio, beta=beta,
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


def trl_advantages(trainer: Any, begin: str, rewards: Tensor, **settings: Any) -> Tensor:
    """Of rewards [P, G] by the trainer's own lines, which stand within a long method: from the one that begins so to the sharding."""
    lines = inspect.getsource(trainer._generate_and_score_completions).splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip().startswith(begin))
    last = next(i for i, line in enumerate(lines) if i > first and "process_slice = " in line)
    names = vars(inspect.getmodule(trainer)) | {
        "self": SimpleNamespace(reward_weights=torch.ones(1), multi_objective_aggregation="sum_then_normalize", **settings),
        "rewards_per_func": rewards.flatten()[:, None], "rewards": rewards.flatten(), "num_generations": rewards.shape[1],
        "unscorable_mask": torch.zeros(rewards.numel(), dtype=torch.bool), "device": rewards.device,
    }
    exec(textwrap.dedent("\n".join(lines[first:last])), names)
    found: Tensor = names["advantages"]
    return found.view_as(rewards)


@pytest.mark.parametrize(("loss", "divided"), [("grpo", True), ("grpo", False), ("rloo", False)])
def test_advantages_equal_trl(loss: Loss, divided: bool) -> None:
    trl = pytest.importorskip("trl", reason="trl, the oracle, is not installed")
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[2] = 0.5  # a group without signal
    if loss == "rloo":
        theirs = trl_advantages(trl.RLOOTrainer, "grouped_rewards = ", rewards, normalize_advantages=False)
    else:
        theirs = trl_advantages(trl.GRPOTrainer, "if self.multi_objective", rewards, scale_rewards="group" if divided else "none")
    assert float((advantages(rewards, loss, divided) - theirs).abs().max()) < 1e-6
    assert float(theirs.abs().max()) > 1
    assert not theirs[2].any()
