"""Mixture of experts: a router, stacked experts, and their load balancing.

Tokens are sorted by expert, and a grouped matrix product runs over the slices. Experts have no capacity: no token is
dropped, and no result depends on the other tokens of the batch.
"""

# B batch, T positions, N tokens (B and T flattened), R rows (a token once per expert it visits), D model size,
# E experts, K experts a token visits, F hidden size of an expert

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.ffn import traced
from txtrain.model.ffn.dense import ACTIVATIONS, GatedFFN
from txtrain.model.ffn.gated import gated

BALANCE_BIAS = "balance_bias"
AUX_LOSS = "aux_loss"


def feed_forward(
    dim: int, hidden_dim: int, dense_hidden_dim: int | None, n_shared: int, activation: str, ffn_dropout: float,
    **of_routing: Any,
) -> nn.Module:
    """The FFN of one layer: a dense one if dense_hidden_dim is given, else a mixture."""
    if dense_hidden_dim is not None:
        return GatedFFN(dim, dense_hidden_dim, activation, bias=False, ffn_dropout=ffn_dropout)
    shared = GatedFFN(dim, n_shared * hidden_dim, activation, bias=False, ffn_dropout=ffn_dropout) if n_shared else None
    experts = Experts(dim, hidden_dim, of_routing["n_experts"], activation, ffn_dropout)
    return MixtureOfExperts(dim, experts, shared, **of_routing)


class Experts(nn.Module):
    """E gated FFNs (2002.05202) with stacked matrices, [E, out, in]."""

    residual_projections = ("down_proj",)
    stacked_projections = ("gate_proj", "up_proj", "down_proj")  # each slice is initialised alone: model/init.py

    def __init__(self, dim: int, hidden_dim: int, n_experts: int, activation: str, ffn_dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.up_proj = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.act = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(ffn_dropout)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """x: rows in the order of the experts; counts: rows of each expert."""
        h_RF = gated(self.act, self.product(x_RD, "gate_proj", counts_E), self.product(x_RD, "up_proj", counts_E))
        return self.product(self.dropout(h_RF), "down_proj", counts_E)

    def product(self, x_RI: Tensor, name: str, counts_E: Tensor) -> Tensor:
        """Rows times their expert's matrix of that name."""
        return grouped_linear(x_RI, getattr(self, name), counts_E)


class Router(nn.Linear):
    """A token's logit for each expert, at least in float32: half precision would round close scores to equal ones."""

    def forward(self, x_ND: Tensor) -> Tensor:
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(dtype), self.weight.to(dtype))


class MixtureOfExperts(nn.Module):
    """Sum over a token's experts of weight * expert(x), plus the shared expert (1701.06538; DeepSeekMoE, 2401.06066).

    gate: sigmoid (DeepSeek-V3, 2412.19437) or softmax of the router's logits, in float32. The choice is by score +
    bias; the weight is the score. bias_update_rate: see balancing.py; 0: no bias. aux_weight: see `auxiliary_loss`.

    Records `expert_counts` [E], how many real tokens chose each expert, and in training `aux_loss`, unweighted.
    """

    def __init__(
        self, dim: int, experts: Experts, shared: nn.Module | None, n_experts: int, top_k: int, gate: str,
        normalise: bool, routed_scale: float, n_groups: int, top_k_groups: int, bias_update_rate: float,
        aux_weight: float,
    ) -> None:
        super().__init__()
        self.n_experts, self.top_k, self.n_groups, self.top_k_groups = n_experts, top_k, n_groups, top_k_groups
        self.gate, self.normalise, self.routed_scale = gate, normalise, routed_scale
        self.bias_update_rate, self.aux_weight = bias_update_rate, aux_weight
        self.router = Router(dim, n_experts, bias=False)
        self.experts = experts
        self.shared = shared
        self.register_buffer(BALANCE_BIAS, torch.empty(n_experts, dtype=torch.float32) if bias_update_rate else None)

    def reset_parameters(self) -> None:
        if self.bias_update_rate:
            nn.init.zeros_(self.get_buffer(BALANCE_BIAS))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureOfExperts:
        """`model.to(bfloat16)` leaves the bias in float32: half precision would lose an update of 0.001."""
        kept = self._buffers[BALANCE_BIAS]
        super()._apply(fn, recurse)
        made = self._buffers[BALANCE_BIAS]
        if kept is not None and made is not None and made.dtype != torch.float32:
            self._buffers[BALANCE_BIAS] = kept.to(made.device)
        return self

    def forward(
        self, x_BTD: Tensor, record: dict[str, Tensor] | None = None, valid_BT: Tensor | None = None,
        loss_scale: Tensor | None = None,
    ) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = self._scores(x_ND)
        chosen_NK, weights_NK = self.choose(scores_NE)
        y_BTD = self._routed(x_ND, chosen_NK, weights_NK).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        if record is None:
            return y_BTD
        valid_N = torch.ones_like(x_ND[:, 0], dtype=torch.float32) if valid_BT is None else valid_BT.flatten().float()
        valid_R = valid_N.repeat_interleave(self.top_k)
        counts_E = valid_R.new_zeros(self.n_experts).index_add(0, chosen_NK.flatten(), valid_R)
        record["expert_counts"] = counts_E
        if not (self.aux_weight and self.training):
            return y_BTD
        aux = auxiliary_loss(scores_NE, counts_E, valid_N)
        record[AUX_LOSS] = aux.detach()
        return WithLoss.apply(y_BTD, aux * self.aux_weight, loss_scale)

    def _scores(self, x_ND: Tensor) -> Tensor:
        logits_NE = self.router(x_ND)
        return logits_NE.sigmoid() if self.gate == "sigmoid" else logits_NE.softmax(-1)

    def choose(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """A token's experts, and their weights: [N, K] each."""
        bias: Tensor | None = self._buffers[BALANCE_BIAS]
        ranks_NE = scores_NE.detach() if bias is None else scores_NE.detach() + bias
        if self.top_k_groups < self.n_groups:
            ranks_NE = self._within_best_groups(ranks_NE)
        chosen_NK = ranks_NE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return chosen_NK, weights_NK * self.routed_scale

    def _within_best_groups(self, ranks_NE: Tensor) -> Tensor:
        """Minus infinity outside the groups whose two best experts have the highest sum."""
        groups_NGe = ranks_NE.unflatten(-1, (self.n_groups, -1))
        best_NG = groups_NGe.topk(min(2, groups_NGe.shape[-1]), dim=-1).values.sum(-1)
        chosen_NG = best_NG.topk(self.top_k_groups, dim=-1).indices
        left_out_NG = torch.ones_like(best_NG, dtype=torch.bool).scatter(1, chosen_NG, False)
        return groups_NGe.masked_fill(left_out_NG[..., None], -torch.inf).flatten(1)

    def _routed(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        order_R = chosen_NK.flatten().argsort(stable=True)
        tokens_R = order_R // self.top_k
        counts_E = chosen_NK.new_zeros(self.n_experts).scatter_add(0, chosen_NK.flatten(), torch.ones_like(order_R))
        y_RD = self.experts(x_ND[tokens_R], counts_E) * weights_NK.flatten()[order_R, None]  # float32, as weights
        return torch.zeros_like(x_ND, dtype=y_RD.dtype).index_add(0, tokens_R, y_RD).to(x_ND.dtype)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Rows x, in the order of the experts, times their expert's matrix, [R, out]; in autocast's dtype if it is on."""
    if torch.is_autocast_enabled(x_RI.device.type):
        dtype = torch.get_autocast_dtype(x_RI.device.type)
        x_RI, weight_EOI = x_RI.to(dtype), weight_EOI.to(dtype)
    return (grouped_mm if _grouped_mm_takes(weight_EOI) else by_loop)(x_RI, weight_EOI, counts_E)


def by_loop(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The formula, one expert at a time. Waits for the device to read the counts."""
    parts = zip(x_RI.split(counts_E.tolist()), weight_EOI.unbind(0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def grouped_mm(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The same in one kernel, which reads the counts on the device."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    if torch.compiler.is_compiling() and weight_EOI.dtype is torch.float32:
        return traced.grouped_mm(x_RI, weight_EOI, ends_E)
    return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)


def _grouped_mm_takes(weight_EOI: Tensor) -> bool:
    """torch's kernel needs rows of multiples of 16 bytes; on the meta device it takes bfloat16 only."""
    aligned = all(size * weight_EOI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    dtype = weight_EOI.dtype
    return aligned and (dtype is torch.bfloat16 or (dtype is torch.float32 and not weight_EOI.is_meta))


def auxiliary_loss(scores_NE: Tensor, counts_E: Tensor, valid_N: Tensor) -> Tensor:
    """Switch Transformer's (2101.03961, equation 4): E * sum over experts of (share of visits) * (mean score share).

    1 if both are even. Only the scores carry a gradient. As a product of two means over the tokens of one forward it
    balances each micro-batch; their losses are weighted by their shares of the step's targets.
    """
    n_experts = scores_NE.shape[1]
    shares_NE = scores_NE / scores_NE.sum(-1, keepdim=True)  # sigmoids do not sum to 1
    mean_E = (shares_NE * valid_N[:, None]).sum(0) / valid_N.sum().clamp(min=1)
    return n_experts * (counts_E / counts_E.sum().clamp(min=1) * mean_E).sum()


class WithLoss(torch.autograd.Function):
    """y unchanged; the backward also sends a gradient into `loss`, as if scale * loss were added to the objective.

    A loss that left the block apart from its output would reach the backward before the block's parameters are gathered
    (FSDP), or twice (activation checkpointing). scale: known once the backward has begun (`ScaleOf`); None: 1.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(loss.new_ones(()) if scale is None else scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        # The zero ties scale to the backward: compiled, what depends on the forward's inputs alone is computed there.
        return grad_y, scale + 0.0 * grad_y.flatten()[0].to(scale.dtype), None


class ScaleOf(torch.autograd.Function):
    """Losses unchanged; the backward writes the first one's gradient times `share` into `scale`, for the blocks.

    So what multiplies the loss afterwards (a weight, the number of ranks) multiplies the auxiliary losses too, without
    state that outlives the forward. All losses of the forward pass through it, so that no block's backward is earlier.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, share: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
        ctx.scale, ctx.share = scale, share
        ctx.set_materialize_grads(False)
        return tuple(loss.clone() for loss in losses)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        # .data: the blocks saved this tensor's version, and must read the new value.
        ctx.scale.data.copy_(torch.zeros_like(ctx.scale) if grad_loss is None else grad_loss * ctx.share)
        return None, None, grad_loss, *others
