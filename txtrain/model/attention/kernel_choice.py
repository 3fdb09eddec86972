"""Which kernel computes attention under a declared mask. No torch: `plan` chooses as the model does."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Literal

Kernel = Literal["plain", "sdpa", "sdpa_masked", "blocks", "flex", "varlen"]

BLOCK = 128  # queries of a block
BLOCKS_FROM = 512  # positions: in fewer there is little to leave out


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

    @property
    def is_long(self) -> bool:
        """Whether it is causal self-attention over so many positions that blocks of queries pay."""
        return self.causal and self.prefix_BS is None and self.n_keys == self.n_queries >= BLOCKS_FROM

    @property
    def sees_all(self) -> bool:
        return self.drawn_by_flag and (not self.causal or self.n_queries == 1)


def choose_kernel(
    mask: Declared, *, device_type: str, softcap: bool, bias: bool, dropout: bool, half: bool
) -> Kernel:
    """The fastest kernel that is right for this mask. half: bfloat16 or float16.

    On CUDA no mask is materialised: flex attention computes windows, documents, padding, softcaps and biases by blocks
    and skips those that are invisible; packed documents alone, in half precision, go to the variable-length flash
    kernel. Only SDPA has dropout. On the CPU flex and varlen have no backward: SDPA takes what it can express, with a
    materialised mask if needed, and the plain formula takes softcaps; long sequences go by blocks (blocks.py).
    """
    if device_type == "cpu" and mask.is_long and not (bias or dropout) and (softcap or not mask.drawn_by_flag):
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
