"""Continuations of a few prompts, so that one sees what the model has learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from txtrain.config import Train
from txtrain.objectives.base import Shown


def continuations(module: Any, data: Any, config: Train, check: Callable[[], None]) -> list[Shown]:
    """Prompt and continuation, for config.sample's prompts or the first words of the first validation documents.

    The same seed each time, so that what changes is the model. `check` is called after each token and may raise to stop.
    """
    from txtrain.generation import generate

    tokenizer, wanted = data.tokenizer, config.sample
    if tokenizer is None or wanted.max_new_tokens == 0:
        return []
    made = []
    room = config.model.max_seq_len - 1
    for prompt in wanted.prompts or (data.prompts(wanted.n) if wanted.n else []):
        ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(prompt)][-room:]
        out = generate(
            module.model,
            torch.tensor([ids], device=module.device),
            max_new_tokens=min(wanted.max_new_tokens, room + 1 - len(ids)),
            temperature=wanted.temperature,
            eos_token_id=tokenizer.eos_id,
            seed=config.seed,
            on_token=lambda *_: check(),
        )
        begin = len(ids) if config.model.topology == "decoder" else 1  # a decoder beside an encoder answers from its start token on
        new = [token for token in out[0, begin:].tolist() if token != tokenizer.eos_id]
        made.append(Shown(prompt, tokenizer.decode(new)))
    return made
