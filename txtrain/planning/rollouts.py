"""What sampling adds to a run, estimated: every completion is of the maximum length, and a token waits for memory."""

from __future__ import annotations

import dataclasses as dc
import math

from txtrain.config.schema import Train
from txtrain.model import flops as costs
from txtrain.model.flops import GROWTH
from txtrain.parallel.config import Layout


@dc.dataclass(frozen=True)
class Rollouts:
    """Estimates for one rank.

    Attributes:
        rows: completions that are decoded together; cache_bytes: of their keys and values, with the room to grow.
        decode_seconds: of all completions: for a token of all rows weights and cache are read from memory; where
            computing takes longer, that. forward_seconds: of their log-probabilities, the reference's too. Without
            rewards and exchanges between processes.
        update_seconds: of one update; `updates` of them follow on a rollout.
    """

    n_prompts: int
    n_completions: int
    max_new_tokens: int
    rows: int
    cache_bytes: int
    decode_seconds: float
    forward_seconds: float
    update_seconds: float
    updates: int

    @property
    def seconds(self) -> float:
        return self.decode_seconds + self.forward_seconds


def rollouts(
    config: Train, layout: Layout, flops_per_second: float, bandwidth: float, update_seconds: float
) -> Rollouts | None:
    """None: nothing is sampled. flops_per_second: of one device, as reached; bandwidth: bytes a second."""
    asked, model = config.objective.rollout(config), config.model
    if asked is None:
        return None
    half = config.trainer.precision != "32-true"
    mine = math.ceil(asked.n_completions / layout.data)
    rows = min(config.data.micro_batch_size or mine, mine)
    length, size = asked.prompt_len + asked.max_new_tokens, 2 if half else 4
    room = asked.prompt_len + math.ceil(asked.max_new_tokens / GROWTH) * GROWTH  # a buffer grows by so much
    weights = sum(model.n_params_by_part().values()) * (2 if config.trainer.precision == "bf16-true" else 4)
    held = rows * model.cache_bytes(length - asked.max_new_tokens // 2, bytes_per_value=size)  # in the mean
    forward = sum(costs.forward_by_part(model, length, None, dense=False).values())
    speed, batches = flops_per_second * layout.tensor, math.ceil(mine / rows)
    a_token = max((weights + held) / layout.tensor / bandwidth, rows * forward / length / speed)
    read = mine * forward * asked.prompt_len / length / (asked.n_completions / asked.n_prompts)
    return Rollouts(
        asked.n_prompts, asked.n_completions, asked.max_new_tokens, rows,
        rows * model.cache_bytes(room, bytes_per_value=size) // layout.tensor,
        batches * asked.max_new_tokens * a_token + read / speed, asked.forwards * mine * forward / speed,
        update_seconds, asked.updates,
    )
