"""Multi-head latent attention: keys and values of all heads come from one small vector per token; only that is cached.

    expanded     k, v of every head computed from the latents, then attention          training, prefill
    absorbed     the latents themselves are key and value of one head, which all       decoding with a cache
                 query heads share: q W_k c = (q W_k) c, and sum p (W_v c) = W_v (sum p c)

Both give the same result. Expanded costs less per score; absorbed makes no keys and values of the whole past again.
"""

# B batch, T query positions, S key positions, D model size, N heads, C latent size, V head size of the values,
# H head size of q and k = P part without position + R rotated part

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from txtrain.model.attention.kernels import attend
from txtrain.model.context import AnyContext
from txtrain.model.lora import matrix
from txtrain.model.position.encodings import Rotation


class LatentAttention(nn.Module):
    """DeepSeek-V2's attention (2405.04434), also of V3 and R1.

    q_rank: size of the latent that queries come from; None: they come from x. rope_dim: rotated part of a head, whose
    key all heads share; only a rotation treats the parts differently. The model's norm is applied to the latents.
    Biases, as in the published models: on the projections to the latents and on the output.
    """

    residual_projections = ("o_proj",)

    def __init__(
        self, dim: int, n_heads: int, q_rank: int | None, kv_rank: int, nope_dim: int, rope_dim: int, v_dim: int,
        norm: Callable[[int], nn.Module], scale: float, bias: bool = False, attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.nope_dim, self.v_dim, self.kv_rank = nope_dim, v_dim, kv_rank
        self.head_dim, self.scale, self.dropout = nope_dim + rope_dim, scale, attention_dropout
        self.q_down_proj = None if q_rank is None else nn.Linear(dim, q_rank, bias=bias)
        self.q_norm = None if q_rank is None else norm(q_rank)
        self.q_proj = nn.Linear(dim if q_rank is None else q_rank, n_heads * self.head_dim, bias=False)
        self.kv_down_proj = nn.Linear(dim, kv_rank, bias=bias)
        self.kv_norm = norm(kv_rank)
        self.k_rope_proj = nn.Linear(dim, rope_dim, bias=bias)
        self.k_proj = nn.Linear(kv_rank, n_heads * nope_dim, bias=False)
        self.v_proj = nn.Linear(kv_rank, n_heads * v_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * v_dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor, context: AnyContext) -> Tensor:
        q_BNTP, q_BNTR = self._queries(x_BTD, context.rotation)
        c_B1SC, k_B1SR = context.attended(x_BTD, partial(self._latents, rotation=context.rotation))
        absorbed = context.cache is not None and self._absorbed_is_cheaper(x_BTD.shape[1])
        if absorbed:  # K is 1: the size of q and k is C + R, that of v is C
            q_BNTP = _by_head(q_BNTP, matrix(self.k_proj).view(-1, self.nope_dim, self.kv_rank))
            k_BKSH, v_BKSV = torch.cat((c_B1SC, k_B1SR), dim=-1), c_B1SC
        else:
            k_BNSP = self.k_proj(c_B1SC[:, 0]).unflatten(-1, (-1, self.nope_dim)).transpose(1, 2)
            v_BKSV = self.v_proj(c_B1SC[:, 0]).unflatten(-1, (-1, self.v_dim)).transpose(1, 2)
            k_BKSH = torch.cat((k_BNSP, k_B1SR.expand(-1, k_BNSP.shape[1], -1, -1)), dim=-1)
        q_BNTH, dropout = torch.cat((q_BNTP, q_BNTR), dim=-1), self.dropout if self.training else 0.0
        y_BNTV = attend(q_BNTH, k_BKSH, v_BKSV, context.mask, self.scale, None, dropout)
        if absorbed:
            y_BNTV = _by_head(y_BNTV, matrix(self.v_proj).view(-1, self.v_dim, self.kv_rank).transpose(1, 2))
        return self.o_proj(y_BNTV.transpose(1, 2).flatten(-2))

    def _queries(self, x_BTD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """[B, N, T, P] and [B, N, T, R]."""
        if self.q_down_proj is not None and self.q_norm is not None:
            x_BTD = self.q_norm(self.q_down_proj(x_BTD))
        q_BNTH = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        plain, turned = q_BNTH.split((self.nope_dim, self.head_dim - self.nope_dim), dim=-1)
        return plain, turned if rotation is None else rotation(turned)

    def _latents(self, x_BSD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """What is cached, [B, 1, S, C] and [B, 1, S, R]."""
        c_B1SC, k_B1SR = self.kv_norm(self.kv_down_proj(x_BSD))[:, None], self.k_rope_proj(x_BSD)[:, None]
        return c_B1SC, k_B1SR if rotation is None else rotation(k_B1SR)

    def _absorbed_is_cheaper(self, n_queries: int) -> bool:
        """Per key and head: n_queries * (2 C + R) absorbed, n_queries * (P + R + V) + C * (P + V) expanded."""
        per_head = self.nope_dim + self.v_dim
        return n_queries * (2 * self.kv_rank - per_head) < self.kv_rank * per_head


def _by_head(x_BNTI: Tensor, weight_NIO: Tensor) -> Tensor:
    """Each head times its matrix, [B, N, T, O]. `@` would copy the matrices for each row of the batch."""
    B, N, T, _ = x_BNTI.shape
    y_NRO = torch.bmm(x_BNTI.transpose(0, 1).reshape(N, B * T, -1), weight_NIO)
    return y_NRO.view(N, B, T, -1).transpose(0, 1)
