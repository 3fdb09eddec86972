"""Beam search."""

# B rows, K beams, V vocabulary, T tokens so far

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.model.config import Sampling
from txtrain.model.decoding import (
    Columns,
    StopStrings,
    Text,
    Written,
    check,
    end_tokens,
    evaluating,
    first_columns,
    padded,
    rows_of,
)
from txtrain.model.sampling import penalised, seen_in


@dc.dataclass(frozen=True)
class MeanScore:
    """log-probability / length, as `transformers` ranks beams by default: a row is decided where its best live beam is
    worse at its present length than the K-th that has ended; beams that are truncated compete too."""

    truncated_compete = True

    def score(self, log_p: float, length: int) -> float:
        return log_p / length

    def bound(self, log_p: float, length: int, longest: int) -> float:
        return self.score(log_p, length)


@dc.dataclass(frozen=True)
class LengthPenalty:
    """log-probability / ((5 + length) / 6) ** alpha (Wu et al. 2016, 1609.08144). At best a live beam keeps its
    probability up to the longest length. Truncated beams count where none has ended."""

    alpha: float
    truncated_compete = False

    def score(self, log_p: float, length: int) -> float:
        return float(log_p / ((5 + length) / 6) ** self.alpha)

    def bound(self, log_p: float, length: int, longest: int) -> float:
        return self.score(log_p, longest)


@torch.no_grad()
def beam_search(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, num_beams: int = 4,
    length_penalty: float = 0.6, max_new_tokens: int = 64, eos_token_id: int | None = None,
    pad_token_id: int | None = None, on_step: Callable[[], None] | None = None, limits: Sequence[int] | None = None,
) -> Tensor:
    """The continuation of each row with the highest log-probability / ((5 + length) / 6) ** length_penalty
    (Wu et al. 2016, 1609.08144).

    Args:
        input_ids: [B, P]; the encoder's source, or a prompt.
        num_beams: 1 is greedy decoding.
        eos_token_id: by default the configured one.
        on_step: called after each token; it may raise to stop.
        limits: the new tokens of each row, at most max_new_tokens; by default these.

    Returns:
        As `generate`: prompt (with an encoder the start token) and new tokens, padded, [B, at most T + max_new_tokens].

    Raises:
        ConfigError: as `generate`; num_beams is below 1; no end token is known.
    """
    how = check(model, input_ids, attention_mask, max_new_tokens=max_new_tokens, num_beams=num_beams, temperature=0)
    ends, pad = end_tokens(model, "config" if eos_token_id is None else eos_token_id, pad_token_id, input_ids.device)
    if not len(ends):
        raise ConfigError("`eos_token_id` must be given: the model's config has none, and beams have to end.")
    with evaluating(model):
        text = Text(model, rows_of(input_ids, attention_mask), max_new_tokens, input_ids.device)
        search = BeamSearch(text, how, ends, StopStrings((), str), LengthPenalty(length_penalty), limits)
        for _ in range(max_new_tokens):
            decided = search.step()
            if on_step is not None:
                on_step()
            if decided:
                break
        new_BT, _ = padded([row[0].ids.tolist() for row in search.best()], input_ids.device, left=False, value=pad)
    return torch.cat((first_columns(model, input_ids), new_BT), dim=1)


class BeamSearch:
    """K live beams per row, which the cache holds, and the best K that have ended."""

    def __init__(
        self, text: Text, how: Sampling, ends: Tensor, stops: StopStrings,
        ranking: MeanScore | LengthPenalty = MeanScore(), limits: Sequence[int] | None = None,
    ) -> None:
        self.text, self.how, self.ends, self.stops, self.ranking = text, how, ends, stops, ranking
        self.B, self.K = len(text.begun), how.num_beams
        self.limits = [how.max_new_tokens] * self.B if limits is None else limits
        self.alive_BK = torch.full((self.B, self.K), -torch.inf, device=ends.device)
        self.alive_BK[:, 0] = 0.0  # all beams are equal at first: only one is continued
        self.log_p: Columns | None = None  # of the tokens of the live beams, [B * K, T]
        self.seen: Tensor | None = None
        self.ended: list[list[tuple[float, Written]]] = [[] for _ in range(self.B)]
        self.decided = [False] * self.B  # no live beam can still win

    def step(self) -> bool:
        """Add one token. Returns whether all rows are decided."""
        log_p_RV = self._log_probs()
        log_p = log_p_RV.view(self.B, self.K, -1) + self.alive_BK[..., None]
        V, length = log_p.shape[-1], self.text.new.shape[1] + 1
        n = max(2, 1 + len(self.ends)) * self.K  # a beam has as many that end as there are end tokens: K do not
        best, index = log_p.flatten(1).topk(min(n, self.K * V))
        beams, tokens = index // V, index % V
        rows = beams + torch.arange(self.B, device=beams.device)[:, None] * self.K  # of the text
        own = best - self.alive_BK.gather(1, beams)
        ending = torch.isin(tokens, self.ends) | self._stopped(rows, tokens)
        last_B = torch.tensor([length == limit for limit in self.limits], device=ending.device)
        truncated_B1 = last_B[:, None] & self.ranking.truncated_compete
        for row, i in (ending | truncated_B1).nonzero().tolist():
            if i < self.K and best[row, i] > -torch.inf and not self.decided[row]:
                last = tokens[row, i : i + 1], own[row, i : i + 1]
                said = self._written(int(rows[row, i]), *last, bool(ending[row, i]))
                found = [*self.ended[row], (self.ranking.score(float(best[row, i]), length), said)]
                self.ended[row] = sorted(found, key=lambda one: -one[0])[: self.K]
        self.alive_BK, kept = best.masked_fill(ending, -torch.inf).topk(self.K)
        chosen, new = rows.gather(1, kept).flatten(), tokens.gather(1, kept).flatten()
        self.text.select(chosen)
        self.text.append(new)
        assert self.log_p is not None
        self.log_p.select(chosen)
        self.log_p.append(own.gather(1, kept).flatten())
        if self.seen is not None:
            self.seen = self.seen[chosen].scatter_(1, new[:, None], True)
        for row, log_p_best in enumerate(self.alive_BK[:, 0].tolist()):
            bound, ended = self.ranking.bound(log_p_best, length, self.limits[row]), self.ended[row]
            self.decided[row] |= len(ended) == self.K and bound <= ended[-1][0]
            if length == self.limits[row] and not self.decided[row]:  # it is as it is, while others go on
                ended += [(-math.inf, said) for said in self._live(row)]
                self.decided[row] = True
        return all(self.decided)

    def best(self) -> list[list[Written]]:
        """For each row the best `how.n`: beams that have ended, then live ones."""
        n = self.how.n
        return [[*(said for _, said in ended), *self._live(row)][:n] for row, ended in enumerate(self.ended)]

    # -------------------------------------------------------------------------------------------------------- pieces

    def _log_probs(self) -> Tensor:
        """[B * K, V], after the penalty."""
        logits = self.text.next_logits()
        if self.log_p is None:  # after the prompt, which is read once per row
            of = torch.arange(self.B, device=logits.device).repeat_interleave(self.K)
            self.log_p = Columns(len(of), self.alive_BK.dtype, logits.device)
            if self.how.repetition_penalty != 1:
                self.seen = seen_in([self.text.begun[row] for row in of.tolist()], logits.shape[-1], logits.device)
            if self.K > 1:
                logits = logits[of]
                self.text.select(of)
        log_p_RV = penalised(logits.float().log_softmax(-1), self.how.repetition_penalty, self.seen)
        return self.text.allowed(log_p_RV)  # afterwards, as in transformers

    def _stopped(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Whether a text of the candidates holds a stop string, [B, candidates]."""
        if not self.stops.strings:
            return torch.zeros_like(tokens, dtype=torch.bool)
        texts = torch.cat((self.text.new[rows.flatten()], tokens.flatten()[:, None]), dim=1)
        return self.stops.ended(texts).view_as(tokens)

    def _live(self, row: int) -> list[Written]:
        nothing = self.text.new.new_empty(0), self.alive_BK.new_empty(0)
        return [self._written(row * self.K + i, *nothing, False) for i in range(self.K)]

    def _written(self, row: int, new_1: Tensor, log_p_1: Tensor, ended: bool) -> Written:
        """The text of a live beam, and what follows it."""
        assert self.log_p is not None
        ids, log_p = torch.cat((self.text.new[row], new_1)), torch.cat((self.log_p.values[row], log_p_1))
        return Written(ids, log_p, ended)
