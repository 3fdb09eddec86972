"""Divergence from a teacher's distribution, by chunks of tokens: neither model's logits are ever held at once."""

# C tokens of a chunk, D model size, V vocabulary, K tokens that the teacher finds most likely

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.head.loss import IGNORED, Gradients, Vocabulary, chunk_logits


@dc.dataclass(frozen=True)
class TopK:
    """A teacher's distribution over bins: its K most likely tokens, and all others together.

    ids: [C, K]. log_p: their log-probabilities, [C, K]. log_tail: that of the others, [C]; -inf: there are none.
    """

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor

    @classmethod
    def of(cls, log_p_CV: Tensor, k: int) -> TopK:
        """Of whole distributions. k: at most V."""
        log_p, ids = log_p_CV.topk(k, dim=-1)
        return cls(ids, log_p, log_p_CV.scatter(1, ids, -torch.inf).logsumexp(-1))


Soft = Tensor | TopK  # log-probabilities at the temperature: [C, V], or of bins
Consume = Callable[[Callable[[slice], Soft]], None]


@dc.dataclass
class Distillation:
    """A student's loss and its teacher.

    Args:
        reverse: KL(student || teacher); else KL(teacher || student).
        temperature: both logits are divided by it, and the divergence multiplied by its square, so that its gradient
            does not shrink (Hinton et al. 2015, 1503.02531, section 2).
        hard_weight: share of the cross-entropy of the targets; the divergence has the rest.
        denominator: of both sums.
        teach: calls its argument once, with a function that gives the teacher's distributions for a slice of the
            tokens. A sharded teacher's weights are whole within that call.

    Attributes:
        soft_loss, hard_loss: divergence (times temperature squared) and cross-entropy, divided; set by the forward.
    """

    reverse: bool
    temperature: float
    hard_weight: float
    denominator: Tensor
    teach: Callable[[Consume], None]
    soft_loss: Tensor = dc.field(init=False)
    hard_loss: Tensor = dc.field(init=False)


class ChunkedDistillation(torch.autograd.Function):
    """(1 - hard_weight) divergence + hard_weight cross-entropy; the gradient is made while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softcap: float | None,
        vocabulary: Vocabulary, how: Distillation, with_grad: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        wanted = [with_grad and need for need in ctx.needs_input_grad[:3]]
        gradients = Gradients((x_ND, weight_VD, bias_V), wanted)
        sums = torch.zeros(2, dtype=torch.float32, device=x_ND.device)

        def chunk(rows: slice, soft: Soft) -> None:
            logits_CV = chunk_logits(x_ND[rows], weight_VD, bias_V, softcap)
            losses, grad_CV = _chunk(logits_CV, targets_N[rows], soft, vocabulary, how)
            sums.add_(losses)
            if any(wanted):
                if softcap is not None:
                    grad_CV.mul_(1 - (logits_CV / softcap).square())
                del logits_CV
                gradients.add(rows, grad_CV.div_(how.denominator))

        def consume(soft_of: Callable[[slice], Soft]) -> None:
            size = vocabulary.rows_per_chunk(weight_VD)
            with torch.autocast(x_ND.device.type, enabled=False):
                for start in range(0, max(1, len(x_ND)), size):
                    rows = slice(start, start + size)
                    chunk(rows, soft_of(rows))

        how.teach(consume)
        how.soft_loss, how.hard_loss = (sums / how.denominator).unbind()
        ctx.save_for_backward(*gradients.made())
        return (1 - how.hard_weight) * how.soft_loss + how.hard_weight * how.hard_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None or grad is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def _chunk(
    logits_CV: Tensor, targets_C: Tensor, soft: Soft, vocabulary: Vocabulary, how: Distillation
) -> tuple[Tensor, Tensor]:
    """The chunk's divergence and cross-entropy, [2], and the gradient of their mixture by the logits."""
    is_target_C = targets_C != IGNORED
    rows_C, is_here_C = vocabulary.find(targets_C, logits_CV.shape[1])
    log_z_C, target_C = vocabulary.log_z_and_target(logits_CV, rows_C, is_here_C)
    hard = ((log_z_C - target_C) * is_target_C).sum()
    scaled_CV = logits_CV / how.temperature
    log_q_CV = scaled_CV - vocabulary.log_z(scaled_CV)[:, None]
    if isinstance(soft, TopK):
        kl_C, grad_CV = _of_bins(log_q_CV, soft, how.reverse)
    else:
        kl_C, grad_CV = _of_all(log_q_CV, soft, how.reverse, vocabulary)
    kl = torch.where(is_target_C, kl_C, 0.0).sum() * how.temperature**2
    grad_CV.mul_((1 - how.hard_weight) * how.temperature)  # its square, and 1 / temperature from the logits' division
    of_hard_CV = (logits_CV - log_z_C[:, None]).exp_()
    of_hard_CV.scatter_add_(1, rows_C[:, None], -is_here_C[:, None].to(of_hard_CV.dtype))
    grad_CV.add_(of_hard_CV, alpha=how.hard_weight)
    return torch.stack((kl, hard)).float(), torch.where(is_target_C[:, None], grad_CV, 0.0)


def _of_all(log_q_CV: Tensor, log_p_CV: Tensor, reverse: bool, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The divergence of each token, and its gradient by the student's divided logits."""
    q_CV, apart_CV = log_q_CV.exp(), log_q_CV - log_p_CV
    if reverse:
        kl_C = vocabulary.total(q_CV * apart_CV)
        return kl_C, q_CV.mul_(apart_CV.sub_(kl_C[:, None]))
    p_CV = log_p_CV.exp()
    return vocabulary.total(p_CV * apart_CV).neg_(), q_CV.sub_(p_CV)


def _of_bins(log_q_CV: Tensor, soft: TopK, reverse: bool) -> tuple[Tensor, Tensor]:
    """The same over the teacher's bins: those of one token each, and the tail.

    The student's mass Q of a bin changes by q_j (1 - Q) with the logit of a token j in it, by -q_j Q with any other.
    """
    log_q_CK = log_q_CV.gather(1, soft.ids)
    log_tail_C = log_q_CV.scatter(1, soft.ids, -torch.inf).logsumexp(-1)
    some_C = (log_tail_C > -torch.inf) & (soft.log_tail > -torch.inf)
    apart_CK = log_q_CK - soft.log_p
    apart_C = torch.where(some_C, log_tail_C - soft.log_tail, 0.0)
    grad_CV = log_q_CV.exp()
    q_CK, p_CK, p_C = log_q_CK.exp(), soft.log_p.exp(), soft.log_tail.exp()
    if reverse:
        kl_C = (q_CK * apart_CK).sum(-1) + log_tail_C.exp() * apart_C
        grad_CV.mul_((apart_C - kl_C)[:, None])
        return kl_C, grad_CV.scatter_(1, soft.ids, q_CK * (apart_CK - kl_C[:, None]))
    kl_C = -(p_CK * apart_CK).sum(-1) - p_C * apart_C
    grad_CV.mul_((1 - torch.where(some_C, (-apart_C).exp(), 0.0))[:, None])
    return kl_C, grad_CV.scatter_(1, soft.ids, q_CK - p_CK)
