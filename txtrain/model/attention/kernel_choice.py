"""Which kernel computes attention under a declared mask. No torch: `plan` chooses as the model does."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Literal

Kernel = Literal["plain", "sdpa", "sdpa_masked", "blocks", "flex", "varlen"]

BLOCK = 128  # queries of a block
BLOCKS_FROM = 512  # positions: in fewer there is little to leave out
PIECES_FROM = 256  # positions, where the plain formula is the alternative
CACHED_SCORES = 1 << 17  # so many stay in a core's cache from one operation to the next


@dc.dataclass(frozen=True)
class Declared:
    """What the choice of a kernel depends on. None: no window, one document, no padding, no prefix."""

    n_queries: int
    n_keys: int
    causal: bool = True
    window: int | None = None
    documents_BS: Any = None
    valid_BS: Any = None
    prefix_BS: Any = None
    query_documents_BT: Any = None  # in cross-attention, whose queries are another sequence

    @property
    def may_see_nothing(self) -> bool:
        """Whether a query may have no visible key: all are padding, or in cross-attention none is of its document."""
        return self.valid_BS is not None or self.query_documents_BT is not None

    @property
    def drawn_by_flag(self) -> bool:
        """Whether SDPA's `is_causal` flag, or no mask at all, expresses this mask."""
        whole = self.documents_BS is None and self.valid_BS is None and self.prefix_BS is None
        if not whole or (self.window is not None and self.n_keys > self.window):
            return False
        return not self.causal or self.n_queries in (1, self.n_keys)

    def in_blocks(self, formula: bool) -> bool:
        """Whether blocks of queries pay. formula: the alternative is the plain formula."""
        if self.prefix_BS is not None or self.query_documents_BT is not None or self.n_keys != self.n_queries:
            return False
        causal = self.causal and not self.drawn_by_flag and self.n_keys >= BLOCKS_FROM
        return causal or (formula and self.n_keys >= PIECES_FROM)

    @property
    def sees_all(self) -> bool:
        return self.drawn_by_flag and (not self.causal or self.n_queries == 1)


def choose_kernel(
    mask: Declared, *, device_type: str, softcap: bool, bias: bool, dropout: bool, half: bool,
    learned: bool = False,
) -> Kernel:
    """The fastest kernel that is right for this mask. half: bfloat16 or float16. learned: the bias takes a gradient.

    On CUDA no mask is materialised: flex attention computes windows, documents, padding, softcaps and biases by blocks
    and skips those that are invisible; packed documents alone, in half precision, go to the variable-length flash
    kernel. Only SDPA has dropout. On the CPU flex and varlen have no backward: SDPA takes what it can express, with a
    materialised mask if needed, and the plain formula takes softcaps; long sequences go by blocks (blocks.py).
    """
    formula = softcap or learned  # SDPA's kernels have neither
    if device_type == "cpu" and not dropout and (formula or not bias) and mask.in_blocks(formula):
        return "blocks"
    if softcap and (device_type != "cuda" or dropout):
        return "plain"
    if device_type == "cuda" and not dropout:
        if softcap or bias:
            return "flex"
        packed = mask.documents_BS is not None and mask.valid_BS is None and mask.prefix_BS is None
        if packed and mask.n_queries == mask.n_keys and mask.causal and half:
            return "varlen"
        return "sdpa" if mask.drawn_by_flag else "flex"
    return "sdpa" if mask.drawn_by_flag and not bias else "sdpa_masked"


def together(n_scores: int, batch: int, n_kv_heads: int) -> tuple[int, int]:
    """Rows and key heads of a piece of a block, whose scores are n_scores for one row and key head."""
    n = max(1, CACHED_SCORES // n_scores)
    return max(1, min(batch, n // n_kv_heads)), min(n, n_kv_heads)
