"""Multi-head attention in one class."""

# B batch, T query positions, S key positions, N heads, K key-value heads, H head size, D model size

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from txtrain.model.attention.kernels import attend
from txtrain.model.context import AnyContext
from txtrain.model.position.encodings import Rotation


class MultiHeadAttention(nn.Module):
    """softmax(q k^T * scale + bias) v, heads side by side (Vaswani et al. 2017).

    n_kv_heads: all heads (MHA), one (MQA, Shazeer 2019, 1911.02150), or some (GQA, Ainslie et al. 2023, 2305.13245).
    window: see mask.py (Mistral, 2310.06825). softcap: softcap * tanh(score / softcap) before the mask (Gemma 2,
    2408.00118). qk_norm: the model's norm over each head of q and k before the rotation (2302.05442).
    """

    residual_projections = ("o_proj",)

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, norm: Callable[[int], nn.Module],
        window: int | None = None, softcap: float | None = None, scale: float = 1.0, qk_norm: bool = False,
        bias: bool = False, attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.softcap, self.scale = head_dim, window, softcap, scale
        self.dropout = attention_dropout
        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=bias)
        self.q_norm = norm(head_dim) if qk_norm else None
        self.k_norm = norm(head_dim) if qk_norm else None

    def forward(self, x_BTD: Tensor, context: AnyContext) -> Tensor:
        q_BNTH = self._heads(self.q_proj(x_BTD), self.q_norm, context.rotation)
        k_BKSH, v_BKSH = context.attended(x_BTD, partial(self._keys_and_values, rotation=context.rotation))
        dropout = self.dropout if self.training else 0.0
        y_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, context.mask, self.scale, self.softcap, dropout)
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(-2))

    def _keys_and_values(self, x_BSD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        return self._heads(self.k_proj(x_BSD), self.k_norm, rotation), self._heads(self.v_proj(x_BSD))

    def _heads(self, x_BTE: Tensor, norm: nn.Module | None = None, rotation: Rotation | None = None) -> Tensor:
        """[B, T, N * H] to [B, N, T, H]."""
        x_BNTH = x_BTE.view(*x_BTE.shape[:2], -1, self.head_dim).transpose(1, 2)
        x_BNTH = x_BNTH if norm is None else norm(x_BNTH)
        return x_BNTH if rotation is None else rotation(x_BNTH)
