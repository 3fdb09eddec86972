"""Generation with a key-value cache: greedy, sampled or by beams; prompts of unlike lengths together."""

# B prompts, P tokens of the longest, R rows (n of each prompt), T new tokens, V vocabulary

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from txtrain.errors import ConfigError, hint
from txtrain.model.beam_search import BeamSearch
from txtrain.model.config import Sampling
from txtrain.model.decoding import (
    Columns,
    OneRank,
    Ranks,
    Rows,
    StopStrings,
    Text,
    Written,
    check,
    computing_in,
    end_tokens,
    evaluating,
    first_columns,
    padded,
    rows_of,
)
from txtrain.model.few_rows import few_rows
from txtrain.model.sampling import Chooser

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dc.dataclass(frozen=True)
class Decoding:
    """How `continue_rows` decodes.

    Attributes:
        ends: tokens that end a row.
        batch_size: rows at a time; None: all. The longest prompts come first.
        decode: from token ids to text, for `how.stop`.
        ranks: that hold the model together. They may have other rows, and other numbers of them, even none.
        on_step: called after each token with the new tokens of a batch of rows, -1 where a row has ended before;
            equally often on all ranks. It may raise to stop.
        device: of the inputs; None: that of the first parameter.
        whole: without a cache, see `Text`; needs batch_size 1.
    """

    how: Sampling
    ends: tuple[int, ...] = ()
    batch_size: int | None = None
    decode: Callable[[list[int]], str] | None = None
    ranks: Ranks = dc.field(default_factory=OneRank)
    on_step: Callable[[Tensor], None] | None = None
    device: torch.device | None = None
    whole: int | None = None

    def stops(self) -> StopStrings:
        assert self.decode is not None or not self.how.stop
        return StopStrings(self.how.stop, self.decode or str)


@torch.no_grad()
def generate(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 32,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    eos_token_id: int | tuple[int, ...] | Literal["config"] | None = "config", pad_token_id: int | None = None,
    seed: int | None = None, on_token: Callable[[Tensor], None] | None = None, *, repetition_penalty: float = 1.0,
    num_beams: int = 1, n: int = 1, stop: Sequence[str] = (), tokenizer: Any = None, batch_size: int | None = None,
    dtype: torch.dtype | str | None = None, row_index: Sequence[int] | None = None, strategy: Ranks | None = None,
) -> Tensor:
    """Continue each row of `input_ids`; with an encoder and a decoder, answer it.

    What a row becomes depends on the row, the seed and its number alone, up to rounding of the logits: not on its
    neighbours, its padding, the batches or the processes.

    Args:
        input_ids: [B, P]; padded on either side.
        attention_mask: [B, P], 0 for padding; None: no padding.
        temperature: 0: the most likely token. Otherwise logits are divided by it, filtered by top_k, top_p (1904.09751)
            and min_p (2407.01082), in that order, and sampled.
        eos_token_id: a row stops after it (or any of several); by default `model.config.eos_token_id`; None: never.
        pad_token_id: fills a row that has stopped; by default the configured one, else the end token.
        seed: of the sampling; None: drawn from torch's generator.
        on_token: called after each step with the new tokens, [R]; with batch_size, those of the rows of a batch; of
            beams, which still change, with none.
        repetition_penalty: divides positive logits of tokens that the row has, and multiplies negative ones
            (1909.05858); padding does not count.
        num_beams: above 1: beam search, see `beam_search`.
        n: samples of each prompt, or its n best beams. They follow each other: R = B * n.
        stop: a row stops with the token that completes one of these strings; needs `tokenizer`.
        tokenizer: has `decode(ids)`.
        batch_size: rows at a time; None: all.
        dtype: in which the model computes, for this call; None: that of its parameters.
        row_index: number of each row of `input_ids`, [B], by default 0, 1, ...; the j-th sample of row number i draws
            as row i * n + j.
        strategy: of the processes over which the model is laid, such as `LitModule.parallel`; all of them call this.

    Returns:
        Prompt and new tokens, [R, P + at most max_new_tokens]; with an encoder the start token and the new tokens.

    Raises:
        ConfigError: an argument is out of range, the model generates no text, a prompt is empty or outside the
            vocabulary, or prompt and new tokens exceed the model's learned positions.
    """
    how = check(
        model, input_ids, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, seed=seed, repetition_penalty=repetition_penalty, num_beams=num_beams, n=n, stop=stop,
    )
    if temperature is None:
        raise ConfigError("`temperature` must be at least 0, but is None instead.")
    _check_others(len(input_ids), on_token, stop, tokenizer, batch_size, row_index, strategy)
    ends_E, pad = end_tokens(model, eos_token_id, pad_token_id, input_ids.device)

    def step(new_B: Tensor) -> None:
        if on_token is not None:
            on_token(new_B.masked_fill(new_B < 0, pad))

    decode = None if tokenizer is None else tokenizer.decode
    ranks = OneRank() if strategy is None else strategy
    job = Decoding(how, tuple(ends_E.tolist()), batch_size, decode, ranks, step, input_ids.device)
    with computing_in(model, _dtype(dtype)):
        written = continue_rows(model, rows_of(input_ids, attention_mask), job, row_index)
    new_RT, _ = padded([row.ids.tolist() for row in written], input_ids.device, left=False, value=pad)
    return torch.cat((first_columns(model, input_ids).repeat_interleave(n, 0), new_RT), dim=1)


@torch.no_grad()
def continue_rows(
    model: Any, prompts: Rows, job: Decoding, row_index: Sequence[int] | None = None
) -> list[Written]:
    """Continue or answer each prompt, `job.how.n` times; the samples of a prompt follow each other.

    Args:
        prompts: token ids, at least one each.
        row_index: number of each prompt; by default 0, 1, ...

    Raises:
        ConfigError: prompt and new tokens exceed the model's learned positions.
    """
    how, n = job.how, job.how.n
    numbers = list(range(len(prompts)) if row_index is None else row_index)
    seed = int(torch.randint(2**63 - 1, ()) if how.seed is None else how.seed)
    device = job.device or next(model.parameters()).device
    together = len(prompts) * n if job.batch_size is None else job.batch_size
    if how.num_beams > 1 and job.batch_size is not None:  # a prompt's beams stay together
        together = max(1, job.batch_size // how.num_beams) * n
    order = list(range(len(prompts) * n))
    if together < len(order):
        order.sort(key=lambda row: (-len(prompts[row // n]), row))
    batches = [order[i : i + together] for i in range(0, len(order), together)] if order else []
    found: dict[int, Written] = {}
    # Whole rows are read as in training, so that their log-probabilities are the same to the last digit.
    with evaluating(model), few_rows(model) if job.whole is None else nullcontext():
        for i in range(job.ranks.most(len(batches))):
            rows = batches[i] if i < len(batches) else []
            # Without rows of its own a rank takes part in the forwards of the others.
            asked = list(dict.fromkeys(row // n for row in rows))
            batch = _Batch(
                [prompts[k] for k in asked] or [[0]], [asked.index(row // n) for row in rows] or [0],
                rows, [numbers[row // n] * n + row % n for row in rows] or [0],
            )
            decode = _by_beams if how.num_beams > 1 else _by_choice
            found.update(zip(rows, decode(model, batch, job, seed, device), strict=False))
    return [found[row] for row in range(len(order))]


class _Batch(NamedTuple):
    """prompts: read once each. of: index of each row's prompt. rows, numbers: of each row, among all."""

    prompts: Rows
    of: list[int]
    rows: list[int]
    numbers: list[int]


def _by_choice(model: Any, batch: _Batch, job: Decoding, seed: int, device: torch.device) -> list[Written]:
    """Greedy or sampled. Rows that have ended leave once they are an eighth of the batch: so the cache is copied a few
    times, not for every token."""
    text = Text(model, batch.prompts, job.how.max_new_tokens, device, job.whole)
    logits, of_B = text.next_logits(), torch.tensor(batch.of, device=device)
    if len(of_B) > len(batch.prompts):
        logits = logits[of_B]
        text.select(of_B)
    begun, stops, n_rows = [text.begun[k] for k in batch.of], job.stops(), len(of_B)
    chooser = Chooser(job.how, seed, batch.numbers, begun, logits.shape[-1], device)
    ends_E = torch.tensor(job.ends, dtype=torch.long, device=device)
    ids = Columns(n_rows, torch.int64, device, fill=-1)
    log_probs = Columns(n_rows, torch.promote_types(logits.dtype, torch.float32), device)
    ended_B = torch.zeros(n_rows, dtype=torch.bool, device=device)
    held_H = torch.arange(n_rows, device=device)  # the rows in the cache
    is_open_H = torch.ones_like(ended_B)  # those of them that have not ended
    for position in range(job.how.max_new_tokens):
        new_H, log_p_H = chooser(text.allowed(logits))
        text.append(new_H)
        ids.append(new_H.masked_fill(~is_open_H, -1), held_H)
        log_probs.append(log_p_H.masked_fill(~is_open_H, 0.0), held_H)
        if job.on_step is not None:
            job.on_step(ids.values[: len(batch.rows), -1])
        is_open_H &= ~(torch.isin(new_H, ends_E) | stops.ended(text.new))
        ended_B[held_H] = ~is_open_H
        n_open = int(is_open_H.sum())
        if not job.ranks.any(n_open > 0) or position + 1 == job.how.max_new_tokens:
            break
        if len(held_H) > 1 and n_open <= len(held_H) * 7 // 8:
            kept = is_open_H.nonzero()[:, 0] if n_open else held_H.new_zeros(1)  # the others' forwards go on
            held_H, is_open_H = held_H[kept], is_open_H[kept]
            text.select(kept)
            chooser.select(kept)
        logits = text.next_logits()
    lengths = (ids.values >= 0).sum(1).tolist()
    rows = zip(ids.values, log_probs.values, lengths, ended_B.tolist(), strict=True)
    return [Written(row[:length], log_p[:length], ended) for row, log_p, length, ended in rows]


def _by_beams(model: Any, batch: _Batch, job: Decoding, seed: int, device: torch.device) -> list[Written]:
    text = Text(model, batch.prompts, job.how.max_new_tokens, device)
    search = BeamSearch(text, job.how, torch.tensor(job.ends, dtype=torch.long, device=device), job.stops())
    for _ in range(job.how.max_new_tokens):
        is_open = not search.step()
        if job.on_step is not None:
            job.on_step(text.new.new_empty(0))
        if not job.ranks.any(is_open):
            break
    return [written for row in search.best() for written in row]


def _check_others(
    n_prompts: int, on_token: Any, stop: Any, tokenizer: Any, batch_size: Any, row_index: Any, strategy: Any
) -> None:
    """Those arguments of `generate` that are no fields of `Sampling`."""
    if on_token is not None and not callable(on_token):
        raise ConfigError(f"`on_token` must be a function of the new tokens or None, but is {on_token!r} instead.")
    if stop and not callable(getattr(tokenizer, "decode", None)):
        raise ConfigError("`tokenizer` must be given with stop, an object with `decode(ids)`: strings end texts.")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"`batch_size` must be at least 1 or None, but is {batch_size!r} instead.")
    numbers = [] if row_index is None else list(row_index)
    if row_index is not None and (len(numbers) != n_prompts or any(type(i) is not int or i < 0 for i in numbers)):
        raise ConfigError(f"`row_index` must be {n_prompts} integers from 0, one for each row, but is {row_index!r}.")
    if strategy is not None and not isinstance(strategy, Ranks):
        what = "the strategy over whose processes the model is laid, such as LitModule.parallel, or None"
        raise ConfigError(f"`strategy` must be {what}, but is {strategy!r} instead.")


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, given) if isinstance(given, str) and given in DTYPES else given
    if found is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    near = hint(str(given), DTYPES)
    raise ConfigError(f"`dtype` must be one of {', '.join(DTYPES)} or None, but is {given!r} instead.{near}")
