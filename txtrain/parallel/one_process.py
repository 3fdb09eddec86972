"""What the training step asks of a strategy, and what the processes of a run ask of each other. One process answers trivially."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from txtrain.checkpoint.format import Reading
from txtrain.errors import ConfigError
from txtrain.hf.pieces import Source, fill
from txtrain.model.config import ModelConfig
from txtrain.optim.average import Average
from txtrain.parallel.timers import Phases
from txtrain.parallel.world import World
from txtrain.run_config import RunConfig

T = TypeVar("T")


class OneProcess:
    """The methods are the whole of what differs between strategies. rank, size: among the processes that see different samples."""

    gradient_factor = 1.0  # by which a loss is multiplied before backward, where the strategy averages gradients and we want sums
    rank, size = 0, 1
    saves_in_place = True  # a save has the very tensors that are trained, the same ones each time

    def __init__(self, config: RunConfig, world: World | None = None) -> None:
        self.config, self.world = config, world or World()
        self.phases = Phases()  # of this process' time

    @property
    def is_first(self) -> bool:
        """Whether this process writes what one process writes for all."""
        return self.world.rank == 0

    @property
    def title(self) -> str:
        """Of the start screen."""
        return f"{self.config.strategy.type}, one process"

    def device(self) -> torch.device:
        """Where this process computes.

        Raises:
            ConfigError: a GPU was asked for and there is none, or none for this process.
        """
        wanted = self.config.trainer.accelerator
        if wanted == "gpu" and not torch.cuda.is_available():
            raise ConfigError("`trainer.accelerator` must be cpu or auto here, but is gpu instead: torch sees no CUDA device.")
        on_cpu = wanted == "cpu" or not torch.cuda.is_available()
        if on_cpu:
            return torch.device("cpu")
        if self.world.local_rank >= (n := torch.cuda.device_count()):
            raise ConfigError(
                f"`trainer.devices` must be at most the GPUs that each process of a node sees ({n}), but is {self.world.local_size} instead. "
                "In a SLURM job: --gpus-per-node=N; with --gpus-per-task a process sees its own alone, and NCCL cannot use the others."
            )
        return torch.device("cuda", self.world.local_rank)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """The processes know of each other within."""
        yield

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of lightning.Trainer."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment

        # Named, not detected: under SLURM Lightning would otherwise want one task a device and take the job's signals over.
        accelerator = "cpu" if self.device().type == "cpu" else "gpu"
        plugins = [LightningEnvironment()]
        return {"strategy": "auto", "accelerator": accelerator, "devices": 1, "plugins": plugins, "precision": self.config.trainer.precision}

    # ---------------------------------------------------------------------------------------------------------- agreements

    def together(self, do: Callable[[], T]) -> T:
        """What every process does. Where one makes a ConfigError, all end with it, and one of them tells it."""
        return do()

    def first(self, do: Callable[[], T]) -> T:
        """What the first process does for all; its result, or its ConfigError, is everyone's."""
        return do()

    def first_only(self, do: Callable[[], T]) -> T | None:
        """What the first process does and keeps; None in the others. Its ConfigError is everyone's."""
        return do()

    def in_turn(self, do: Callable[[], T]) -> T:
        """The first process of each node, then the others: they find in the cache what it has made."""
        return do()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raises:
        ConfigError: a process was started with another configuration, other code or other data.
        """

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def most(self, n: int) -> int:
        """The largest n of all processes."""
        return n

    def barrier(self) -> None:
        """Wait for all."""

    def is_new(self, key: str) -> bool:
        """Whether no process has asked for this key before; of several at once one is told so. Not collective."""
        return True

    # ----------------------------------------------------------------------------------------------------------- the model

    def set_up(self, model: nn.Module, device: torch.device) -> None:
        """Allocate the model on the device, or lay it over the processes; a model without storage stays without until `materialise`."""

    def materialise(self, model: nn.Module, device: torch.device, loaded: Container[str] = ()) -> None:
        """Storage and initial values for a model that was described on the meta device: the same under every strategy.

        loaded: names of what `fill` gives its values; modules that own nothing else are left as they are.
        """
        from txtrain.model.init import init_weights

        model.to_empty(device=device)
        init_weights(model, loaded)

    def fill(self, model: nn.Module, source: Source) -> None:
        """Read the weights of a model that is laid and has storage, tensor by tensor; each rank reads what it holds."""
        fill(model.state_dict(), source.pieces)

    def check_read(self, model: ModelConfig, key: str) -> None:
        """Raises:
        ConfigError: a second model cannot be laid over the ranks as the first is. key: what names it.
        """

    def lay_read_only(self, source: Source, device: torch.device) -> Callable[..., Any]:
        """A second model, laid over the ranks as the first, with its weights, in eval mode and without gradients."""
        model = source.model.requires_grad_(False)
        if self.config.trainer.precision == "bf16-true":
            model.bfloat16()
        self.set_up_read(model)
        self.materialise(model, device, source.names)
        self.fill(model, source)
        return self.readable(model.eval())

    def set_up_read(self, model: nn.Module) -> None:
        """As `set_up`, of a model that is only read."""

    def readable(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in place of a model that is only read, once it has its weights."""
        model.forward = torch.no_grad()(model.forward)
        return model

    def optimizer(self, model: nn.Module, optimizer: Optimizer) -> Any:
        """What steps, of the optimizer over the model's parameters: itself, or what does the same on parts of them."""
        return optimizer

    # ------------------------------------------------------------------------------------------------------------ the step

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each value summed over the processes that see different samples."""
        return dict(sums)

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """What a micro-batch is given to, in place of the model."""
        return model

    def micro_batch(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward of one micro-batch; gradients are exchanged with the last."""
        return contextlib.nullcontext()

    def backward(self, module: Any, loss: Tensor) -> None:
        """module: the LightningModule. loss: this process' share of the global batch's, so that gradients are to be summed."""
        module.manual_backward(loss * self.gradient_factor)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip the gradients to a global norm of at most `max_norm`; the norm before that, 0-dimensional, without waiting for the device."""
        held = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(held, max_norm, norm)
        return whole(norm)

    def discard(self, optimizer: Any) -> None:
        """Forget the gradients of a step that is not finite."""
        optimizer.zero_grad(set_to_none=True)

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    @property
    def checkpoint_group(self) -> Any:
        """The processes that write a checkpoint together, for torch.distributed.checkpoint; None: this one alone."""
        return None

    def training_tensors(self, model: nn.Module, optimizer: Optimizer, average: Average) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by canonical name; reading into them in place restores the run."""
        from txtrain.checkpoint.format import training_tensors

        return training_tensors(model, optimizer, average)

    def training_numbers(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimizer keeps beside tensors, by canonical name."""
        from txtrain.optim.state import numbers

        return dict(numbers(model, optimizer))

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, average: Average, how: Reading) -> None:
        """Read a checkpoint's weights, optimizer state and averaged weights, in place."""
        from txtrain.checkpoint.format import load_training

        load_training(path, model, optimizer, average, self.checkpoint_group, how)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in parts over processes, put together; collective."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def precision_dtype(precision: str) -> torch.dtype:
    """What the matrix products are computed in."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32
