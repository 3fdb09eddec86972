"""Supervised fine-tuning: prediction of the assistant's turns of conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txtrain.data.chat.template import Template
from txtrain.objectives.base import Shown
from txtrain.objectives.causal_lm import CausalLM
from txtrain.objectives.continuations import said
from txtrain.run_config import RunConfig


class SFT(CausalLM):
    """Cross-entropy of the trained tokens of a global batch, in nats per token: longer answers weigh more."""

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        return answers(module, data, config, check)


def answers(module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
    """Answers to config.sample's prompts, or to the beginnings of the first validation conversations."""
    tokenizer, wanted = data.tokenizer, config.sample
    if tokenizer is None or wanted.max_new_tokens == 0:
        return []
    if wanted.prompts and tokenizer.chat_template is not None:
        with Template(tokenizer) as template:
            asked = [template.prompt([{"role": "user", "content": prompt}]) for prompt in wanted.prompts]
        given = [tokenizer.as_written(text).ids for text in asked]
    elif wanted.prompts:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        given = [[*begin, *tokenizer.encode(prompt)] for prompt in wanted.prompts]
    else:
        given = data.before_trained(wanted.n)
    made = []
    for ids in given:
        answer = said(module, tokenizer, ids, config, check)
        made.append(Shown(tokenizer.decode(ids, special=True), tokenizer.decode(answer)))
    return made
