"""From logits to a token of each row: a penalty, filters, and a draw that depends on nothing but the row itself."""

# B rows, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txtrain.model.config import Sampling

# splitmix64 (Steele, Lea, Flood 2014), its constants as signed integers: products wrap around.
_GOLDEN, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _signed(n: int) -> int:
    return (n + 2**63) % 2**64 - 2**63


class Chooser:
    """Chooses the next token of each row, by `how`.

    A draw is the largest of log-probability + Gumbel noise (Maddison et al. 2014, 1411.0030). The noise of a token is
    a function of (seed, number of the row, position, token): it knows neither the batch nor the process. And a rounding
    difference of the logits changes the drawn token as rarely as it changes the most likely one; in the cumulative
    distribution it would move every border.

    Args:
        numbers: of the rows, from 0.
        seen: tokens of each row that `how.repetition_penalty` makes less likely, beside those that are chosen here.
    """

    def __init__(
        self, how: Sampling, seed: int, numbers: Sequence[int], seen: Sequence[Sequence[int]], vocab_size: int,
        device: torch.device,
    ) -> None:
        self.how, self.position = how, 0
        seed_1 = torch.tensor([_signed(seed)], device=device)
        self._key_B = _mixed(_mixed(seed_1) + torch.tensor(numbers, device=device) * _GOLDEN)
        self._steps_V = torch.arange(1, vocab_size + 1, device=device) * _GOLDEN
        self._seen_BV = None if how.repetition_penalty == 1 else seen_in(seen, vocab_size, device)

    def __call__(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B], and the log-probability of each [B] under the distribution that it was drawn from.

        At temperature 0 it is that of the model's own distribution, after the penalty.
        """
        logits_BV = processed(logits_BV, self.how, self._seen_BV)
        log_p_BV = logits_BV.log_softmax(-1)
        if self.how.heat == 0:
            new_B = logits_BV.argmax(-1)
        else:
            new_B = self._gumbel_BV().add_(log_p_BV).argmax(-1)
        self.position += 1
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, new_B[:, None], True)
        return new_B, log_p_BV.gather(1, new_B[:, None])[:, 0]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self._key_B = self._key_B[rows]
        self._seen_BV = None if self._seen_BV is None else self._seen_BV[rows]

    def _gumbel_BV(self) -> Tensor:
        at_B = _mixed(self._key_B + _signed((self.position + 1) * _GOLDEN))
        words_BV = _mixed(at_B[:, None] + self._steps_V)
        uniform_BV = ((words_BV >> 12) & (2**52 - 1)).double().mul_(2.0**-52).add_(2.0**-53)  # neither 0 nor 1
        return uniform_BV.log_().neg_().log_().neg_()


def processed(logits_BV: Tensor, how: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """Logits after penalty, temperature, top_k, top_p and min_p, in that order, -inf where a token is left out.

    Equal to the LogitsProcessors of `transformers`. At least float32. Temperature 0 leaves the penalty alone.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logits_BV = penalised(logits_BV, how.repetition_penalty, seen_BV)
    if how.heat == 0:
        return logits_BV
    if how.heat != 1:
        logits_BV = logits_BV / max(how.heat, 1e-30)  # below it float32 would divide 0 by 0
    if how.top_k is not None and how.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(how.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if how.top_p is not None and how.top_p < 1:  # the smallest set of most likely tokens that together reach top_p
        ordered, index = logits_BV.sort()
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - how.top_p
        cut[:, -1] = False
        logits_BV = logits_BV.masked_fill(cut.scatter(1, index, cut), -torch.inf)
    if how.min_p is not None:
        p_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(p_BV < how.min_p * p_BV.amax(-1, keepdim=True), -torch.inf)
    return logits_BV


def penalised(logits_BV: Tensor, penalty: float, seen_BV: Tensor | None) -> Tensor:
    """Keskar et al. 2019, 1909.05858. seen_BV: the tokens concerned; None: none."""
    if seen_BV is None:
        return logits_BV
    less_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, less_BV, logits_BV)


def seen_in(rows: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Which tokens each row has, [B, V]."""
    seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for row, tokens in enumerate(rows):
        seen_BV[row, list(tokens)] = True
    return seen_BV


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection of int64."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # of a signed integer `>>` repeats the sign
