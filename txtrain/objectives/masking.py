"""Which tokens are masked, and what replaces them."""

# B batch, T positions, V vocabulary

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.data.tokenizer.words import Words
from txtrain.objectives.base import IGNORED


class Masking:
    """Masks input_ids [B, T]: each token that is not special is chosen with `probability`, and becomes a label.

    A chosen token becomes [MASK] (mask_share), a random ordinary token (random_share), or stays, so that the model also
    learns from unmasked tokens. whole_word: words are chosen; replacements are still drawn per token.
    """

    def __init__(
        self, tokenizer: Tokenizer, probability: float, mask_share: float, random_share: float, whole_word: bool
    ) -> None:
        self.probability, self.mask_share, self.random_share = probability, mask_share, random_share
        self.mask_id = tokenizer.id_of("[MASK]")
        self.ordinary_V = np.ones(tokenizer.vocab_size, dtype=np.bool_)
        self.ordinary_V[list(tokenizer.special_ids())] = False
        self.ordinary_ids = np.flatnonzero(self.ordinary_V)
        self.words = Words.of(tokenizer) if whole_word else None

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        ids_BT = batch["input_ids"].numpy()
        T = ids_BT.shape[1]
        chance_BT = draws.uniform("masked", T)
        if self.words is not None:
            chance_BT = np.take_along_axis(chance_BT, self.words.first(ids_BT), axis=1)
        chosen_BT = (chance_BT < self.probability) & self.ordinary_V[ids_BT]
        if "attention_mask" in batch:
            chosen_BT &= batch["attention_mask"].numpy() != 0
        becomes_BT = draws.uniform("becomes", T)
        random_BT = self.ordinary_ids[(draws.uniform("random token", T) * len(self.ordinary_ids)).astype(np.int64)]
        hidden_BT = np.where(
            becomes_BT < self.mask_share, self.mask_id,
            np.where(becomes_BT < self.mask_share + self.random_share, random_BT, ids_BT)
        )
        return {
            **batch,
            "input_ids": torch.from_numpy(np.where(chosen_BT, hidden_BT, ids_BT)),
            "labels": torch.from_numpy(np.where(chosen_BT, ids_BT, IGNORED)),
        }
