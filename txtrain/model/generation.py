"""Generation with a key-value cache: greedy, sampled or by beams; one prompt or a batch."""

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

OnToken = Callable[[Tensor], None]


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | tuple[int, ...] | Literal["config"] | None = "config",
    pad_token_id: int | None = None,
    seed: int | None = None,
    on_token: OnToken | None = None,
) -> Tensor:
    """Continue each row of `input_ids`; with an encoder and a decoder, answer it.

    Args:
        input_ids: [B, P]; shorter prompts are padded on the left, the sources of an encoder on either side.
        attention_mask: [B, P], 0 for that padding; None: no padding.
        temperature: 0 takes the most likely token; otherwise logits are divided by it, cut by top_k, top_p (1904.09751) and
            min_p (2407.01082), in that order, and sampled.
        eos_token_id: a row stops after it (or any of several); by default `model.config.eos_token_id`; None: never.
        pad_token_id: fills a row that has stopped; by default the configured one, else the end token.
        seed: of the sampling; None draws from torch's generator.
        on_token: called with each step's new tokens, [B].

    Returns:
        Prompt and new tokens, [B, P + at most max_new_tokens]; of a decoder beside an encoder the start token and the new ones.

    Raises:
        ConfigError: an argument is out of its range, the model writes no text, a prompt is empty, padded on the right or
            not of the vocabulary, or prompt and new tokens exceed the model's learned positions.
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
    """Rows that grow by a token at a time, and the cache of what was read of them."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
        self.model = model
        self.past: Any = None
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.mask = attention_mask if padded else None
        self.source: dict[str, Any] = {}
        self.ids = input_ids
        if model.encoder is not None:
            self.source, self.mask = {"input_ids": input_ids, "attention_mask": self.mask}, None
            self.ids = model.shifted_right(input_ids[:, :1])
        _check_length(model, self.ids.shape[1], max_new_tokens)

    def next_logits(self) -> Tensor:
        """Of the token that comes next, [B, V]."""
        new = self.ids if self.past is None else self.ids[:, -1:]
        if self.model.encoder is not None:
            source = self.source if self.past is None else {}
            out = self.model(**source, decoder_input_ids=new, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        else:
            positions = None if self.mask is None else (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            out = self.model(
                new, attention_mask=self.mask, position_ids=positions, past_key_values=self.past, use_cache=True, logits_to_keep=1
            )
        self.past = out.past_key_values
        return out.logits[:, -1]

    def append(self, new_B: Tensor) -> None:
        self.ids = torch.cat((self.ids, new_B[:, None]), dim=1)
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(new_B), 1)), dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.past is not None:
            self.past.select(rows)


def end_tokens(model: Any, eos_token_id: int | tuple[int, ...] | str | None, pad_token_id: int | None, device: torch.device) -> tuple[Tensor, int]:
    """The tokens that end a row, and the one that fills it afterwards.

    Raises:
        ConfigError: they are no tokens, or what fills rows is none of the vocabulary.
    """
    given, n = (eos_token_id if eos_token_id != "config" else model.config.eos_token_id), model.config.vocab_size
    ends = given if isinstance(given, (tuple, list)) else () if given is None else (given,)
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ConfigError(f"`eos_token_id` must be a token, some tokens, 'config' or None, but is {given!r} instead.")
    pad = next((v for v in (pad_token_id, model.config.pad_token_id, *ends) if v is not None), 0)
    if type(pad) is not int or pad < 0 or (pad >= n and any(end < n for end in ends)):  # it is read again
        raise ConfigError(f"`pad_token_id` must be from 0 to {n - 1}, but is {pad!r} instead.")
    return torch.tensor(ends, dtype=torch.long, device=device), pad


def check(model: Any, input_ids: Any, attention_mask: Any, **how: Any) -> None:
    """how: of `Sampling`.

    Raises:
        ConfigError: an argument is not what `generate` says of it.
    """
    build(Sampling, {name: value.item() if hasattr(value, "item") else value for name, value in how.items()})
    if not isinstance(getattr(model, "config", None), ModelConfig):
        what = "a model of txtrain.build_model or txtrain.load_pretrained"
        raise ConfigError(f"`model` must be {what}, but is {type(model).__name__} instead.")
    if model.config.topology == "encoder":
        raise ConfigError("`model` must be a decoder, or have one beside its encoder, but is an encoder alone.")
    if model.head.pools:
        raise ConfigError("`model` must have a head over the vocabulary to generate, but has one result a row instead.")
    require("input_ids", input_ids, {"B": None, "P": None}, INTEGERS, ", with at least one token in each row")
    if error := outside("input_ids", input_ids, model.config.vocab_size):
        raise error
    if attention_mask is None:
        return
    B, P = input_ids.shape
    require("attention_mask", attention_mask, {"B": B, "P": P})
    if model.encoder is None and not bool(attention_mask[:, -1].all()):
        raise ConfigError("`attention_mask` must end in 1 in every row: prompts are padded on the left.")


def _check_length(model: Any, length: int, max_new_tokens: int) -> None:
    limit = model.max_positions
    if limit is not None and length + max_new_tokens > limit:
        raise ConfigError(
            f"`max_new_tokens` must be at most {max(limit - length, 0)} after a prompt of {length} tokens, but is "
            f"{max_new_tokens} instead: the model has {limit} learned positions."
        )


def choose(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, [B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / max(temperature, 1e-30)  # float32 has no smaller one: 0 / 0
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p is not None and top_p < 1:
        logits_BV = _nucleus(logits_BV, top_p)
    if min_p is not None:
        p_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(p_BV < min_p * p_BV.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens that together reach top_p; the most likely one always."""
    ordered, index = logits_BV.sort(descending=True)
    p = ordered.softmax(-1)
    outside = p.cumsum(-1) - p >= top_p
    return logits_BV.masked_fill(outside.scatter(1, index, outside), -torch.inf)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within; afterwards as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
