"""Which parameters a run trains, and the FLOPs of its steps: frozen parameters cost no gradients."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Iterator, Sequence

from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.model import flops
from txtrain.model.trace.tape import Tape, Value
from txtrain.planning.memory.batch_shapes import batch_of, unknown
from txtrain.planning.memory.forward import Traced
from txtrain.registry import chosen, unstated

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
    found = config.model.n_params_by_part()
    if not config.transforms:
        return found
    sizes = (
        _built(config)
        if [*unknown(config), *untraced(config)] else {p.name: p.n for p in _traced(config, config.lengths).parameters}
    )
    if problems := [p for transform in config.transforms for p in transform.problems(sizes)]:
        raise ConfigError(*problems)
    for name, n in sizes.items():
        found[part_of(name)] -= 0 if config.trains(name) else n
    return found


def part_of(name: str) -> str:
    """The part of the model to which a parameter belongs."""
    first, *rest = name.split(".")
    if first in ("mtp", "head", "position"):
        return first
    named = next((part for part in ("cross_attention", "attention", "ffn", "position") if part in rest), None)
    return named or ("embedding" if first.endswith("embedding") else "norms")


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
    return Work(sum(forward.values()) + tape.backward_flops / n, tape.recomputed / n)


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

    def around(block: Callable[..., Value], inputs: Sequence[Value]) -> Value:
        before, number, again = tape.forward_flops, next(blocks), config.trainer.activation_checkpointing
        made = block(tape, *inputs)
        if made.edge and (again == "full" or (isinstance(again, int) and number % again == 0)):
            tape.recomputed += tape.forward_flops - before
        return made

    Traced(config.model, batch, tape, around).loss()
    return tape


def _built(config: Train) -> dict[str, int]:
    import torch

    from txtrain.model.build import build_model

    with torch.device("meta"):
        return {name: math.prod(p.shape) for name, p in build_model(config.model).named_parameters()}
