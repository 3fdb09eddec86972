"""Rows of text that grow by a token at a time: what greedy decoding, sampling and beam search share."""

# B rows, P prompt tokens, T new tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.ground.convert import build
from txtrain.model.config import ModelConfig, Sampling
from txtrain.model.flops import GROWTH
from txtrain.model.inputs import INTEGERS, outside, require

Rows = Sequence[Sequence[int]]  # token ids, without padding


@runtime_checkable
class Ranks(Protocol):
    """The processes over which a model is laid; `txtrain.LitModule.parallel` is one. All run as many forwards."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""

    def most(self, n: int) -> int:
        """The maximum of n over all ranks."""


class OneRank:
    """This process alone."""

    def any(self, flag: bool) -> bool:
        return flag

    def most(self, n: int) -> int:
        return n


class Written(NamedTuple):
    """What was generated for one row.

    Attributes:
        ids: new tokens, the end token among them, [T].
        log_probs: of each under the distribution that it was drawn from (temperature, top_k, ..., repetition_penalty);
            at temperature 0 and of beams the model's own, after the penalty. [T], at least float32.
        ended: by an end token or a stop string; else it was truncated at max_new_tokens.
    """

    ids: Tensor
    log_probs: Tensor
    ended: bool


class Columns:
    """[B, T], to which columns are appended; its buffer grows by GROWTH of them at a time."""

    def __init__(self, n_rows: int, dtype: torch.dtype, device: torch.device, fill: float = 0) -> None:
        self._buffer, self.length = torch.empty(n_rows, 0, dtype=dtype, device=device), 0
        self._fill = fill

    @property
    def values(self) -> Tensor:
        return self._buffer[:, : self.length]

    def append(self, values: Tensor, rows: Tensor | None = None) -> None:
        """A column, or its values in these rows; the others get `fill`."""
        if self.length == self._buffer.shape[1]:
            self._buffer = F.pad(self._buffer, (0, GROWTH), value=self._fill)
        self._buffer[slice(None) if rows is None else rows, self.length] = values
        self.length += 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self._buffer = self._buffer[rows]


class Text:
    """Rows and their cache: of a decoder the rows themselves grow; with an encoder, which reads them, their answers.

    begun: what each row begins with, its prompt or an answer's start token; `select` does not change it.

    whole: without a cache; each token is of a forward over the row, one alone, padded behind to that length.

    Raises:
        ConfigError: prompt and new tokens exceed the model's learned positions.
    """

    def __init__(
        self, model: Any, rows: Rows, max_new_tokens: int, device: torch.device, whole: int | None = None
    ) -> None:
        self.model, self.whole = model, whole
        assert whole is None or len(rows) == 1
        self.past: Any = None
        self._new = Columns(len(rows), torch.int64, device)
        self.answers = model.encoder is not None
        self._banned = torch.tensor(model.banned_tokens, dtype=torch.long, device=device)
        ids, mask = padded(rows, device, left=not self.answers)
        self.begun = [[*row] for row in rows]
        self._given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        self._next_B1: Tensor | None = None  # positions of the next tokens, where they are not the cache's length
        if self.answers:
            self._given["decoder_input_ids"] = model.shifted_right(ids[:, :1])
            self.begun = self._given["decoder_input_ids"].tolist()
        elif mask is not None:
            self._given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            self._next_B1 = mask.sum(1, keepdim=True)
        if model.prefix_prompts and not self.answers:
            self._given["prefix_mask"] = torch.ones_like(ids) if mask is None else mask
        limit, length = model.max_positions, 1 if self.answers else ids.shape[1]
        if limit is not None and length + max_new_tokens > limit:
            most = f"{max(limit - length, 0)} after a prompt of {length} tokens"
            why = f"the model has {limit} learned positions"
            raise ConfigError(f"`max_new_tokens` must be at most {most}, but is {max_new_tokens} instead: {why}.")

    @property
    def new(self) -> Tensor:
        """The tokens appended so far, [B, T]."""
        return self._new.values

    def next_logits(self) -> Tensor:
        """Logits of the next token, [B, V]."""
        if self.whole is not None:
            ids_1T = torch.cat((self._given["input_ids"], self.new), dim=1)
            length = ids_1T.shape[1]
            whole_1V: Tensor = self.model(input_ids=F.pad(ids_1T, (0, self.whole - length))).logits[:, length - 1]
            return whole_1V
        given = self._given if self.past is None else self._last()
        # Autograd then does not even look at the operations; sharded parameters and compiled blocks want it to.
        watched = torch.distributed.is_initialized() or self.model.compiled
        with torch.no_grad() if watched else torch.inference_mode():
            out = self.model(**given, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def allowed(self, scores_BV: Tensor) -> Tensor:
        """The scores of tokens, -inf for those that the model must not write."""
        return scores_BV.index_fill(1, self._banned, -torch.inf) if len(self._banned) else scores_BV

    def _last(self) -> dict[str, Any]:
        last_B1 = self.new[:, -1:]
        if self.answers:
            return {"decoder_input_ids": last_B1}
        positions = None if self._next_B1 is None else self._next_B1 + (self._new.length - 1)
        return {"input_ids": last_B1, "position_ids": positions}

    def append(self, new_B: Tensor) -> None:
        self._new.append(new_B)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; beam search repeats rows."""
        self._new.select(rows)
        self._next_B1 = None if self._next_B1 is None else self._next_B1[rows]
        if self.past is not None:
            self.past.select(rows)


class StopStrings:
    """Whether a text holds one of some strings by its newest token."""

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.strings, self._decode = strings, decode
        # A token is a byte or more, except special ones and the halves of a character: some more are looked at.
        self._window = 8 + max((len(text.encode()) for text in strings), default=0)

    def ended(self, new_BT: Tensor) -> Tensor:
        """Of rows of new tokens, which have ended, [B]."""
        if not self.strings:
            return torch.zeros(len(new_BT), dtype=torch.bool, device=new_BT.device)
        found = [self.holds(row) for row in new_BT[:, -self._window :].tolist()]
        return torch.tensor(found, dtype=torch.bool, device=new_BT.device)

    def holds(self, ids: list[int]) -> bool:
        text = self._decode(ids[-self._window :])
        return any(string in text for string in self.strings)


def padded(rows: Rows, device: torch.device, left: bool, value: int = 0) -> tuple[Tensor, Tensor | None]:
    """Ids [B, P] and their attention mask, None where nothing is padded."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    fill = [[value] * gap for gap in gaps]
    ids = [[*gap, *row] if left else [*row, *gap] for gap, row in zip(fill, rows, strict=True)]
    if not any(gaps):
        return torch.tensor(ids, device=device), None
    index, lengths = torch.arange(width, device=device), torch.tensor([[len(row)] for row in rows], device=device)
    mask = index >= width - lengths if left else index < lengths
    return torch.tensor(ids, device=device), mask.long()


def rows_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The rows of [B, P] without their padding."""
    if attention_mask is None:
        return input_ids.tolist()
    return [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]


def first_columns(model: Any, input_ids: Tensor) -> Tensor:
    """What generated tokens follow in a result: the prompts, or an answer's start token, [B, P]."""
    return input_ids if model.encoder is None else model.shifted_right(input_ids[:, :1])


def check(model: Any, input_ids: Any, attention_mask: Any, **how: Any) -> Sampling:
    """The sampling that `how` describes, or `generate`'s ConfigErrors."""
    made = build(Sampling, {name: value.item() if hasattr(value, "item") else value for name, value in how.items()})
    if not isinstance(getattr(model, "config", None), ModelConfig):
        what = "a model of txtrain.build_model or txtrain.load_pretrained"
        raise ConfigError(f"`model` must be {what}, but is {type(model).__name__} instead.")
    if model.config.topology == "encoder":
        raise ConfigError("`model` must be a decoder, or have one beside its encoder, but is an encoder alone.")
    if model.head.pools:
        raise ConfigError("`model` must have a head over the vocabulary, but has one result per row instead.")
    require("input_ids", input_ids, {"B": None, "P": None}, INTEGERS, ", with at least one token per row")
    if error := outside("input_ids", input_ids, model.config.vocab_size):
        raise error
    if attention_mask is not None:
        B, P = input_ids.shape
        require("attention_mask", attention_mask, {"B": B, "P": P})
        if not bool(attention_mask.any(1).all()):
            raise ConfigError("`attention_mask` must have a 1 in every row: a prompt has at least one token.")
    return made


def end_tokens(
    model: Any, eos_token_id: int | tuple[int, ...] | str | None, pad_token_id: int | None, device: torch.device
) -> tuple[Tensor, int]:
    """The tokens that end a row, and the one that fills it afterwards.

    Raises:
        ConfigError: they are not tokens, or the padding is outside the vocabulary.
    """
    n, given = model.config.vocab_size, model.config.eos_token_id if eos_token_id == "config" else eos_token_id
    ends = given if isinstance(given, (tuple, list)) else () if given is None else (given,)
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ConfigError(f"`eos_token_id` must be a token, some tokens, 'config' or None, but is {given!r} instead.")
    pad = next((v for v in (pad_token_id, model.config.pad_token_id, *ends) if v is not None), 0)
    if type(pad) is not int or pad < 0 or (pad >= n and any(end < n for end in ends)):
        raise ConfigError(f"`pad_token_id` must be from 0 to {n - 1}, but is {pad!r} instead.")
    return torch.tensor(ends, dtype=torch.long, device=device), pad


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters and buffers in that dtype within; afterwards those of before. None: as they are.

    Raises:
        ConfigError: they are sharded over processes.
    """
    tensors = [] if dtype is None else [*model.parameters(), *model.buffers()]
    kept = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype != dtype]
    if any(type(data) is not Tensor for _, data in kept):
        raise ConfigError("`dtype` must be None for a model that is laid over processes: it keeps its dtype.")
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
