"""The largest micro-batch that fits, and what would make a run fit."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

from txtrain.config.schema import Train
from txtrain.parallel.config import ShardedConfig
from txtrain.planning.memory.count import memory
from txtrain.registry import TABLE


def share_of(config: Train, world: int) -> int:
    """Samples of a step per rank; at least one."""
    data: int = config.strategy.layout(world).data
    return max(1, int(config.data.global_batch_size) // data)


def largest_micro_batch(config: Train, world: int, room: int) -> int | None:
    """The largest divisor of a rank's share whose step fits into `room` bytes; None: not even one sample fits."""
    share = share_of(config, world)
    if memory(config, world, share).peak <= room:  # without accumulation there are no earlier gradients
        return share
    divisors = [n for n in range(1, share) if share % n == 0]
    low, high = 0, len(divisors)  # divisors[:low] fit, divisors[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if memory(config, world, divisors[middle]).peak <= room else (low, middle)
    return divisors[low - 1] if low else None


def remedy(config: Train, world: int, room: int) -> str:
    """The first change that makes it fit: micro-batch, gradients in shards between micro-batches, activation
    checkpointing, strategy, more ranks."""
    for words, changed, processes in _changes(config, world):
        micro = largest_micro_batch(changed, processes, room)
        if micro is not None:
            given = changed.data.micro_batch_size or share_of(changed, processes)
            asked = [*words, *([f"data.micro_batch_size={micro}"] if micro != given else [])]
            return f"It fits with {' '.join(asked)}."
    return (
        "It fits on no number of processes up to 4,096 with strategy=fsdp: one block alone is too large. A model like "
        "this needs tensor parallelism."
    )


def _changes(config: Train, world: int) -> Iterator[tuple[list[str], Train, int]]:
    again: Any = dc.replace(config.trainer, activation_checkpointing="full")
    is_on = config.trainer.activation_checkpointing == "full"
    yield from _reduced([], config, world)
    yield from _reduced(["trainer.activation_checkpointing=full"], dc.replace(config, trainer=again), world)
    sharded = TABLE["strategy"]["fsdp"].config(type="fsdp")
    words = [] if type(config.strategy) is type(sharded) else [f"strategy={sharded.type}"]
    if words and world > 1:
        yield from _reduced(words, dc.replace(config, strategy=sharded), world)
    words += [] if is_on else ["trainer.activation_checkpointing=full"]
    n = world
    while n <= 4096:
        size = max(n, config.data.global_batch_size // n * n)
        data = dc.replace(config.data, global_batch_size=size, micro_batch_size=None)
        also = [f"data.global_batch_size={size}"] if size != config.data.global_batch_size else []
        changed = dc.replace(config, strategy=sharded, trainer=again, data=data)
        yield from _reduced([*words, f"on {n:,} processes", *also], changed, n)
        n *= 2


def _reduced(words: list[str], config: Train, world: int) -> Iterator[tuple[list[str], Train, int]]:
    """As it is; then, where the strategy can, with gradients reduced in each micro-batch."""
    yield words, config, world
    strategy: Any = config.strategy
    if world > 1 and isinstance(strategy, ShardedConfig) and not strategy.reduce_each_micro_batch:
        each = dc.replace(strategy, reduce_each_micro_batch=True)
        yield [*words, "strategy.reduce_each_micro_batch=true"], dc.replace(config, strategy=each), world
