"""Which kernel computes attention under a declared mask. No torch, so that `plan` chooses as the model does."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Literal

Kernel = Literal["plain", "sdpa", "sdpa_masked", "flex", "varlen"]


@dc.dataclass(frozen=True)
class Declared:
    """What may attend to what, as far as the choice of a kernel and its work depend on it. None: no documents, no padding, no prefix.

    query_documents_BT: in cross-attention, whose queries are of another sequence.
    """

    n_queries: int
    n_keys: int
    causal: bool = True
    window: int | None = None
    documents_BS: Any = None
    valid_BS: Any = None
    prefix_BS: Any = None
    query_documents_BT: Any = None

    @property
    def may_see_nothing(self) -> bool:
        """Whether a row may have no key: all of them padding, or in cross-attention none of its document."""
        return self.valid_BS is not None or self.query_documents_BT is not None

    @property
    def window_hides(self) -> bool:
        return self.window is not None and self.n_keys > self.window

    @property
    def square(self) -> bool:
        return self.n_queries == self.n_keys

    @property
    def drawn_by_flag(self) -> bool:
        """Whether `is_causal` alone, or no mask at all, says everything."""
        whole = self.documents_BS is None and self.valid_BS is None and self.prefix_BS is None and not self.window_hides
        return whole and (not self.causal or self.square or self.n_queries == 1)

    @property
    def sees_all(self) -> bool:
        return self.drawn_by_flag and (not self.causal or self.n_queries == 1)


def choose_kernel(mask: Declared, *, device_type: str, softcap: bool, bias: bool, dropout: bool, half: bool) -> Kernel:
    """The fastest kernel that is right for this mask.

    On CUDA a mask is never drawn: flex attention computes windows, documents, padding, softcaps and biases block by block, and
    skips the blocks that nobody sees; packed documents alone, in half precision, go to the variable-length flash kernel. Dropout
    on the probabilities exists in SDPA only. On the CPU flex attention and varlen have no backward: SDPA takes what it can
    express, with the mask drawn if it must be, and the plain formula takes softcaps.
    """
    if softcap and (device_type != "cuda" or dropout):
        return "plain"
    if device_type == "cuda" and not dropout:
        if softcap or bias:
            return "flex"
        if mask.documents_BS is not None and mask.valid_BS is None and mask.prefix_BS is None and mask.square and mask.causal and half:
            return "varlen"
        return "sdpa" if mask.drawn_by_flag else "flex"
    return "sdpa" if mask.drawn_by_flag and not bias else "sdpa_masked"
