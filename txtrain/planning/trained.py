"""Which parameters a run trains, and the FLOPs of its steps: frozen parameters cost no gradients."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.model import flops
from txtrain.model.adapter import factor_of
from txtrain.model.trace.tape import Tape, Value
from txtrain.model.transform import transform
from txtrain.planning.memory.batch_shapes import batch_of, unknown
from txtrain.planning.memory.forward import Traced, recomputes
from txtrain.registry import chosen, unstated

ADAPTER = "adapter"  # the part of what is added to a model

STATES = {  # methods that a component's Config needs for its work to be counted
    "attention": ("trace",),
    "ffn": ("trace",),
    "norm": ("trace_of",),
    "norm_position": ("joined",),
    "position": ("trace_sum", "trace_rotation", "trace_bias"),
}


@dc.dataclass(frozen=True)
class Work:
    """FLOPs of a sample in training. once: forward and backward; again: recomputed by activation checkpointing."""

    once: float
    again: float


def untraced(config: Train) -> Iterator[str]:
    """Sentences on a user's own options that do not state their forward."""
    for axis, component in config.model.components():
        if forms := unstated(axis, component, *STATES.get(axis, ())):
            where = f"{forms} of its Config; plan.simulate=true looks at the module"
            yield f"{chosen(axis, component)} does not say what it computes ({where})"


def n_trained_by_part(config: Train) -> dict[str, int]:
    """Trained parameters by part, named as in `ModelConfig.n_params_by_part`. A user's own options are built to count.

    Raises:
        ConfigError: a transform does not fit the model's parameters.
    """
    found = config.model.n_params_by_part() | {ADAPTER: 0}
    if not config.transforms:
        return found
    sizes = _sizes(config)
    if problems := [p for t in config.transforms for p in (*t.problems(sizes), *t.shortcomings(sizes))]:
        raise ConfigError(*problems)
    found[ADAPTER] = sum(n for name, n in sizes.items() if part_of(name) == ADAPTER)
    for name, n in sizes.items():
        found[part_of(name)] -= 0 if config.trains(name) else n
    return found


def part_of(name: str) -> str:
    """The part of the model to which a parameter belongs."""
    if factor_of(name) is not None:
        return ADAPTER
    first, *rest = name.split(".")
    if first in ("mtp", "head", "position"):
        return first
    named = next((part for part in ("cross_attention", "attention", "ffn", "position") if part in rest), None)
    return named or ("embedding" if first.endswith("embedding") else "norms")


def _sizes(config: Train) -> dict[str, int]:
    """Elements of each parameter, those of the adapter included, by name."""
    if [*unknown(config), *untraced(config)]:
        return _built(config)
    return {p.name: p.n for p in _traced(config, config.lengths).parameters}


class Adapted(NamedTuple):
    """The adapter's parameters, those of a token's experts alone, and the FLOPs of a sample's forward through it."""

    n: int
    active: int
    flops: float


def of_adapter(config: Train) -> Adapted:
    if not config.adapter.alone:
        return Adapted(0, 0, 0.0)
    factors = [(factor, n) for name, n in _sizes(config).items() if (factor := factor_of(name)) is not None]
    stacked = sum(n for factor, n in factors if factor.stacked)
    left_out = stacked - stacked * config.model.ffn.top_k // config.model.ffn.n_experts if stacked else 0
    total = sum(n for _, n in factors)
    known = not [*unknown(config), *untraced(config)]
    flops = _traced(config, config.lengths).adapter_flops / config.data.global_batch_size if known else 0.0
    return Adapted(total, total - left_out, flops)


def work(config: Train, lengths: tuple[int, int | None], trains: Callable[[str], bool] | None = None) -> Work:
    """FLOPs of a sample. With a user's own options that do not state their work, all parameters count as trained.

    lengths: positions of the source, and of the target for an encoder-decoder.
    trains: whether the parameter of that name is trained; None: all are.
    """
    share, again = config.objective.target_share, config.trainer.activation_checkpointing
    if trains is None or [*unknown(config), *untraced(config)]:
        once = config.model.flops_per_sample(*lengths, share)
        return Work(once, config.model.recomputed_flops(*lengths, checkpointing=again))
    forward = flops.forward_by_part(config.model, *lengths, dense=False, training=True, target_share=share)
    tape = _traced(config, lengths, trains)
    n = config.data.global_batch_size
    return Work(sum(forward.values()) + (tape.adapter_flops + tape.backward_flops) / n, tape.recomputed / n)


class _Counted(Tape):
    recomputed = 0.0


def _traced(config: Train, lengths: tuple[int, int | None], trains: Callable[[str], bool] | None = None) -> _Counted:
    """The forward of a global batch on a tape."""
    n, (source, target), blocks = config.data.global_batch_size, lengths, iter(range(1 << 62))
    batch = batch_of(config, n)
    batch = dc.replace(batch, source=source, target=target if batch.target else None)
    if batch.chosen is not None:
        batch = dc.replace(batch, chosen=round(config.objective.target_share * n * source))
    tape = _Counted(trains=trains or config.trains)
    tape.rank, tape.adapter_dropout = config.rank, config.adapter.lora_dropout

    def around(block: Callable[..., Value], inputs: Sequence[Value]) -> Value:
        before, number, again = tape.forward_flops, next(blocks), config.trainer.activation_checkpointing
        made = block(tape, *inputs)
        if made.edge and again != "selective" and recomputes(again, config.model, number):
            tape.recomputed += tape.forward_flops - before
        return made

    Traced(config.model, batch, tape, around).loss()
    return tape


def _built(config: Train) -> dict[str, int]:
    from txtrain.model.build import build_model
    from txtrain.model.shapes_only import shapes_only

    with shapes_only():
        model = build_model(config.model)
    transform(model, config.transforms)
    return {name: math.prod(p.shape) for name, p in model.named_parameters()}
