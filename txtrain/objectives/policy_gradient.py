"""Policy gradients on groups of completions, as functions of tensors: advantages, surrogate losses, KL, normalisation.

GRPO is of DeepSeekMath (2402.03300, section 4.1) and DeepSeek-R1 (2501.12948). On what implementations differ:
normalisation per token of the batch and a higher upper clip: DAPO (2503.14476); by a constant, without the deviation:
Dr. GRPO (2503.20783); the ratio of whole sequences: GSPO (2507.18071); a clipped weight: CISPO (2506.13585, equation
4); REINFORCE (Williams 1992) and RLOO (2402.14740, equation 5): baselines.
"""

# P prompts, G completions of each, B rows, T positions

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Loss = Literal["grpo", "cispo", "reinforce", "rloo"]
Ratio = Literal["token", "sequence"]
Normalise = Literal["sequence", "token", "constant"]

_EPSILON = 1e-4  # added to the deviation, as in trl; a group of equal rewards has advantages of 0 all the same


def advantages(rewards_PG: Tensor, loss: Loss, divide_by_std: bool) -> Tensor:
    """[P, G]. The baseline is the group's mean; of rloo the mean of the others; reinforce has none.

    divide_by_std: by the group's deviation (of a sample, with G - 1).
    """
    n = rewards_PG.shape[1]
    if loss == "reinforce":
        found_PG = rewards_PG
    else:
        found_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
        if loss == "rloo":
            found_PG = found_PG * n / (n - 1)
    return found_PG / (rewards_PG.std(1, keepdim=True) + _EPSILON) if divide_by_std else found_PG


class Surrogate(NamedTuple):
    """[B, T] each, of meaning where the mask is set. losses: to be minimised. deviations: |ratio - 1|."""

    losses: Tensor
    deviations: Tensor
    clipped: Tensor


def surrogate(
    log_p_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor, *, loss: Loss, ratio: Ratio,
    clip_low: float, clip_high: float,
) -> Surrogate:
    """Each token's loss.

    grpo: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). cispo: -clip(r) A log p, without a gradient through r.
    reinforce, rloo: -A log p, for completions of the weights that are trained.

    ratio: r of each token, p / old p; or of the sequence, its geometric mean over the tokens.
    """
    advantages_B1 = advantages_B[:, None]
    log_r_BT = (log_p_BT - old_BT).masked_fill(~mask_BT, 0.0)
    if ratio == "sequence":
        log_r_BT = (log_r_BT.sum(1) / mask_BT.sum(1).clamp(min=1))[:, None].expand_as(log_r_BT)
    r_BT = log_r_BT.exp()
    deviations_BT = (r_BT - 1).abs().detach()
    if loss in ("reinforce", "rloo"):
        return Surrogate(-advantages_B1 * log_p_BT, deviations_BT, torch.zeros_like(mask_BT))
    clipped_BT = r_BT.clamp(1 - clip_low, 1 + clip_high)
    if loss == "cispo":
        return Surrogate(-clipped_BT.detach() * advantages_B1 * log_p_BT, deviations_BT, clipped_BT != r_BT)
    plain_BT, bounded_BT = r_BT * advantages_B1, clipped_BT * advantages_B1
    return Surrogate(-torch.minimum(plain_BT, bounded_BT), deviations_BT, bounded_BT < plain_BT)


def k1(log_p: Tensor, reference: Tensor) -> Tensor:
    """The plain estimate of KL(p || reference), for a reward: there its value alone weighs grad log p, and of the
    unbiased estimates this one makes that the gradient of the KL; k3 makes it KL(p || r)'s less KL(r || p)'s."""
    return log_p - reference


def k3(log_p: Tensor, reference: Tensor) -> Tensor:
    """An unbiased estimate of KL(p || reference) that is never negative, from samples of p (2402.03300, equation 4)."""
    difference = reference - log_p
    return difference.exp() - difference - 1


def token_weights(mask_BT: Tensor, normalise: Normalise, longest: int) -> Tensor:
    """[B, T], 0 outside of the mask: 1 / tokens of the row, 1, or 1 / `longest`."""
    weights_BT = mask_BT.to(torch.float32)
    if normalise == "sequence":
        return weights_BT / weights_BT.sum(1, keepdim=True).clamp(min=1)
    return weights_BT if normalise == "token" else weights_BT / longest


def count(mask_BT: Tensor, normalise: Normalise) -> Tensor:
    """By what the weighted sum is divided: tokens, or rows with a token."""
    return mask_BT.sum() if normalise == "token" else mask_BT.any(1).sum()
