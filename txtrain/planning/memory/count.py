"""What one rank holds and sends in a step: the model's tape, and what the strategy adds around each block."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator

from txtrain.config.schema import Train
from txtrain.model.adapter import AdapterConfig
from txtrain.parallel.config import Layout
from txtrain.planning.memory.batch_shapes import nbytes_of, unknown
from txtrain.planning.memory.expert_parallel import DividedTape
from txtrain.planning.memory.fsdp import Shards
from txtrain.planning.memory.replicated import Copies, NotCounted
from txtrain.planning.memory.zero3 import Gathered
from txtrain.planning.memory.zero12 import Accumulated, Partitions
from txtrain.planning.trained import untraced
from txtrain.registry import chosen, unstated


@dc.dataclass(frozen=True)
class Memory:
    """Memory of one rank at the peak of a step after the first.

    Attributes:
        peak: bytes; parts: its parts: parameters, optimizer, averaged (weights of the EMA), read (weights of further
            models of the objective), batch, gradients, activations (kept for the backward), recomputed, temporaries,
            gathered (parameters of other ranks), reduced (gradients being reduced).
        held: bytes between steps.
        host, host_parts: bytes in host memory that a strategy offloads.
        communicated: bytes of each collective's whole buffer in a step; a ring sends (n - 1) / n of it, an all_reduce
            twice that.
    """

    micro_batch_size: int
    peak: int
    parts: dict[str, int]
    held: int
    communicated: dict[str, int]
    host: int = 0
    host_parts: dict[str, int] = dc.field(default_factory=dict)


def memory(config: Train, world: int, micro: int | None = None) -> Memory:
    """Memory for micro-batches of `micro` samples (None: as configured) on each of `world` ranks.

    Raises:
        NotCounted: the strategy has no closed form here, or a user's own option does not state its work.
    """
    if missing := [*unknown(config), *_unstated(config, world)]:
        raise NotCounted("; ".join(missing))
    _refuse_uncounted(config, world)
    layout = config.strategy.layout(world) if world > 1 else Layout()
    share = max(1, config.data.global_batch_size // layout.data)
    micro = min(micro or config.data.micro_batch_size or share, share)
    strategy = _strategy(config, layout)
    strategy.n_micro_batches = math.ceil(share / micro)
    strategy.step(micro, several=micro < share)
    meter, states, beside = strategy.t.meter, strategy.states() | {"read": _read(config, layout)}, strategy.update()
    static, host = {"batch": nbytes_of(config, share)}, {}
    if strategy.offloads:
        host, beside = _parts(states, beside), {}
    else:
        static = states | static
    static = _parts(static)
    in_step = _parts(meter.at_peak) if meter.peak >= sum(beside.values()) else _parts(beside)
    between = sum(static.values())
    parts = {name: static.get(name, 0) + in_step.get(name, 0) for name in static | in_step}
    sent = strategy.exchanged()
    if isinstance(strategy.t, DividedTape):  # exact for the mean over ranks, which may have different numbers of rows
        sent["all_to_all"] = round(strategy.t.travelled / micro * config.data.global_batch_size / layout.data)
    return Memory(micro, between + sum(in_step.values()), parts, between, sent, sum(host.values()), host)


def _strategy(config: Train, layout: Layout) -> Copies:
    stage, half = config.strategy.stage, config.trainer.precision == "bf16-mixed"
    if stage and layout.shard > 1:
        return (
            Gathered(config, layout) if stage == 3 else Accumulated(config, layout) if stage == 1 and half
            else Partitions(config, layout)
        )
    return Shards(config, layout) if layout.shard > 1 else Copies(config, layout)


def _read(config: Train, layout: Layout) -> int:
    """Bytes of the weights of the objective's further models, laid over the ranks; their forward is not counted."""
    objective, none, found = config.objective, AdapterConfig(type="none"), []
    for key, where in objective.models.items():
        from txtrain.checkpoint.described import describe  # here: seldom needed, and a tenth of what `plan` imports

        found.append(dc.replace(config, model=describe(where, f"objective.{key}").model, adapter=none))
    if objective.start is not None:
        found.append(config if objective.resets else dc.replace(config, adapter=none))
    return sum(_strategy(one, layout).states()["parameters"] for one in found)


def _parts(*parts: dict[str, int]) -> dict[str, int]:
    return {kind: n for found in parts for kind, n in found.items() if n}


def _unstated(config: Train, world: int) -> Iterator[str]:
    """Sentences on a user's own options that do not state their work."""
    yield from untraced(config)
    optimizer = config.optimizer
    asked = ("state_values", "counts_steps", "update_bytes", *(["update_sent"] if world > 1 else []))
    if forms := unstated("optimizer", optimizer, *asked):
        what = "what it keeps of a parameter and makes in a step"
        yield f"{chosen('optimizer', optimizer)} does not say {what} ({forms} of its Config)"


def _refuse_uncounted(config: Train, world: int) -> None:
    if config.objective.uncounted is not None:
        raise NotCounted(config.objective.uncounted)
    strategy = config.strategy
    if strategy.stage:
        if strategy.cpu_offload or world == 1:
            what = "strategy.cpu_offload=true" if strategy.cpu_offload else "one process"
            raise NotCounted(f"strategy={strategy.type} with {what}: DeepSpeed's copies there are not counted")
    elif strategy.cpu_offload and strategy.layout(world).shard == 1:
        raise NotCounted("strategy.cpu_offload=true with one shard: torch's copies to the device are not counted")
