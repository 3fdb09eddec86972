"""ddp, fsdp, hsdp, tp and fsdp_tp: one device mesh, replicate x shard x tensor, and the work along each dimension."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer

from txtrain.errors import ConfigError
from txtrain.ground.slurm import meeting_point
from txtrain.ground.waiting import agreement_group, wait_in
from txtrain.hf.pieces import Source, fill
from txtrain.model.config import ModelConfig
from txtrain.optim.average import Average
from txtrain.parallel import divisibility
from txtrain.parallel.collective_timing import timed
from txtrain.parallel.config import of_model, problems
from txtrain.parallel.grad_norm import clip
from txtrain.parallel.gradient_buckets import GradientBuckets, as_read, local
from txtrain.parallel.heartbeat import Heartbeat
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.world import STORE, World, by_srun
from txtrain.run_config import RunConfig

if TYPE_CHECKING:
    from txtrain.parallel.tensor_parallel import Cut

T = TypeVar("T")


class Elsewhere(ConfigError):
    """Another rank has found and reports the error: nothing to print here."""

    def __init__(self) -> None:
        super().__init__()


class Mesh(OneProcess):
    """Several processes with torch.distributed: gloo on CPU, NCCL on GPUs."""

    def __init__(self, config: RunConfig, world: World | None = None) -> None:
        super().__init__(config, world)
        if found := list(problems(config, self.world.size)):
            raise ConfigError(*found)
        self.layout = config.strategy.layout(self.world.size)
        self.rank, self.size = self.world.rank // self.layout.tensor, self.layout.data
        self._buckets: GradientBuckets | None = None
        self._fsdp = False
        self._cut: Cut | None = None
        self._ep_size = config.strategy.ep_size

    @property
    def title(self) -> str:
        parts = {
            "copies": self.layout.replicate, "shards": self.layout.shard, "pieces of each matrix": self.layout.tensor
        }
        laid = " x ".join(f"{n} {what}" for what, n in parts.items() if n > 1)
        laid += f", experts divided over {self._ep_size}" if self._ep_size > 1 else ""
        whole = divisibility.whole(self.config.model) if self.layout.tensor > 1 else []
        return (
            f"{self.config.strategy.type}, {self.world.size} processes" + (f": {laid}" if laid else "")
            + "".join(f"; {w} is whole in each" for w in whole)
        )

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        device = self.device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mine = not dist.is_initialized()
        if mine:
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(
                backend, **self._meeting_point(), rank=self.world.rank, world_size=self.world.size,
                timeout=timedelta(minutes=30),
            )
        try:
            with Heartbeat(*self.world[:2]):
                self._control = agreement_group()  # must not wait for a GPU
                # Ranks of different strategies would wait for each other forever below.
                self.agree({f"strategy.{key}": str(value) for key, value in vars(self.config.strategy).items()})
                self.meet(device.type)
                with timed(self.phases) if device.type == "cpu" else contextlib.nullcontext():
                    yield
        finally:
            if mine:
                dist.destroy_process_group()

    def meet(self, kind: str = "cpu") -> None:
        """Build the device meshes, once the process group exists. kind: device type."""
        self.mesh = init_device_mesh(kind, tuple(self.layout), mesh_dim_names=("replicate", "shard", "tensor"))
        if self._ep_size > 1:
            shape = self.layout.replicate, self.layout.shard // self._ep_size, self._ep_size
            self.expert_mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard", "expert"))
        of_experts = self.expert_mesh.get_all_groups() if self._ep_size > 1 else []
        for group in (dist.group.WORLD, self._data_group, *self.mesh.get_all_groups(), *of_experts):
            wait_in(group)

    def _meeting_point(self) -> dict[str, Any]:
        """For init_process_group: a file store on one machine (no port to be taken), else the launcher's address."""
        if STORE in os.environ or self.world.size == 1:
            alone = {"store": dist.HashStore()}  # type: ignore[attr-defined]
            return {"init_method": f"file://{os.environ[STORE]}"} if STORE in os.environ else alone
        if by_srun():
            address, port = meeting_point()
            return {"init_method": f"tcp://{f'[{address}]' if ':' in address else address}:{port}"}
        return {}

    @property
    def _data_mesh(self) -> DeviceMesh:
        """The mesh's data dimensions (replicate, shard), without those of size 1."""
        names = tuple(n for n, size in zip(("replicate", "shard"), self.layout[:2], strict=True) if size > 1)
        return self.mesh[names or ("shard",)]

    @property
    def _mesh_of_experts(self) -> DeviceMesh | None:
        """The mesh over which this rank's experts are sharded and replicated; None: that of all other parameters."""
        if self._ep_size == 1:
            return None
        return self.expert_mesh["replicate", "shard"] if self.layout.replicate > 1 else self.expert_mesh["shard"]

    @property
    def _data_group(self) -> dist.ProcessGroup:
        mesh = self._data_mesh
        return mesh.get_group() if mesh.ndim == 1 else mesh._flatten("data").get_group()

    @property
    def precision(self) -> str:
        mixed = self.config.trainer.precision
        return "32-true" if self._policy() and mixed == "bf16-mixed" else mixed

    @property
    def forwards_alone(self) -> bool:
        return self.size == 1 or not (self._shards or self._ep_size > 1)

    def trainer_arguments(self) -> dict[str, Any]:
        return {
            "strategy": ModelParallelStrategy(data_parallel_size=self.size, tensor_parallel_size=self.layout.tensor),
            "accelerator": "cpu" if self.device().type == "cpu" else "gpu",
            "devices": self.world.local_size,
            "num_nodes": self.world.n_nodes,
            "plugins": [WorldEnvironment(self.world)],
            "precision": self.precision,
        }

    def _policy(self) -> torch.dtype | None:
        """The dtype in which shards are gathered; None: their own. Autocast would gather float32."""
        return torch.bfloat16 if self._shards and self.config.trainer.precision == "bf16-mixed" else None

    @property
    def _shards(self) -> bool:
        return self.layout.shard > 1 or bool(self.config.strategy.cpu_offload)

    # ------------------------------------------------------------------------------------------ agreements

    def together(self, do: Callable[[], T]) -> T:
        result, error = _tried(do)
        errors: list[Any] = [None] * self.world.size
        dist.all_gather_object(errors, error, group=self._control)
        return self._answer(result, error, errors)

    def first(self, do: Callable[[], T]) -> T:
        result, error = _tried(do) if self.is_first else (None, None)
        sent = [(result, error)]
        dist.broadcast_object_list(sent, src=0, group=self._control)
        if not self.is_first:
            result, error = sent[0][0], None if sent[0][1] is None else Elsewhere()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def first_only(self, do: Callable[[], T]) -> T | None:
        return self.together(do if self.is_first else lambda: None)

    def in_turn(self, do: Callable[[], T]) -> T:
        self.together(do if self.world.local_rank == 0 else lambda: None)
        return self.together(do)

    def _answer(self, result: T | None, error: ConfigError | None, errors: list[ConfigError | None]) -> T:
        """Of the ranks with an error the lowest raises it."""
        wrong = [rank for rank, found in enumerate(errors) if found is not None]
        if not wrong:
            return result  # type: ignore[return-value]
        raise error if error is not None and wrong[0] == self.world.rank else Elsewhere()

    def gathered(self, value: T) -> list[T]:
        return self.of_all(value)[:: self.layout.tensor]

    def agree(self, facts: Mapping[str, str]) -> None:
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, dict(facts), group=self._control)
        # All names: a rank with another strategy has others.
        names = dict.fromkeys(name for theirs in gathered for name in theirs)
        different = [
            f"`{name}` must be the same in all processes, but is {theirs.get(name, 'not there')} in process {rank} "
            f"and {gathered[0].get(name, 'not there')} in process 0."
            for name in names
            for rank, theirs in enumerate(gathered)
            if theirs.get(name) != gathered[0].get(name)
        ]
        if different:
            raise ConfigError(*different) if self.is_first else Elsewhere()

    def any(self, flag: bool) -> bool:
        return bool(self.most(int(flag)))

    def most(self, n: int) -> int:
        found = torch.tensor(n)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._control)
        return int(found)

    def of_all(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def barrier(self) -> None:
        dist.barrier(group=self._control)

    def is_new(self, key: str) -> bool:
        return bool(_get_default_store().add(key, 1) == 1)

    # ------------------------------------------------------------------------------------------ the model

    def set_up(self, model: nn.Module, device: torch.device) -> None:
        self._cut = self._lay(model, self.config.strategy.reshard_after_forward)
        self._fsdp = self._shards

    def check_read(self, model: ModelConfig, key: str) -> None:
        if self._ep_size > 1 and divisibility.experts(model) is None:
            return  # without experts it is sharded by FSDP alone
        if found := list(of_model(self.config.strategy, model, self.world.size)):
            raise ConfigError(*(f"`{key}` cannot be laid over the processes as the model is: {why}" for why in found))

    def copy_weights(self, model: nn.Module, read: Any) -> None:
        self._shard_again(model)
        super().copy_weights(model, read)

    def set_up_read(self, model: nn.Module) -> None:
        self._lay(model, reshard_after_forward=True, keep_root=False)

    def _lay(self, model: nn.Module, reshard_after_forward: bool, keep_root: bool = True) -> Cut | None:
        made = None
        if self.layout.tensor > 1:
            from txtrain.parallel.tensor_parallel import cut

            made = cut(model, self.mesh["tensor"])
        if self._ep_size > 1:
            from txtrain.parallel.expert_parallel import divide

            divide(model, self.expert_mesh["expert"])
        if self._shards:
            from txtrain.parallel.fsdp import shard

            how = reshard_after_forward, self.config.strategy.cpu_offload, self._mesh_of_experts, keep_root
            shard(model, self._data_mesh, self._policy(), *how)
        return made

    def materialise(self, model: nn.Module, device: torch.device, loaded: Container[str] = ()) -> None:
        from txtrain.parallel.fsdp import init_sharded

        model.to_empty(device="cpu" if self.config.strategy.cpu_offload else device)
        init_sharded(model, device, loaded)

    def fill(self, model: nn.Module, source: Source) -> None:
        from txtrain.parallel.dtensor_parts import held

        fill(model.state_dict(), source.pieces, held)

    # ------------------------------------------------------------------------------------------ the step

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One all-reduce for all values, in float64: sums of integers stay exact."""
        if self.size == 1 or not sums:
            return dict(sums)
        flat = torch.cat([value.detach().double().flatten() for value in sums.values()])
        with self.phases.within("communication"):
            dist.all_reduce(flat, group=self._data_group)
        parts = torch.split(flat, [value.numel() for value in sums.values()])
        return {
            name: part.view(value.shape).to(value.dtype)
            for (name, value), part in zip(sums.items(), parts, strict=True)
        }

    @contextlib.contextmanager
    def micro_batch(self, module: nn.Module, last: bool) -> Iterator[None]:
        model: Any = module.model
        if self._fsdp:
            reduces = last or self.config.strategy.reduce_each_micro_batch
            model.set_requires_gradient_sync(reduces)
            model.set_is_last_backward(reduces)
            yield
        elif self.size > 1:
            if self._buckets is None:
                self._buckets = GradientBuckets(as_read(model), self._data_group)
            self._buckets.active = last
            yield
            if last:
                with self.phases.within("communication"):
                    self._buckets.finish()
        else:
            yield
        if last and self._cut is not None:
            with self.phases.within("communication"):
                self._cut.sum_gradients()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        shards = self.mesh["shard"].get_group() if self.layout.shard > 1 else None
        if self._cut is not None:
            return self._cut.clip(max_norm, shards)
        if self._ep_size > 1:  # two meshes of shards, but each element is on one rank of the shard dimension
            return clip([(local(p.grad), 1.0) for p in parameters if p.grad is not None], max_norm, shards)
        return super().clip(parameters, max_norm)

    # ------------------------------------------------------------------------------------------ checkpoints

    @property
    def checkpoint_group(self) -> Any:
        return self._control

    def training_tensors(self, model: nn.Module, optimizer: Optimizer, average: Average) -> dict[str, Tensor]:
        self._shard_again(model)
        return super().training_tensors(model, optimizer, average)

    def training_numbers(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        self._shard_again(model)
        return super().training_numbers(model, optimizer)

    def _shard_again(self, model: nn.Module) -> None:
        """A forward without backward leaves the root gathered by FSDP2: its parameters are not the optimizer's then."""
        if self._fsdp:
            from txtrain.parallel.fsdp import sharded

            for module in sharded(model):
                module.reshard()


class WorldEnvironment(ClusterEnvironment):
    """Lightning's view of processes that were started, and initialised torch.distributed, without it."""

    def __init__(self, world: World) -> None:
        self.world = world

    creates_processes_externally = True
    main_address = "unused"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.world.size

    def set_world_size(self, size: int) -> None:
        assert size == self.world.size, (size, self.world)

    def global_rank(self) -> int:
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.world.rank, (rank, self.world)

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.node


def _tried(do: Callable[[], T]) -> tuple[T | None, ConfigError | None]:
    try:
        return do(), None
    except ConfigError as e:
        return None, e
