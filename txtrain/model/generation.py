"""Generation with a key-value cache: greedy or sampled; one prompt or a batch."""

# B rows, P prompt tokens, T tokens so far, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.ground.convert import build
from txtrain.model.config import ModelConfig, Sampling
from txtrain.model.inputs import INTEGERS, outside, require


@torch.no_grad()
def generate(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 32,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    eos_token_id: int | tuple[int, ...] | Literal["config"] | None = "config", pad_token_id: int | None = None,
    seed: int | None = None, on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each row of `input_ids`; with an encoder and a decoder, answer it.

    Args:
        input_ids: [B, P]; prompts are padded on the left, an encoder's source on either side.
        attention_mask: [B, P], 0 for padding; None: no padding.
        temperature: 0: the most likely token. Otherwise logits are divided by it, filtered by top_k, top_p (1904.09751)
            and min_p (2407.01082), in that order, and sampled.
        eos_token_id: a row stops after it (or any of several); by default `model.config.eos_token_id`; None: never.
        pad_token_id: fills a row that has stopped; by default the configured one, else the end token.
        seed: of the sampling; None: torch's generator.
        on_token: called with each step's new tokens, [B].

    Returns:
        Prompt and new tokens, [B, P + at most max_new_tokens]; with an encoder the start token and the new tokens.

    Raises:
        ConfigError: an argument is out of range, the model generates no text, a prompt is empty, padded on the right or
            outside the vocabulary, or prompt and new tokens exceed the model's learned positions.
    """
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    check(model, input_ids, attention_mask, max_new_tokens=max_new_tokens, **how)
    if on_token is not None and not callable(on_token):
        raise ConfigError(f"`on_token` must be a function of the new tokens or None, but is {on_token!r} instead.")
    text = Text(model, input_ids, attention_mask, max_new_tokens)
    ends_E, pad = end_tokens(model, eos_token_id, pad_token_id, input_ids.device)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    with evaluating(model):
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            new_B = choose(text.next_logits(), temperature, top_k, top_p, min_p, generator).masked_fill(done, pad)
            text.append(new_B)
            done = done | torch.isin(new_B, ends_E)
            if on_token is not None:
                on_token(new_B)
            if len(ends_E) and bool(done.all()):
                break
    return text.ids


class Text:
    """Rows that grow by one token at a time, and their cache."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
        self.model, self.ids = model, input_ids
        self.past: Any = None
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.mask = attention_mask if padded else None
        self.source: dict[str, Any] = {}
        if model.encoder is not None:
            self.source, self.mask = {"input_ids": input_ids, "attention_mask": self.mask}, None
            self.ids = model.shifted_right(input_ids[:, :1])
        limit, length = model.max_positions, self.ids.shape[1]
        if limit is not None and length + max_new_tokens > limit:
            most = f"{max(limit - length, 0)} after a prompt of {length} tokens"
            why = f"the model has {limit} learned positions"
            raise ConfigError(f"`max_new_tokens` must be at most {most}, but is {max_new_tokens} instead: {why}.")

    def next_logits(self) -> Tensor:
        """Logits of the next token, [B, V]."""
        new = self.ids if self.past is None else self.ids[:, -1:]
        if self.model.encoder is not None:
            given = {**(self.source if self.past is None else {}), "decoder_input_ids": new}
        else:
            positions = None if self.mask is None else (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            given = {"input_ids": new, "attention_mask": self.mask, "position_ids": positions}
        out = self.model(**given, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[:, -1]

    def append(self, new_B: Tensor) -> None:
        self.ids = torch.cat((self.ids, new_B[:, None]), dim=1)
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(new_B), 1)), dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; beam search repeats rows."""
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.past is not None:
            self.past.select(rows)


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
    if type(pad) is not int or pad < 0 or (pad >= n and any(end < n for end in ends)):  # the model reads it
        raise ConfigError(f"`pad_token_id` must be from 0 to {n - 1}, but is {pad!r} instead.")
    return torch.tensor(ends, dtype=torch.long, device=device), pad


def check(model: Any, input_ids: Any, attention_mask: Any, **how: Any) -> None:
    """Raise `generate`'s ConfigErrors. how: fields of `Sampling`."""
    build(Sampling, {name: value.item() if hasattr(value, "item") else value for name, value in how.items()})
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
    if attention_mask is None:
        return
    B, P = input_ids.shape
    require("attention_mask", attention_mask, {"B": B, "P": P})
    if model.encoder is None and not bool(attention_mask[:, -1].all()):
        raise ConfigError("`attention_mask` must end in 1 in every row: prompts are padded on the left.")


def choose(
    logits_BV: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row, [B], from logits [B, V]; see `generate`."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / max(temperature, 1e-30)  # below it float32 would divide 0 by 0
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p is not None and top_p < 1:  # the smallest set of most likely tokens that together reach top_p
        ordered, index = logits_BV.sort(descending=True)
        p = ordered.softmax(-1)
        cut = p.cumsum(-1) - p >= top_p
        logits_BV = logits_BV.masked_fill(cut.scatter(1, index, cut), -torch.inf)
    if min_p is not None:
        p_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(p_BV < min_p * p_BV.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
