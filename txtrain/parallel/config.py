"""The strategies: their knobs, how they lay processes out, and what must divide. No torch."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from txtrain.errors import divisors_near
from txtrain.model.config import ModelConfig
from txtrain.parallel import divisibility
from txtrain.registry import TABLE, register
from txtrain.run_config import RunConfig

BUCKET = 50_000_000  # elements of gradients that DeepSpeed sums at a time


class Layout(NamedTuple):
    """How many processes hold copies, hold shards of one copy, and share each layer's matrices. Their product is the world's size."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Processes, or groups of them, that see different samples."""
        return self.replicate * self.shard


@dc.dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Base: every process holds all of the model and sees its share of the samples.

    stage: of ZeRO. cuts_activations: a block's output lies in parts.
    """

    stage: ClassVar[int] = 0
    cuts_activations: ClassVar[bool] = False
    type: str

    # Keys of some strategies; without an annotation they are no fields of all.
    ep_size = 1
    cpu_offload = False
    reshard_after_forward = False

    def layout(self, world: int) -> Layout:
        """Of so many processes, `problems` being none."""
        return Layout(replicate=world)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        """What `world` processes cannot be laid out for."""
        yield from ()

    def check_with(self, config: RunConfig) -> Iterator[str]:
        """What of the rest of a configuration does not go together with this, on however many processes."""
        yield from ()


@dc.dataclass(frozen=True, kw_only=True)
class ShardedConfig(StrategyConfig):
    """FSDP2 (2304.11277, by parameter): parameters, gradients and optimizer state in shards, a block's parameters gathered while it computes.

    reshard_after_forward: give a block's gathered parameters back after its forward, and gather them again for its backward.
    cpu_offload: shards, gradients and the optimizer live in the processor's memory.
    """

    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def layout(self, world: int) -> Layout:
        return Layout(shard=world)


@dc.dataclass(frozen=True, kw_only=True)
class FullyShardedConfig(ShardedConfig):
    """ep_size: processes over which the experts of each mixture are divided (2006.16668); what is left of the shards cuts each of them. 1: none."""

    ep_size: int = 1

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        yield from self._experts(self.layout(world).shard, model)

    def _experts(self, shards: int, model: ModelConfig) -> Iterator[str]:
        """What the shards, or the model, do not allow of ep_size."""
        n, path = self.ep_size, "strategy.ep_size"
        if n == 1:
            return
        experts = divisibility.experts(model)
        if experts is None:
            yield f"`{path}` must be 1 with model/ffn={model.ffn.type}, which has no experts to divide, but is {n} instead. Nearest: 1."
            return
        near = f"Nearest that both allow: {', '.join(map(str, divisors_near(n, math.gcd(shards, experts))))}."
        if n < 1 or shards % n:
            yield f"`{path}` must divide the processes that hold shards of one model ({shards}), but is {n} instead. {near}"
        elif experts % n:
            yield f"`{path}` must divide model.ffn.n_experts ({experts}), but is {n} instead. {near}"


@dc.dataclass(frozen=True, kw_only=True)
class HybridConfig(FullyShardedConfig):
    """Shards within each of dp_replicate_size groups, copies among the groups."""

    dp_replicate_size: int = 2

    def layout(self, world: int) -> Layout:
        return Layout(replicate=self.dp_replicate_size, shard=world // self.dp_replicate_size)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        found = list(_divides("dp_replicate_size", self.dp_replicate_size, world))
        yield from found or super().problems(world, model)


@dc.dataclass(frozen=True, kw_only=True)
class TensorConfig(StrategyConfig):
    """Each layer's matrices are cut over the processes (1909.08053), its norms over positions (2205.05198). tp_size: null: all processes."""

    cuts_activations = True
    tp_size: int | None = None

    def layout(self, world: int) -> Layout:
        tensor = self.tp_size or world
        return Layout(replicate=world // tensor, tensor=tensor)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        yield from _divides("tp_size", self.tp_size or world, world)


@dc.dataclass(frozen=True, kw_only=True)
class ShardedTensorConfig(ShardedConfig):
    """Matrices cut over tp_size processes, and these pieces in shards over the groups."""

    cuts_activations = True
    tp_size: int = 2

    def layout(self, world: int) -> Layout:
        return Layout(shard=world // self.tp_size, tensor=self.tp_size)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        yield from _divides("tp_size", self.tp_size, world)


@dc.dataclass(frozen=True, kw_only=True)
class ZeROConfig(StrategyConfig):
    """DeepSpeed's ZeRO (1910.02054): optimizer state in parts over the processes (stage 1), gradients too (2), parameters too (3).

    cpu_offload: the optimizer and its state (2101.06840), and with stage 3 the parameters, live in the processor's memory.
    """

    cpu_offload: bool = False

    def layout(self, world: int) -> Layout:
        return Layout(shard=world)

    def check_with(self, config: RunConfig) -> Iterator[str]:
        optimizer, precision = config.optimizer, config.trainer.precision
        if not optimizer.elementwise:
            known = ", ".join(name for name, option in TABLE["optimizer"].items() if option.config.elementwise)
            yield (
                f"`optimizer` must be one of {known} with strategy={self.type}, but is {optimizer.type} instead: "
                "ZeRO updates pieces of flattened parameters, and an element's update may depend on nothing but that element. Nearest: strategy=fsdp."
            )
        if config.layer_stats.every_n_steps is not None:
            yield (
                f"`layer_stats.every_n_steps` must be null with strategy={self.type}, but is {config.layer_stats.every_n_steps} instead: "
                "gradients lie in flat pieces that know of no layer. Nearest: strategy=fsdp."
            )
        if config.ema.decay is not None:
            yield (
                f"`ema.decay` must be null with strategy={self.type}, but is {config.ema.decay} instead: the weights lie in flat pieces, "
                "of which no average is kept. Nearest: strategy=fsdp."
            )
        if precision == "bf16-true":
            yield (
                f"`trainer.precision` must be 32-true or bf16-mixed with strategy={self.type}, but is bf16-true instead: "
                "ZeRO keeps float32 master weights. Nearest: bf16-mixed."
            )


class ZeRO1Config(ZeROConfig):
    stage = 1


class ZeRO2Config(ZeROConfig):
    stage = 2


class ZeRO3Config(ZeROConfig):
    stage = 3


def _divides(name: str, size: int, world: int) -> Iterator[str]:
    if size < 1 or world % size:
        near = ", ".join(map(str, divisors_near(max(size, 1), world)))
        yield f"`strategy.{name}` must divide the number of processes ({world}), but is {size} instead. Nearest: {near}."


def processes(config: RunConfig) -> int | None:
    """How many the run is started with; None: as many as there are devices."""
    devices = config.trainer.devices
    return None if devices == "auto" else devices * config.trainer.num_nodes


def of_model(strategy: StrategyConfig, model: ModelConfig, world: int) -> Iterator[str]:
    """What of a model so many processes cannot share."""
    found = list(strategy.problems(world, model))
    yield from found
    if not found and (tensor := strategy.layout(world).tensor) > 1:
        yield from divisibility.problems(model, "strategy.tp_size", tensor, world)


def problems(config: RunConfig, world: int) -> Iterator[str]:
    """What so many processes do not allow: the strategy's layout, and the batch's shares."""
    yield from of_model(config.strategy, config.model, world)
    if any(config.strategy.problems(world, config.model)):
        return
    size, data = config.data.global_batch_size, config.strategy.layout(world).data
    if size % data:
        low = size // data * data
        near = ", ".join(str(n) for n in (low, low + data) if n)
        yield f"`data.global_batch_size` must be a multiple of the {data} processes that see different samples, but is {size} instead. Nearest: {near}."
    elif config.data.micro_batch_size and (size // data) % config.data.micro_batch_size:
        micro, share = config.data.micro_batch_size, size // data
        near = ", ".join(map(str, divisors_near(micro, share)))
        yield f"`data.micro_batch_size` must divide a process' share of data.global_batch_size ({share}), but is {micro} instead. Nearest: {near}."


MESH, ZERO = "txtrain.parallel.mesh:Mesh", "txtrain.parallel.deepspeed:ZeRO"
COPIED = {"ep_size": " Copies of a model have all experts."}
CUT_ALREADY = {"ep_size": " Tensor parallelism gives each process a part of every expert instead."}
FLAT = {"ep_size": " ZeRO lays all parameters end to end and cuts them over all processes alike."}

register("strategy", "auto ddp", MESH, StrategyConfig, absent=COPIED)
register("strategy", "fsdp", MESH, FullyShardedConfig)
register("strategy", "hsdp", MESH, HybridConfig)
register("strategy", "deepspeed_stage_1", ZERO, ZeRO1Config, absent=FLAT)
register("strategy", "deepspeed_stage_2", ZERO, ZeRO2Config, absent=FLAT)
register("strategy", "deepspeed_stage_3", ZERO, ZeRO3Config, absent=FLAT)
register("strategy", "tp", MESH, TensorConfig, absent=CUT_ALREADY)
register("strategy", "fsdp_tp", MESH, ShardedTensorConfig, absent=CUT_ALREADY)
