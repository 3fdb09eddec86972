"""Generation with a key-value cache: greedy or sampled, one prompt or a left-padded batch."""

# B rows, P prompt tokens, T tokens so far, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    """Continue each row of `input_ids`.

    Args:
        input_ids: [B, P]; shorter prompts are padded on the left.
        attention_mask: [B, P], 0 for that padding; None: no padding.
        temperature: 0 takes the most likely token; otherwise logits are divided by it, cut by top_k, top_p (1904.09751) and
            min_p (2407.01082), in that order, and sampled.
        eos_token_id: a row stops after it (or any of several); by default `model.config.eos_token_id`; None: never.
        pad_token_id: fills a row that has stopped; by default the configured one, else the end token.
        seed: of the sampling; None draws from torch's generator.
        on_token: called with each step's new tokens, [B].

    Returns:
        Prompt and new tokens, [B, P + at most max_new_tokens].

    Raises:
        ValueError: a prompt is empty or padded on the right, or prompt and new tokens exceed the model's learned positions.
    """
    _check(model, input_ids, attention_mask, max_new_tokens)
    ends = model.config.eos_token_id if eos_token_id == "config" else eos_token_id
    ends = (ends,) if isinstance(ends, int) else ends or ()
    pad = next((v for v in (pad_token_id, model.config.pad_token_id, *ends) if v is not None), 0)
    ends_E = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    padded = attention_mask is not None and not bool(attention_mask.all())
    mask = attention_mask if padded else None
    with evaluating(model):
        ids, step_ids, past = input_ids, input_ids, None
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
            out = model(step_ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            new_B = choose(out.logits[:, -1], temperature, top_k, top_p, min_p, generator)
            if ends:
                new_B = new_B.masked_fill(done, pad)
                done = done | torch.isin(new_B, ends_E)
            step_ids = new_B[:, None]
            ids = torch.cat((ids, step_ids), dim=1)
            mask = None if mask is None else torch.cat((mask, mask.new_ones(mask.shape[0], 1)), dim=1)
            if on_token is not None:
                on_token(new_B)
            if ends and bool(done.all()):
                break
    return ids


def _check(model: Any, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"`input_ids` must be [rows, tokens] with at least one token, but is {list(input_ids.shape)} instead.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, but is {max_new_tokens} instead.")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"`attention_mask` must have the shape of input_ids, {list(input_ids.shape)}, but has {list(attention_mask.shape)} instead.")
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("`attention_mask` must end in 1 in every row: prompts are padded on the left.")
    limit = model.max_positions
    if limit is not None and input_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"`max_new_tokens` must be at most {max(limit - input_ids.shape[1], 0)} after a prompt of {input_ids.shape[1]} tokens, but is "
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
    logits_BV = logits_BV.float() / temperature
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
