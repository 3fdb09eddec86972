"""The strategies: their knobs, their layouts of ranks, and what must divide. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from txtrain.errors import divisors_near
from txtrain.model.component import must_divide
from txtrain.model.config import ModelConfig
from txtrain.parallel import divisibility
from txtrain.registry import TABLE, config, register
from txtrain.run_config import RunConfig

BUCKET = 50_000_000  # gradient elements per bucket of DeepSpeed


class Layout(NamedTuple):
    """Ranks that hold copies, hold shards of a copy, and share each layer's matrices; multiplied: the world size."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks, or groups of them, that see different samples."""
        return self.replicate * self.shard


@config
class StrategyConfig:
    """Base: every rank holds the whole model and sees its share of the samples.

    stage: of ZeRO. cuts_activations: ranks share a block's output.
    """

    stage: ClassVar[int] = 0
    cuts_activations: ClassVar[bool] = False
    type: str

    # Fields of some strategies only.
    ep_size = 1
    cpu_offload = False
    reshard_after_forward = False
    reduce_each_micro_batch = False

    def layout(self, world: int) -> Layout:
        """The layout of `world` ranks, if `problems` has none."""
        return Layout(replicate=world)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        """Why `world` ranks cannot be laid out, as sentences."""
        yield from ()

    def check_with(self, config: RunConfig) -> Iterator[str]:
        """What of the rest of a configuration the strategy excludes, on any number of ranks."""
        yield from ()


@config
class ShardedConfig(StrategyConfig):
    """FSDP2 (2304.11277): parameters, gradients and optimizer state in shards; a block gathers its own to compute.

    reshard_after_forward: free a block's gathered parameters after its forward, and gather them again for its backward.
    reduce_each_micro_batch: keep gradients of earlier micro-batches in shards; else whole, exchanged once a step.
    cpu_offload: shards, gradients and the optimizer are in CPU memory.
    """

    reshard_after_forward: bool = True
    reduce_each_micro_batch: bool = False
    cpu_offload: bool = False

    def layout(self, world: int) -> Layout:
        return Layout(shard=world)


@config
class FullyShardedConfig(ShardedConfig):
    """ep_size: ranks that divide each mixture's experts (2006.16668); further shards cut each expert. 1: undivided."""

    ep_size: int = 1

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        yield from self._experts(self.layout(world).shard, model)

    def _experts(self, shards: int, model: ModelConfig) -> Iterator[str]:
        """Why the shards or the model exclude ep_size, as sentences."""
        n, path = self.ep_size, "strategy.ep_size"
        if n == 1:
            return
        experts = divisibility.experts(model)
        if experts is None:
            why = f"model/ffn={model.ffn.type}, which has no experts to divide"
            yield f"`{path}` must be 1 with {why}, but is {n} instead. Nearest: 1."
            return
        near = f"Nearest that both allow: {', '.join(map(str, divisors_near(n, math.gcd(shards, experts))))}."
        if n < 1 or shards % n:
            yield f"`{path}` must divide the ranks that hold shards of one model ({shards}), but is {n} instead. {near}"
        elif experts % n:
            yield f"`{path}` must divide model.ffn.n_experts ({experts}), but is {n} instead. {near}"


@config
class HybridConfig(FullyShardedConfig):
    """Shards within each of dp_replicate_size groups, copies among the groups."""

    dp_replicate_size: int = 2

    def layout(self, world: int) -> Layout:
        return Layout(replicate=self.dp_replicate_size, shard=world // self.dp_replicate_size)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        found = list(_divides("dp_replicate_size", self.dp_replicate_size, world))
        yield from found or super().problems(world, model)


@config
class TensorConfig(StrategyConfig):
    """Ranks share each layer's matrices (1909.08053), and its norms by positions (2205.05198). tp_size: null: all."""

    cuts_activations = True
    tp_size: int | None = None

    def layout(self, world: int) -> Layout:
        tensor = self.tp_size or world
        return Layout(replicate=world // tensor, tensor=tensor)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        yield from _divides("tp_size", self.tp_size or world, world)


@config
class ShardedTensorConfig(ShardedConfig):
    """Matrices cut over tp_size ranks, and the pieces in shards over the groups."""

    cuts_activations = True
    tp_size: int = 2

    def layout(self, world: int) -> Layout:
        return Layout(shard=world // self.tp_size, tensor=self.tp_size)

    def problems(self, world: int, model: ModelConfig) -> Iterator[str]:
        yield from _divides("tp_size", self.tp_size, world)


@config
class ZeROConfig(StrategyConfig):
    """DeepSpeed's ZeRO (1910.02054): optimizer state in shards (stage 1), gradients too (2), parameters too (3).

    cpu_offload: the optimizer and its state (2101.06840), and with stage 3 the parameters, are in CPU memory.
    """

    cpu_offload: bool = False

    def layout(self, world: int) -> Layout:
        return Layout(shard=world)

    def check_with(self, config: RunConfig) -> Iterator[str]:
        optimizer, steps, decay = config.optimizer, config.layer_stats.every_n_steps, config.ema.decay
        elementwise = ", ".join(name for name, option in TABLE["optimizer"].items() if option.config.elementwise)
        known, fsdp, precision = f"one of {elementwise}", "strategy=fsdp", config.trainer.precision
        flat = "ZeRO updates shards of flattened parameters, and an element's update may depend on that element only"
        for broken, key, allowed, value, why, nearest in (
            (not optimizer.elementwise, "optimizer", known, optimizer.type, flat, fsdp),
            (steps is not None, "layer_stats.every_n_steps", "null", steps, "flat gradients have no layers", fsdp),
            (decay is not None, "ema.decay", "null", decay, "no average is kept of flat weights", fsdp),
            (
                precision == "bf16-true", "trainer.precision", "32-true or bf16-mixed", precision,
                "ZeRO keeps float32 master weights", "bf16-mixed",
            ),
        ):
            if broken:
                given = f"{allowed} with strategy={self.type}, but is {value} instead"
                yield f"`{key}` must be {given}: {why}. Nearest: {nearest}."


class ZeRO1Config(ZeROConfig):
    stage = 1


class ZeRO2Config(ZeROConfig):
    stage = 2


class ZeRO3Config(ZeROConfig):
    stage = 3


def _divides(name: str, size: int, world: int) -> Iterator[str]:
    if size < 1 or world % size:
        near = ", ".join(map(str, divisors_near(max(size, 1), world)))
        yield f"`strategy.{name}` must divide the number of ranks ({world}), but is {size} instead. Nearest: {near}."


def processes(config: RunConfig) -> int | None:
    """The number of ranks; None: that of devices."""
    devices = config.trainer.devices
    return None if devices == "auto" else devices * config.trainer.num_nodes


def of_model(strategy: StrategyConfig, model: ModelConfig, world: int) -> Iterator[str]:
    """Why `world` ranks cannot share the model, as sentences."""
    found = list(strategy.problems(world, model))
    yield from found
    if not found and (tensor := strategy.layout(world).tensor) > 1:
        yield from divisibility.problems(model, "strategy.tp_size", tensor, world)


def problems(config: RunConfig, world: int) -> Iterator[str]:
    """Why `world` ranks cannot run this configuration, as sentences: the strategy's layout, and the batch's shares."""
    yield from of_model(config.strategy, config.model, world)
    if any(config.strategy.problems(world, config.model)):
        return
    size, data = config.data.global_batch_size, config.strategy.layout(world).data
    if size % data:
        low = size // data * data
        near = ", ".join(str(n) for n in (low, low + data) if n)
        allowed = f"a multiple of the {data} ranks that see different samples"
        yield f"`data.global_batch_size` must be {allowed}, but is {size} instead. Nearest: {near}."
    elif config.data.micro_batch_size and (size // data) % config.data.micro_batch_size:
        whole = "a rank's share of data.global_batch_size"
        yield must_divide("data.micro_batch_size", config.data.micro_batch_size, whole, size // data)


MESH, ZERO = "txtrain.parallel.mesh:Mesh", "txtrain.parallel.deepspeed:ZeRO"
COPIED = {"ep_size": " Copies of a model have all experts."}
CUT_ALREADY = {"ep_size": " Tensor parallelism gives each rank a part of every expert instead."}
FLAT = {"ep_size": " ZeRO concatenates all parameters and shards them over all ranks."}

register("strategy", "auto ddp", MESH, StrategyConfig, absent=COPIED)
register("strategy", "fsdp", MESH, FullyShardedConfig)
register("strategy", "hsdp", MESH, HybridConfig)
for _config in (ZeRO1Config, ZeRO2Config, ZeRO3Config):
    register("strategy", f"deepspeed_stage_{_config.stage}", ZERO, _config, absent=FLAT)
register("strategy", "tp", MESH, TensorConfig, absent=CUT_ALREADY)
register("strategy", "fsdp_tp", MESH, ShardedTensorConfig, absent=CUT_ALREADY)
