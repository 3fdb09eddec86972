"""deepspeed_stage_1, _2, _3: ZeRO (1910.02054) by DeepSpeed's engine, imported here alone, when such a run starts."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from txtrain.checkpoint.restore import Reading, load_tensors, never_updated, of_frozen, optimizer_names
from txtrain.errors import ConfigError
from txtrain.hf.pieces import Held, Source
from txtrain.model.lora import kept
from txtrain.optim.average import Average
from txtrain.optim.state import allocate
from txtrain.parallel.deepspeed_engine import Called, EngineOptimizer, Read, by_blocks, engine_config, gather_around
from txtrain.parallel.deepspeed_layout import Part, global_norm, parts, take_flat
from txtrain.parallel.mesh import Mesh
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.world import World
from txtrain.run_config import RunConfig


class ZeRO(Mesh):
    """Optimizer state (stage 1), gradients (2) and parameters (3) sharded over the ranks.

    Master weights, optimizer state and sums of gradients are float32 in any precision. DeepSpeed's own gradient
    accumulation, averaging, schedules and checkpoints are not used.
    """

    saves_in_place = False

    def __init__(self, config: RunConfig, world: World | None = None) -> None:
        super().__init__(config, world)
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"`strategy={config.strategy.type}` needs the package deepspeed, which is not installed here. "
                "Nearest: strategy=fsdp."
            )
        self.stage: int = config.strategy.stage
        # Stages 1 and 2 sum gradients; stage 3 can only average them.
        self.gradient_factor = float(self.size) if self.stage == 3 else 1.0
        self.engine: Any = None
        self._reading: list[Any] = []  # engines of read-only models
        # By parameter: the index of the first element, and float32 values from there on.
        self._kept: dict[str, tuple[int, Tensor]] = {}
        self._parts: list[Part] = []

    @property
    def _shards(self) -> bool:
        return True

    @property
    def forwards_alone(self) -> bool:
        return self.stage < 3

    @property
    def _half(self) -> bool:
        return self._policy() is not None

    @property
    def _engine_config(self) -> dict[str, Any]:
        return engine_config(self.stage, self._half, self.config.strategy.cpu_offload)

    @property
    def _core(self) -> Optimizer:
        """The optimizer that the engine steps, on flat tensors."""
        core: Optimizer = self.engine.optimizer.optimizer
        return core

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        on_cpu = self.device().type == "cpu"
        added = {"DS_ACCELERATOR": "cpu" if on_cpu else "cuda", "LOCAL_RANK": str(self.world.local_rank)}
        added = {name: value for name, value in added.items() if name not in os.environ}
        os.environ.update(added)  # DeepSpeed learns its device from these alone
        mine = not torch.distributed.is_initialized()
        try:
            with super().started():
                import deepspeed

                if os.environ.get("TXTRAIN_DEBUG") != "1":
                    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
                    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
                if on_cpu:  # else DeepSpeed compiles its shared-memory collective for half a minute
                    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
                deepspeed.init_distributed("gloo" if on_cpu else "nccl", auto_mpi_discovery=False, verbose=False)
                self._rows = init_device_mesh("cpu", (self.world.size,))
                try:
                    yield
                finally:
                    for engine in (self.engine, *self._reading):
                        if engine is not None:
                            engine.destroy()
                    if mine:  # DeepSpeed keeps references to process groups that end here
                        deepspeed.utils.groups._release_process_group_references()
                        deepspeed.comm.comm.cdb = None
        finally:
            for name in added:
                del os.environ[name]

    # ------------------------------------------------------------------------------------------ the model

    def set_up(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the engine shards the model when it gets the optimizer."""

    def materialise(self, model: nn.Module, device: torch.device, loaded: Container[str] = ()) -> None:
        """Stage 3: one module at a time exists whole. In stages 1 and 2 every rank holds all parameters."""
        if self.stage < 3:
            OneProcess.materialise(self, model, device, loaded)
            return
        from txtrain.model.init import Initialiser, to_initialise

        unset = to_initialise(model, loaded)
        initialiser = Initialiser(model) if unset else None
        sizes = [p.numel() for name, p in model.named_parameters() if name in loaded]
        # One buffer for all of them: memory of many allocations would not all return to the system.
        scratch = torch.empty(max(sizes, default=0), device=device)
        with torch.no_grad():
            for name, module in model.named_modules():
                if initialiser is not None and name in unset:
                    module.to_empty(device=device, recurse=False)
                    initialiser.fill(name, module)
                    self._scatter(name, module)
                    continue
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else torch.empty_like(buffer, device=device)
                for key, p in module._parameters.items():
                    if p is not None:
                        whole = scratch[: p.numel()].view(p.shape).to(p.dtype)
                        module._parameters[key] = nn.Parameter(whole, requires_grad=p.requires_grad)
                        self._scatter(name, module, key)

    def _scatter(self, name: str, module: nn.Module, only: str | None = None) -> None:
        """Shard the parameters that the module itself owns, or the one named `only`."""
        import deepspeed

        own = {key: p for key, p in module._parameters.items() if p is not None and only in (None, key)}
        for key, parameter in own.items():
            self._keep_share(f"{name}.{key}" if name else key, parameter)
        if own:
            listed = nn.ParameterList(own.values())
            deepspeed.zero.Init(module=listed, config_dict_or_path=self._engine_config, dtype=listed[0].dtype)

    def fill(self, model: nn.Module, source: Source) -> None:
        """Stage 3: read into the float32 shares kept beside the bfloat16 ones, then round."""
        if self.stage < 3:
            super().fill(model, source)
            return
        shares: dict[str, Any] = dict(model.named_parameters())
        buffers = _buffers(model)
        with torch.no_grad():
            for piece in source.pieces:
                if piece.name in buffers:
                    Held.whole(buffers[piece.name]).take(piece)
                    continue
                share = shares[piece.name]
                first, flat = self._kept.get(piece.name, (self._share(share.ds_numel)[0], share.ds_tensor))
                take_flat(piece, flat, first, share.ds_shape)
                if piece.name in self._kept:
                    share.ds_tensor[: len(flat)].copy_(flat)

    def _keep_share(self, name: str, parameter: nn.Parameter) -> None:
        """Keep the float32 values of this rank's share of a parameter, then round the parameter to bfloat16."""
        if not self._half:
            return
        first, size = self._share(parameter.numel())
        self._kept[name] = first, parameter.detach().flatten()[first : first + size].clone()
        parameter.data = parameter.data.bfloat16()

    def optimizer(self, model: nn.Module, optimizer: Optimizer) -> Any:
        import deepspeed

        names = {parameter: name for name, parameter in model.named_parameters()}
        if self._half and not self._kept:
            self._kept = {name: (0, parameter.detach()) for parameter, name in names.items()}
        whole = by_blocks(model, with_gradient=self.stage == 3)
        self.engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=self._engine_config)
        self._parts = list(parts(names, self.engine.optimizer))
        if self.stage == 3:
            gather_around(whole)
        held = kept(model)
        self._parts += [self._frozen(name, p) for p, name in names.items() if not p.requires_grad and name in held]
        for part in self._parts:
            if part.name in self._kept:
                first, values = self._kept[part.name]
                part.fill(part.master, values, first)
        self._kept = {}
        return EngineOptimizer(self.engine, self._core)

    def set_up_read(self, model: nn.Module) -> None:
        """Nothing: in stage 3 an engine without optimizer gathers it (`readable`), in 1 and 2 every rank holds it."""

    def lay_read_only(self, source: Source, device: torch.device) -> Callable[..., Any]:
        kept, self._kept = self._kept, {}  # those of the trained model
        read = super().lay_read_only(source, device)
        self._kept = kept
        return read

    def readable(self, model: nn.Module) -> Callable[..., Any]:
        if self.stage < 3:
            return super().readable(model.bfloat16() if self._half else model)
        import deepspeed

        whole = by_blocks(model, with_gradient=False)
        engine, *_ = deepspeed.initialize(model=whole, config=self._engine_config)
        engine.eval()
        gather_around(whole)
        self._reading.append(engine)
        return Read(engine, model)

    @torch.no_grad()
    def copy_weights(self, model: nn.Module, read: Any) -> None:
        if self.stage < 3:
            super().copy_weights(model, read)
            return
        shares: dict[str, Any] = dict(model.named_parameters())
        buffers = _buffers(model)
        for part in self._read_parts(read):
            part.master.copy_(shares[part.name].ds_tensor)
        for name, tensor in _buffers(read).items():
            tensor.copy_(buffers[name])

    def _read_parts(self, read: Any) -> list[Part]:
        """In stage 3 this rank's shares of a read-only model's parameters, of those that a checkpoint holds."""
        shares = dict(read.named_parameters())
        return [self._in_place(name, shares[name]) for name in kept(read.model) if name in shares]

    def _frozen(self, name: str, parameter: Any) -> Part:
        """This rank's share of a frozen parameter: float32 even if computed in bfloat16, so checkpoints are exact."""
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        n = shape.numel()
        offset, length = self._share(n)
        if self._half:
            return Part(name, parameter, shape, torch.empty(length, device="cpu"), offset, length, 0)
        if self.stage == 3:
            return self._in_place(name, parameter)
        return Part(name, parameter, shape, parameter.detach().view(-1), offset, length, offset)

    def _in_place(self, name: str, parameter: Any) -> Part:
        """In stage 3 this rank's share of a parameter that is not trained."""
        shape = parameter.ds_shape
        return Part(name, parameter, shape, parameter.ds_tensor, *self._share(shape.numel()), 0)

    def _share(self, n: int) -> tuple[int, int]:
        """Offset and length of this rank's share of n elements, cut evenly."""
        size = -(-n // self.size)
        first = min(self.rank * size, n)
        return first, min(size, n - first)

    # ------------------------------------------------------------------------------------------ the step

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        return Called(self.engine, model)

    @contextlib.contextmanager
    def micro_batch(self, module: nn.Module, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, module: Any, loss: Tensor) -> None:
        self.engine.backward(loss * self.gradient_factor)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """The norm; the engine clips when it steps (never with clip_grad 0)."""
        self.engine.optimizer.clip_grad = (
            0.0 if max_norm is None else max(max_norm, torch.finfo(torch.float32).tiny)
        )
        return global_norm(self.engine.optimizer)

    def discard(self, optimizer: Any) -> None:
        """The engine skips a step whose norm is not finite and drops its gradients."""
        optimizer.step()

    # ------------------------------------------------------------------------------------------ checkpoints

    def training_tensors(self, model: nn.Module, optimizer: Optimizer, average: Average) -> dict[str, Tensor]:
        """Copies in CPU memory, sharded by rows over the ranks. Collective; one tensor at a time exists whole."""
        held = kept(model)
        found = {f"model.{name}": buffer for name, buffer in _buffers(model).items() if name in held}
        for part in self._parts:
            found[f"model.{part.name}"] = self._by_rows(part.whole(part.master, self._data_group))
            for key, state in self._state(part).items():
                value = self._by_rows(part.whole(state, self._data_group)) if state.ndim else state.clone()
                found[f"optimizer.{part.name}.{key}"] = value
        return found

    def read_tensors(self, read: Any) -> dict[str, Tensor]:
        """In stage 3 copies, as `training_tensors`."""
        if self.stage < 3:
            return super().read_tensors(read)
        parts = {part.name: part for part in self._read_parts(read)}
        held = kept(read.model)
        buffers = {name: tensor for name, tensor in _buffers(read).items() if name in held}
        return buffers | {
            name: self._by_rows(part.whole(part.master.float(), self._data_group)) for name, part in parts.items()
        }

    def load_read(self, path: Path, key: str, read: Any, how: Reading) -> dict[str, Tensor]:
        found = super().load_read(path, key, read, how)
        for part in self._read_parts(read) if found and self.stage == 3 else ():
            whole: Any = found[f"{key}.{part.name}"]
            part.fill(part.master, whole.full_tensor().to(part.master))
        return found

    def _by_rows(self, whole: Tensor) -> Tensor:
        size = -(-len(whole) // self.size)
        mine = whole[self.rank * size : (self.rank + 1) * size].to("cpu", copy=True)
        return DTensor.from_local(
            mine, self._rows, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def training_numbers(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """None: elementwise optimizers, the only ones here, keep tensors."""
        return {}

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, average: Average, how: Reading) -> None:
        self._allocate()
        saved = optimizer_names(path)
        if not saved and never_updated(path):
            self._core.state.clear()
        tensors = self.training_tensors(model, optimizer, average)
        # Under other strategies a parameter that had no gradient yet has no state; here its state is zeros.
        new = {
            part.name for part in self._parts
            if saved and not any(f"{part.name}.{key}" in saved for key in self._state(part))
        }
        tensors = {
            name: tensor for name, tensor in tensors.items()
            if name.removeprefix("optimizer.").rpartition(".")[0] not in new
        }
        prefixes = "model.", "optimizer."
        load_tensors(path, tensors, prefixes, self.checkpoint_group, how, of_frozen(path, model))
        for part in self._parts:
            whole: Any = tensors[f"model.{part.name}"]
            values = whole.full_tensor()
            part.fill(part.master, values.to(part.master.device))
            self._set_computed(part, values)
            for key, state in self._state(part).items() if part.name not in new else ():
                value: Any = tensors[f"optimizer.{part.name}.{key}"]
                if state.ndim:
                    part.fill(state, value.full_tensor().to(state.device))
                else:
                    state.copy_(value)

    def _set_computed(self, part: Part, values: Tensor) -> None:
        """Set the values that the forward uses, beside the master weights."""
        if self.stage < 3:
            part.parameter.data.copy_(values)
        else:
            share: Any = part.parameter
            share.ds_tensor.data[: part.length].copy_(values.flatten()[part.offset : part.offset + part.length])

    def _state(self, part: Part) -> dict[str, Any]:
        """The core optimizer's state of a part; empty for a frozen parameter."""
        return self._core.state[part.master] if part.parameter.requires_grad else {}

    def _allocate(self) -> None:
        """`optim.state.allocate` for the core optimizer, whose groups are given all masters meanwhile."""
        groups, masters = (
            self._core.param_groups,
            list(dict.fromkeys(part.master for part in self._parts if part.parameter.requires_grad)),
        )
        before, gradients = [group["params"] for group in groups], [master.grad for master in masters]
        for group in groups:
            group["params"] = []
        groups[0]["params"] = masters
        allocate(self._core)
        for group, params in zip(groups, before, strict=True):
            group["params"] = params
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient  # with offload, the buffer that gradients are copied into
        if self.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
