"""The interface of strategies: the training step, checkpoints, agreement among ranks. Here for one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from txtrain.checkpoint.format import shapes
from txtrain.checkpoint.restore import Reading, load_tensors, load_training, training_tensors
from txtrain.errors import ConfigError
from txtrain.hf.pieces import Source, fill
from txtrain.model.config import ModelConfig
from txtrain.model.lora import kept
from txtrain.optim.average import Average
from txtrain.parallel.gradient_buckets import local
from txtrain.parallel.timers import Phases
from txtrain.parallel.world import World
from txtrain.run_config import RunConfig

T = TypeVar("T")


class OneProcess:
    """All that differs between strategies. rank, size: among the ranks that see different samples (data parallel)."""

    gradient_factor = 1.0  # multiplies the loss before backward, where the strategy averages gradients: we want sums
    rank, size = 0, 1
    saves_in_place = True  # checkpoints are written from the trained tensors themselves, not from copies

    def __init__(self, config: RunConfig, world: World | None = None) -> None:
        self.config, self.world = config, world or World()
        self.phases = Phases()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.world.rank == 0

    @property
    def title(self) -> str:
        """Shown on the start screen."""
        return f"{self.config.strategy.type}, one process"

    def device(self) -> torch.device:
        """Where this process computes.

        Raises:
            ConfigError: a GPU was asked for and there is none, or none for this process.
        """
        wanted = self.config.trainer.accelerator
        if wanted == "gpu" and not torch.cuda.is_available():
            raise ConfigError(
                "`trainer.accelerator` must be cpu or auto here, but is gpu instead: torch sees no CUDA device."
            )
        on_cpu = wanted == "cpu" or not torch.cuda.is_available()
        if on_cpu:
            return torch.device("cpu")
        if self.world.local_rank >= (n := torch.cuda.device_count()):
            raise ConfigError(
                f"`trainer.devices` must be at most the GPUs that each process of a node sees ({n}), "
                f"but is {self.world.local_size} instead. In a SLURM job: --gpus-per-node=N; "
                "with --gpus-per-task a process sees its own alone, and NCCL cannot use the others."
            )
        return torch.device("cuda", self.world.local_rank)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Context in which the ranks can communicate."""
        yield

    @property
    def precision(self) -> str:
        """That of Lightning's plugin."""
        return self.config.trainer.precision

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward without the trainer."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")

    @property
    def forwards_alone(self) -> bool:
        """Whether a rank may run a forward when others do not; else the data-parallel ranks must do so together."""
        return True

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of lightning.Trainer."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment

        # Explicit: under SLURM Lightning would otherwise demand one task per device and handle the job's signals.
        accelerator = "cpu" if self.device().type == "cpu" else "gpu"
        plugins = [LightningEnvironment()]
        return {
            "strategy": "auto", "accelerator": accelerator, "devices": 1, "plugins": plugins,
            "precision": self.precision,
        }

    # ------------------------------------------------------------------------------------------ agreements

    def together(self, do: Callable[[], T]) -> T:
        """Run on every rank. If any raises ConfigError, all raise, and the lowest such rank reports it."""
        return do()

    def first(self, do: Callable[[], T]) -> T:
        """Run on rank 0 alone; all ranks get its result or ConfigError."""
        return do()

    def first_only(self, do: Callable[[], T]) -> T | None:
        """Run on rank 0 alone, which gets the result; the others get None. Its ConfigError ends all ranks."""
        return do()

    def in_turn(self, do: Callable[[], T]) -> T:
        """Run on the first rank of each node, then on all ranks, which find its results in the cache."""
        return do()

    def gathered(self, value: T) -> list[T]:
        """Its value on each of the ranks that see different samples."""
        return [value]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raises:
        ConfigError: a fact (configuration, code, data) is not the same on all ranks.
        """

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def most(self, n: int) -> int:
        """The maximum of n over all ranks."""
        return n

    def of_all(self, value: T) -> list[T]:
        """The value of each rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for all ranks."""

    def is_new(self, key: str) -> bool:
        """Whether no rank has asked for this key before: true for exactly one caller per key. Not collective."""
        return True

    # ------------------------------------------------------------------------------------------ the model

    def set_up(self, model: nn.Module, device: torch.device) -> None:
        """Allocate the model on the device, or shard it; a model on the meta device stays there until `materialise`."""

    def materialise(self, model: nn.Module, device: torch.device, loaded: Container[str] = ()) -> None:
        """Allocate and initialise a model on the meta device; the values are the same under every strategy.

        loaded: names of tensors that `fill` will set; modules that own no other are not initialised.
        """
        from txtrain.model.init import init_weights
        from txtrain.model.shapes_only import with_storage

        init_weights(with_storage(model, device), loaded)

    def fill(self, model: nn.Module, source: Source) -> None:
        """Read the weights of a set-up, materialised model, tensor by tensor; each rank reads what it holds."""
        fill(model.state_dict(), source.pieces)

    def check_read(self, model: ModelConfig, key: str) -> None:
        """Raises:
        ConfigError: a second, read-only model cannot be sharded as the trained one is. key: the setting that names it.
        """

    def lay_read_only(self, source: Source, device: torch.device) -> Callable[..., Any]:
        """A second, read-only model: sharded as the trained one, with its weights, in eval mode, without gradients."""
        model = source.model.requires_grad_(False)
        if self.config.trainer.precision == "bf16-true":
            model.bfloat16()
        self.set_up_read(model)
        self.materialise(model, device, source.names)
        self.fill(model, source)
        return self.readable(model.eval())

    def set_up_read(self, model: nn.Module) -> None:
        """`set_up` of a read-only model."""

    def readable(self, model: nn.Module) -> Callable[..., Any]:
        """The callable that runs a read-only model, once it has its weights."""
        model.forward = torch.no_grad()(model.forward)
        return model

    @torch.no_grad()
    def copy_weights(self, model: nn.Module, read: Any) -> None:
        """Give a read-only model of the same form the trained one's weights; where it has an adapter, that alone."""
        values = model.state_dict()
        for name, tensor in self.read_tensors(read).items():
            local(tensor).copy_(local(values[name]))

    def optimizer(self, model: nn.Module, optimizer: Optimizer) -> Any:
        """The optimizer to step: the given one, or its equivalent on shards of the parameters."""
        return optimizer

    # ------------------------------------------------------------------------------------------ the step

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each value summed over the ranks that see different samples."""
        return dict(sums)

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """The callable that runs the trained model on a micro-batch."""
        return model

    def micro_batch(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of the forward and backward of one micro-batch; gradients are reduced with the last of a step."""
        return contextlib.nullcontext()

    def backward(self, module: Any, loss: Tensor) -> None:
        """module: the LightningModule. loss: this rank's share of the global batch's loss, so gradients are summed."""
        module.manual_backward(loss * self.gradient_factor)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip gradients to a global norm of at most `max_norm`; return the norm before, 0-dim, without a host sync."""
        held = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(held, max_norm, norm)
        return whole(norm)

    def discard(self, optimizer: Any) -> None:
        """Forget the gradients of a step that is not finite."""
        optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------ checkpoints

    @property
    def checkpoint_group(self) -> Any:
        """The process group that writes a checkpoint, for torch.distributed.checkpoint; None: this process alone."""
        return None

    def training_tensors(self, model: nn.Module, optimizer: Optimizer, average: Average) -> dict[str, Tensor]:
        """All tensors of a checkpoint by canonical name; loading into them in place restores the run."""
        return training_tensors(model, optimizer, average)

    def read_tensors(self, read: Any) -> dict[str, Tensor]:
        """What a checkpoint holds of a read-only model whose weights have changed, by canonical name."""
        return kept(read)

    def load_read(self, path: Path, key: str, read: Any, how: Reading) -> dict[str, Tensor]:
        """Read its weights where the checkpoint holds them, and return them. key: the model's, with which their names
        begin there."""
        if not any(name.startswith(f"{key}.") for name in shapes(path)):
            return {}
        tensors = {f"{key}.{name}": tensor for name, tensor in self.read_tensors(read).items()}
        load_tensors(path, tensors, f"{key}.", self.checkpoint_group, how)
        return tensors

    def training_numbers(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state other than tensors, by canonical name."""
        from txtrain.optim.state import numbers

        return dict(numbers(model, optimizer))

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, average: Average, how: Reading) -> None:
        """Read a checkpoint's weights, optimizer state and averaged weights, in place."""
        load_training(path, model, optimizer, average, self.checkpoint_group, how)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; collective."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def precision_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32
