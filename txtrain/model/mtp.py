"""Multi-token prediction (MTP): tokens beyond the next, one module for each (DeepSeek-V3, 2412.19437, section 2.2).

    h0  the model's last hidden state            position t       predicts t + 1
    h1 = block(W [norm(h0_t); norm(e_{t+1})])    e: embedding     predicts t + 2
    h2 = block(W [norm(h1_t); norm(e_{t+2})])                     predicts t + 3, ...

Each module has its own block, and shares the embedding and the head. Only training uses them.
"""

# B batch, T positions, D model size; k the module's depth: 1, 2, ...

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from txtrain.model.head.loss import IGNORED


class MTPModule(nn.Module):
    """One MTP module: joins the hidden state of the depth before with a later token's embedding; a block; a norm."""

    def __init__(
        self, dim: int, norm: Callable[[int], nn.Module], block: nn.Module, final_norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.hidden_norm = norm(dim)
        self.token_norm = norm(dim)
        self.projection = nn.Linear(2 * dim, dim, bias=False)
        self.block = block
        self.final_norm = final_norm

    def forward(self, x_BTD: Tensor, later_BTD: Tensor, through: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The next module's input, and the head's. through: the block, with its masks and positions."""
        x_BTD = through(self.projection(torch.cat((self.hidden_norm(x_BTD), self.token_norm(later_BTD)), dim=-1)))
        return x_BTD, x_BTD if self.final_norm is None else self.final_norm(x_BTD)


def further_targets(labels_BT: Tensor, document_ids_BT: Tensor | None, depth: int) -> Tensor:
    """Targets of a depth, [B, T - depth]: at t, label t + 1 + depth of the same document; the last has none."""
    targets = labels_BT.new_full((labels_BT.shape[0], max(labels_BT.shape[1] - depth, 0)), IGNORED)
    targets[:, :-1] = labels_BT[:, depth + 1 :]
    if document_ids_BT is not None:
        beyond = document_ids_BT[:, depth + 1 :] != document_ids_BT[:, : -depth - 1]
        targets[:, :-1].masked_fill_(beyond, IGNORED)
    return targets
