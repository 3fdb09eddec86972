"""What one process holds and sends in a step, counted: the model's tape, and what the strategy does around each block."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import TYPE_CHECKING

from txtrain.memory import updates
from txtrain.memory.batch import nbytes_of
from txtrain.memory.copies import Copies
from txtrain.memory.shards import Shards
from txtrain.parallel.config import Layout

if TYPE_CHECKING:
    from txtrain.config import Train


@dc.dataclass(frozen=True)
class Memory:
    """Of one process, at the fullest moment of a step after the first.

    Attributes:
        peak: bytes; parts: what they are: parameters, optimizer, averaged (weights), batch, gradients, activations (kept for the backward), recomputed,
            temporaries, gathered (parameters of others), reduced (gradients on their way).
        held: bytes between steps.
        host, host_parts: the same of the processor's memory, where a strategy keeps something there and computes elsewhere.
        communicated: bytes of each collective's whole buffer in a step; a ring sends (n - 1) / n of it, an all_reduce twice that.
    """

    micro_batch_size: int
    peak: int
    parts: dict[str, int]
    held: int
    communicated: dict[str, int]
    host: int = 0
    host_parts: dict[str, int] = dc.field(default_factory=dict)


class NotCounted(Exception):
    """A choice whose memory has no closed form here; the text says which and why."""


def memory(config: Train, world: int, micro: int | None = None) -> Memory:
    """Counted for micro-batches of `micro` samples (None: as configured) on each of `world` processes.

    Raises:
        NotTraced: an option of the user's own does not say what it computes.
        NotCounted: a strategy or an optimizer has no closed form here.
    """
    _refuse_uncounted(config, world)
    layout = config.strategy.layout(world) if world > 1 else Layout()
    share = max(1, config.data.global_batch_size // layout.data)
    micro = min(micro or config.data.micro_batch_size or share, share)
    strategy = Shards(config, layout) if layout.shard > 1 else Copies(config, layout)
    strategy.n_micro_batches = math.ceil(share / micro)
    strategy.step(micro, several=micro < share)
    meter, held = strategy.t.meter, strategy.held
    optimizer = updates.states(config.optimizer, held, strategy.stored)
    if optimizer is None:
        raise NotCounted(f"optimizer={config.optimizer.type} does not say what it keeps of a parameter (`state_values` of its config)")
    states = {
        "parameters": strategy.stored * sum(h.n for h in held),
        "optimizer": optimizer,
        "averaged": updates.averaged(config.ema, held),
    }
    beside = {"gradients": strategy.gradients, "temporaries": updates.made(config.optimizer, held, strategy.stored)}
    static = {"batch": nbytes_of(config, share)}
    host = {}
    if strategy.offloads:
        host, beside = _parts(states, beside), {}
    else:
        static = states | static
    static = _parts(static)
    in_step = _parts(meter.at_peak) if meter.peak >= sum(beside.values()) else _parts(beside)
    between = sum(static.values())
    sent = strategy.communicated()
    for name, n in config.optimizer.update_sent(held, strategy.stored).items():
        sent[name] = sent.get(name, 0) + n
    return Memory(micro, between + sum(in_step.values()), static | in_step, between, sent, sum(host.values()), host)


def _parts(*parts: dict[str, int]) -> dict[str, int]:
    return {kind: n for found in parts for kind, n in found.items() if n}


def _refuse_uncounted(config: Train, world: int) -> None:
    strategy = config.strategy
    if hasattr(strategy, "stage"):
        raise NotCounted(f"strategy={strategy.type}: what DeepSpeed's engine holds is not counted yet")
    if getattr(strategy, "cpu_offload", False) and strategy.layout(world).shard == 1:
        raise NotCounted("strategy.cpu_offload=true with one shard: what torch copies to the device and back is not counted")
