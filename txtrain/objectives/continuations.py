"""A model's continuations of a few prompts, which show what it has learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.model.config import ModelConfig
from txtrain.objectives.base import Shown
from txtrain.objectives.spans import SENTINEL
from txtrain.run_config import RunConfig


def encode(tokenizer: Tokenizer, prompt: str, answers: bool = False) -> list[int]:
    """Token ids of a prompt, as a document begins in training; answers: as an encoder's source, sentinels included."""
    if answers:
        pieces = [
            (piece, tokenizer.find(piece) if SENTINEL.fullmatch(piece) else None) for piece in SENTINEL.split(prompt)
        ]
        return [
            *(i for text, known in pieces for i in (tokenizer.encode(text) if known is None else [known])),
            tokenizer.eos_id
        ]
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return [begin, *tokenizer.encode(prompt)]


def continuations(module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
    """Continuations of config.sample's prompts, or of the first words of the first validation documents."""
    tokenizer, wanted = data.tokenizer, config.sample
    if tokenizer is None or wanted.max_new_tokens == 0:
        return []
    made = []
    for prompt in wanted.prompts or (data.prompts(wanted.n) if wanted.n else []):
        ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(prompt)]
        made.append(Shown(prompt, tokenizer.decode(said(module, tokenizer, ids, config, check))))
    return made


def said(
    module: Any, tokenizer: Tokenizer, ids: Sequence[int], config: RunConfig, check: Callable[[], None]
) -> list[int]:
    """The tokens with which the model continues `ids`, or answers them, up to the end token.

    The seed is always the same, so that only the model changes. check: called after each token; may raise to stop.
    """
    from txtrain.model.generation import generate

    wanted, limit = config.sample, config.model.max_seq_len
    answers = config.model.topology == "encoder_decoder"
    ids = list(ids)[-limit:] if answers else list(ids)[-(limit - 1) :]
    begin = 1 if answers else len(ids)  # an answer follows a start token
    out = generate(
        module.model, torch.tensor([ids], device=module.device),
        max_new_tokens=min(wanted.max_new_tokens, limit - begin), temperature=wanted.temperature,
        eos_token_id=(ends := end_tokens(config.model, tokenizer)), seed=config.seed, on_token=lambda *_: check()
    )
    return [token for token in out[0, begin:].tolist() if token not in ends]


def end_tokens(model: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's token, then the model's others, such as the ends of turns."""
    given = model.eos_token_id
    others = given if isinstance(given, tuple) else () if given is None else (given,)
    return tuple(dict.fromkeys((tokenizer.eos_id, *others)))
