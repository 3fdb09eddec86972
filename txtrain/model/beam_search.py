"""Beam search."""

# B rows, K beams, V vocabulary, T tokens so far

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.model.generation import Text, check, end_tokens, evaluating


@torch.no_grad()
def beam_search(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, num_beams: int = 4,
    length_penalty: float = 0.6, max_new_tokens: int = 64, eos_token_id: int | None = None,
    pad_token_id: int | None = None, on_step: Callable[[], None] | None = None,
) -> Tensor:
    """The continuation of each row with the highest log-probability / ((5 + length) / 6) ** length_penalty
    (Wu et al. 2016, 1609.08144).

    Args:
        input_ids: [B, P]; the encoder's source, or a prompt.
        num_beams: 1 is greedy decoding.
        eos_token_id: by default the configured one.
        on_step: called after each token; it may raise to stop.

    Returns:
        As `generate`: prompt (with an encoder the start token) and new tokens, padded, [B, at most T + max_new_tokens].

    Raises:
        ConfigError: as `generate`; num_beams is below 1; no end token is known.
    """
    if num_beams < 1:
        raise ConfigError(f"`num_beams` must be at least 1, but is {num_beams} instead.")
    check(model, input_ids, attention_mask, max_new_tokens=max_new_tokens)
    ends, pad = end_tokens(model, "config" if eos_token_id is None else eos_token_id, pad_token_id, input_ids.device)
    if not len(ends):
        raise ConfigError("`eos_token_id` must be given: the model's config has none, and beams have to end.")
    with evaluating(model):
        text = Text(model, input_ids, attention_mask, max_new_tokens)
        search = _Search(text, num_beams, length_penalty, ends, max_new_tokens)
        for _ in range(max_new_tokens):
            decided = search.step()
            if on_step is not None:
                on_step()
            if decided:
                break
        return search.best(pad)


class _Search:
    """K live beams per row, which the cache holds, and the best K that have ended."""

    def __init__(self, text: Text, num_beams: int, length_penalty: float, ends: Tensor, max_new_tokens: int) -> None:
        self.text, self.K, self.alpha, self.ends, self.longest = text, num_beams, length_penalty, ends, max_new_tokens
        self.B, self.prompt = text.ids.shape
        self.alive_BK = torch.full((self.B, num_beams), -torch.inf, device=text.ids.device)
        self.alive_BK[:, 0] = 0.0  # all beams are equal at first: only one is continued
        self.ended: list[list[tuple[float, Tensor]]] = [[] for _ in range(self.B)]

    def penalised(self, log_p: float, length: int) -> float:
        return float(log_p / ((5 + length) / 6) ** self.alpha)

    def step(self) -> bool:
        """Add one token. Returns whether no live beam can still win."""
        logits = self.text.next_logits()
        if len(logits) == self.B and self.K > 1:  # after the prompt, which is read once per row
            rows = torch.arange(self.B, device=logits.device).repeat_interleave(self.K)
            logits = logits[rows]
            self.text.select(rows)
        log_p = logits.float().log_softmax(-1).view(self.B, self.K, -1) + self.alive_BK[..., None]
        V = log_p.shape[-1]
        best, index = log_p.flatten(1).topk(min(2 * self.K, self.K * V))  # with one end token, K of 2 K do not end
        beams, tokens = index // V, index % V
        ending = torch.isin(tokens, self.ends)
        for row, i in ending.nonzero().tolist():
            if i < self.K and best[row, i] > -torch.inf:
                ids = torch.cat((self.text.ids[row * self.K + int(beams[row, i])], tokens[row, i : i + 1]))
                length = len(ids) - self.prompt
                self.ended[row].append((self.penalised(float(best[row, i]), length), ids))
                self.ended[row] = sorted(self.ended[row], key=lambda e: -e[0])[: self.K]
        self.alive_BK, kept = best.masked_fill(ending, -torch.inf).topk(self.K)
        rows = beams.gather(1, kept) + torch.arange(self.B, device=beams.device)[:, None] * self.K
        self.text.select(rows.flatten())
        self.text.append(tokens.gather(1, kept).flatten())
        # At best a live beam keeps its probability up to the longest length.
        limits = [self.penalised(log_p, self.longest) for log_p in self.alive_BK[:, 0].tolist()]
        return all(len(e) == self.K and limit <= e[-1][0] for e, limit in zip(self.ended, limits, strict=True))

    def best(self, pad: int) -> Tensor:
        """For each row the best ended beam, else the best live one."""
        chosen = [ended[0][1] if ended else self.text.ids[row * self.K] for row, ended in enumerate(self.ended)]
        return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
