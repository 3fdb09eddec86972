"""`txtrain plan`: the cost of a run, in closed form. Nothing is built; no torch."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator
from typing import Any

from txtrain.config import hardware
from txtrain.config.schema import Train
from txtrain.config.schema_of_plan import Plan, PlanConfig
from txtrain.config.units import bytes_of, seconds_of
from txtrain.errors import ConfigError
from txtrain.ground.convert import checked
from txtrain.model import flops as costs
from txtrain.model.config import ModelConfig
from txtrain.parallel.config import Layout, problems, processes
from txtrain.planning.memory.batch_shapes import unknown
from txtrain.planning.memory.count import memory
from txtrain.planning.memory.fit import largest_micro_batch, remedy
from txtrain.planning.memory.replicated import NotCounted
from txtrain.planning.rollouts import Rollouts, rollouts
from txtrain.planning.trained import ADAPTER, n_trained_by_part, of_adapter, untraced, work
from txtrain.registry import chosen, is_own, unstated

BYTES = {"bfloat16": 2, "float32": 4}


@dc.dataclass(frozen=True)
class Figures:
    """What `txtrain.plan` returns. FLOPs count a window as its width; see `txtrain.model.flops`.

    Attributes:
        n_params, n_active_params: parameters, and those used for one token (fewer with experts).
        n_trained_params, trained_by_part: parameters with a gradient (fewer with `freeze` or an adapter).
        params_by_part: embedding, position, attention, ffn, norms, head, mtp, adapter.
        seq_len, target_len: positions of a sample; target_len is null unless encoder-decoder.
        forward_flops_per_token, flops_per_token: without and with the backward pass; per position of an image. An
            adapter counts in the second; the first is of the model into which it is merged.
        flops_per_sample: forward and backward of one sequence, pair or image.
        flops_by_part: of one sample's forward pass in training.
        flops_missing, cache_missing: what a user's own options leave unstated, and the assumption made; null: nothing.
        cache_bytes_per_token: added by a token while no window is full; cache_bytes: after seq_len tokens.
        steps, tokens, flops, seconds: of the whole run; null if only the data or a clock could tell. seconds: with the
            rollouts, flops without.
        rollouts: what the objective samples; null: nothing.
        limited_by: the key of the limit that ends the run.
        memory, memory_by_part: peak bytes of one rank in a step (`txtrain.planning.memory.count`); null if not counted,
            for the reason memory_missing. memory_of_host, memory_of_host_by_part: what strategy.cpu_offload moves.
        refused: why `train` would refuse the batch; a rank is then counted with at least one sample.
        memory_simulated: measured on the real model, with plan.simulate=true (`txtrain.cli.plan`).
        micro_batch_size: of that step; largest_micro_batch_size: the largest that fits into plan.memory.
        communicated: bytes of the whole buffers that a rank exchanges in a step, by collective.
        device, n_devices, peak_flops, mfu: on which `seconds` is based; peak_flops of one device.
    """

    model: str
    n_params: int
    n_active_params: int
    n_trained_params: int
    params_by_part: dict[str, int]
    trained_by_part: dict[str, int]
    sample: str
    seq_len: int
    target_len: int | None
    forward_flops_per_token: float
    flops_per_token: float
    flops_per_sample: float
    flops_by_part: dict[str, float]
    flops_missing: str | None
    cache_bytes_per_token: int
    cache_bytes: int
    cache_dtype: str
    cache_missing: str | None
    global_batch_size: int
    steps: int | None
    tokens: int | None
    flops: float | None
    seconds: float | None
    rollouts: Rollouts | None
    limited_by: str | None
    device: str
    n_devices: int
    peak_flops: float
    mfu: float
    memory: int | None
    memory_by_part: dict[str, int]
    memory_of_host: int
    memory_of_host_by_part: dict[str, int]
    memory_missing: str | None
    refused: str | None
    memory_simulated: int | None
    micro_batch_size: int | None
    largest_micro_batch_size: int | None
    communicated: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as plan.format=json prints them."""
        return dc.asdict(self)


def plan(config: Train) -> Figures:
    """Parameters, FLOPs, cache, steps and time of the run of `train`, in closed form: nothing is built, without torch.

    config: with verb="plan" it names the hardware; for a `Train` the defaults of the group `plan` hold.

    Raises:
        ConfigError: it is no legal configuration, or does not fit into plan.memory.
    """
    checked(config, Train, "config")
    how = config.plan if isinstance(config, Plan) else PlanConfig()
    model, (source, target) = config.model, config.lengths
    inference = costs.forward_by_part(model, source, target, dense=False)
    training = costs.forward_by_part(
        model, source, target, dense=False, training=True, target_share=config.objective.target_share
    )
    trained, adapter = n_trained_by_part(config), of_adapter(config)
    params = model.n_params_by_part() | {ADAPTER: adapter.n}
    training |= {ADAPTER: adapter.flops} if adapter.flops else {}
    per_sample = work(config, (source, target), config.trains if config.transforms else None).once
    peak = peak_of(config, how)
    step_flops = per_sample * config.data.global_batch_size
    n_devices = processes(config) or how.n_devices or 1
    a_step = step_flops / (peak * how.mfu * n_devices)
    layout = config.strategy.layout(n_devices) if n_devices > 1 else Layout()
    sampled = rollouts(config, layout, peak * how.mfu, bandwidth_of(how), a_step)
    with_rollout = a_step + (sampled.seconds / sampled.updates if sampled else 0.0)
    steps, limit = budget(config, with_rollout)
    total = None if steps is None else steps * step_flops
    size = BYTES[how.cache_dtype]
    held = (target or source, source if target else 0)
    return Figures(
        model=model.preset,
        n_params=sum(params.values()),
        n_active_params=model.n_active_params + adapter.active,
        n_trained_params=sum(trained.values()),
        params_by_part={name: n for name, n in params.items() if n},
        trained_by_part={name: n for name, n in trained.items() if n},
        sample=sample_of(model),
        seq_len=source,
        target_len=target,
        forward_flops_per_token=sum(inference.values()) / source,
        flops_per_token=per_sample / source,
        flops_per_sample=per_sample,
        flops_by_part=training,
        flops_missing="; ".join(flops_missing(config)) or None,
        cache_bytes_per_token=costs.cache_values_per_token(model) * size,
        cache_bytes=model.cache_bytes(*held, bytes_per_value=size),
        cache_dtype=how.cache_dtype,
        cache_missing=cache_missing(model),
        global_batch_size=config.data.global_batch_size,
        steps=steps,
        tokens=None if steps is None else steps * config.data.global_batch_size * source,
        flops=total,
        seconds=None if steps is None else steps * with_rollout,
        rollouts=sampled,
        limited_by=limit,
        device=f"{peak:.4g} FLOP/s each" if how.peak_flops else how.device,
        n_devices=n_devices,
        peak_flops=peak,
        mfu=how.mfu,
        **memory_of(config, how, n_devices, sampled.cache_bytes if sampled else 0),
    )


def flops_missing(config: Train) -> Iterator[str]:
    """What a user's own options leave unstated about their FLOPs, and the assumption made."""
    model = config.model
    for axis, forms in (("attention", ("projection_flops", "score_flops")), ("ffn", ("flops",))):
        option = getattr(model, axis)
        if missing := unstated(axis, option, *forms):
            taken = "assumed: a multiply and an add for each parameter and token"
            yield f"{chosen(axis, option)} does not say ({missing} of its Config): {taken}"
    for axis, option in model.components():
        if axis in ("position", "norm", "norm_position") and is_own(axis, option):
            yield f"{chosen(axis, option)} is your own: its matrix products, if any, are not counted"
    if config.transforms and (own := [*unknown(config), *untraced(config)]):
        yield f"{'; '.join(own)}: the backward is counted as if nothing were frozen"
    yield from (f"{what}: assumed: one pass over {config.seq_len} positions" for what in unknown(config))


def cache_missing(model: ModelConfig) -> str | None:
    """What a user's own attention leaves unstated about its cache, and the assumption made."""
    if model.topology == "encoder" or not (missing := unstated("attention", model.attention, "cache_values")):
        return None
    taken = "assumed: 2 * model.dim values per layer and token"
    return f"{chosen('attention', model.attention)} does not say ({missing} of its Config): {taken}"


def memory_of(config: Train, how: PlanConfig, n_devices: int, cache: int) -> dict[str, Any]:
    """The figures of memory and communication. cache: bytes beside what is held between steps, in a rollout.

    Raises:
        ConfigError: it does not fit into plan.memory.
    """
    found, missing, communicated = None, None, {}
    try:
        found = memory(config, n_devices)
        communicated = found.communicated
    except NotCounted as e:
        missing, communicated = str(e), e.communicated
    room = bytes_of(how.memory) if how.memory else None
    if room is not None and found is None:
        raise ConfigError(f"`plan.memory` must be null here (in the scripts of slurm/: MEMORY=): {missing}.")
    if found is not None and room is not None and found.peak > room:
        raise ConfigError(
            f"`plan.memory` must be at least {found.peak / 1e9:.1f}GB for micro-batches of {found.micro_batch_size}, "
            f"but is {how.memory} instead. {remedy(config, n_devices, room)}"
        )
    if found is not None and room is not None and found.held + cache > room:
        raise ConfigError(
            f"`plan.memory` must be at least {(found.held + cache) / 1e9:.1f}GB for a rollout, whose cache takes "
            f"{cache / 1e9:.1f}GB of them, but is {how.memory} instead. A smaller data.micro_batch_size decodes fewer "
            "rows together."
        )
    return {
        "memory": None if found is None else found.peak,
        "memory_by_part": {} if found is None else found.parts,
        "memory_of_host": 0 if found is None else found.host,
        "memory_of_host_by_part": {} if found is None else found.host_parts,
        "memory_missing": missing,
        "refused": next(problems(config, n_devices), None),
        "memory_simulated": None,
        "micro_batch_size": None if found is None else found.micro_batch_size,
        "largest_micro_batch_size": (
            None if found is None or room is None else largest_micro_batch(config, n_devices, room)
        ),
        "communicated": communicated,
    }


def sample_of(model: ModelConfig) -> str:
    """The noun for one sample."""
    if model.embedding.grid() is not None:
        return "image"
    return "pair" if model.topology == "encoder_decoder" else "sequence"


def peak_of(config: Train, how: PlanConfig) -> float:
    """FLOP/s of one device at the run's precision."""
    if how.peak_flops is not None:
        return how.peak_flops
    accelerator = hardware.PUBLISHED[how.device]
    flops = accelerator.flops("float32" if config.trainer.precision == "32-true" else "bfloat16")
    assert flops is not None, "Plan's check"
    return flops


def bandwidth_of(how: PlanConfig) -> float:
    return hardware.PUBLISHED[how.device].bandwidth if how.bandwidth is None else how.bandwidth


def budget(config: Train, seconds_per_step: float) -> tuple[int | None, str | None]:
    """Steps of the run, and the key of the limit that ends it. max_epochs, which needs the data, is ignored."""
    trainer, tokens = config.trainer, config.data.global_batch_size * config.seq_len
    steps: dict[str, int] = {}
    if trainer.max_steps is not None:
        steps["trainer.max_steps"] = trainer.max_steps
    if trainer.max_tokens is not None:
        steps["trainer.max_tokens"] = math.ceil(trainer.max_tokens / tokens)
    if trainer.max_time is not None:
        steps["trainer.max_time"] = math.floor(seconds_of(trainer.max_time) / seconds_per_step)
    limit = min(steps, key=steps.__getitem__, default=None)
    return (None, None) if limit is None else (steps[limit], limit)
