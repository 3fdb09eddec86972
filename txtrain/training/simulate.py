"""The memory of a step, on the real wrapped model with fake tensors, a fake process group and torch's memory tracker.

The model is built by `build_model`, wrapped by the strategy's own `set_up`, and trained by `LitModule.training_step`;
only storage and messages are missing. Takes seconds for billions of parameters, whatever the number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from txtrain.config.schema import Train
from txtrain.model.position.encodings import frequencies
from txtrain.parallel.config import processes
from txtrain.parallel.gradient_buckets import local
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.world import World
from txtrain.planning.memory.batch_shapes import n_chosen, tensors_of
from txtrain.registry import resolve
from txtrain.training.module import LitModule

STEPS = 2  # in the first there is no optimizer state yet


@dc.dataclass(frozen=True)
class Simulated:
    """Of one rank, in the second step.

    Attributes:
        peak: bytes at the peak; parts: what they are, in the tracker's words.
        held: bytes between steps.
        communicated: bytes of each collective's full buffer in the step; calls: how often it was called.
    """

    peak: int
    parts: dict[str, int]
    held: int
    communicated: dict[str, int]
    calls: dict[str, int]


def simulate(config: Train, *, world: int | None = None) -> Simulated:
    """One rank of `world` (by default as many as the configuration starts), without memory for its tensors.

    Raises:
        ConfigError: the strategy cannot use so many ranks.
    """
    with _processes(config, world or processes(config) or 1) as parallel:
        try:
            return _tracked(config, parallel, FakeTensorMode(allow_non_fake_inputs=True))
        finally:
            frequencies.cache_clear()  # those made here are fake


def measure(config: Train, parallel: OneProcess) -> Simulated:
    """The same with real tensors, on the ranks that there are."""
    return _tracked(config, parallel, contextlib.nullcontext())


def _tracked(config: Train, parallel: OneProcess, mode: Any) -> Simulated:
    from txtrain.model.build import build_model, transformer

    is_fake = isinstance(mode, FakeTensorMode)
    with mode, _default(torch.bfloat16 if config.trainer.precision == "bf16-true" else torch.float32):
        model = (transformer if is_fake else build_model)(config.model)
        module = Unattended(config, model, parallel)
    module.configure_model()  # outside: a device mesh inspects itself with real tensors
    parallel.reduce({"first": torch.zeros(())})
    with mode:
        optimizer = module.attach(config.trainer.max_steps)
        share = config.data.global_batch_size // parallel.size
        batch = tensors_of(config, share)
        tracker: Any = FSDPMemTracker(module.model, optimizer) if module.is_sharded else _Tracker()
        beside = (*batch.values(), *(local(value) for value in module.average.values.values()))
        tracker.track_inputs(beside) if module.is_sharded else tracker.track_external(module.model, optimizer, *beside)
        module.after_backward = tracker.reset_mod_stats  # it takes a second forward for an error
        sent = Sent()
        for step in range(STEPS):
            sent.clear()
            as_real = (
                _AsReal(n_chosen(config, min(config.micro_batch_size, share))) if is_fake else contextlib.nullcontext()
            )
            inside: Any = _Inside() if is_fake else contextlib.nullcontext()  # type: ignore[no-untyped-call]
            with as_real, sent, tracker, inside, parallel.autocast(torch.device("cpu")):
                module.training_step(batch, step)
            peak, now = (_of_cpu(tracker.get_tracker_snapshot(kind)) for kind in ("peak", "current"))
            tracker.reset_mod_stats()
    return Simulated(peak.pop("Total"), peak, now["Total"], sent.bytes, sent.calls)


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _of_cpu(snapshot: dict[torch.device, dict[Any, int]]) -> dict[str, int]:
    (found,) = (kinds for device, kinds in snapshot.items() if device.type != "meta")
    return {getattr(kind, "value", str(kind)): n for kind, n in found.items()}


@contextlib.contextmanager
def _processes(config: Train, world: int) -> Iterator[OneProcess]:
    """The strategy as rank 0 of `world` sees it; messages go nowhere."""
    alone = world == 1 and not config.strategy.cpu_offload
    if alone:
        yield OneProcess(config)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made: Any = resolve("strategy", config.strategy.type)(config, World(0, world, 0, world))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        made.meet()
        yield made
    finally:
        dist.destroy_process_group()


class _Tracker(MemTracker):  # type: ignore[no-untyped-call]  # MemTracker's own metaclass hook
    """torch's own hooks every parameter's gradient, and fails on a frozen parameter."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> Any:
        for parameter in module.parameters():
            if not parameter.requires_grad:
                self._param_to_grad_hook_handles[parameter] = (
                    RemovableHandle(OrderedDict()),
                    RemovableHandle(OrderedDict()),
                )
        return super()._track_module_params_and_buffers(module, install_grad_hooks)


class Unattended(LitModule):
    """Steps without a trainer. after_backward: called after that of each micro-batch."""

    after_backward: Callable[[], None] | None = None

    def attach(self, total_steps: int | None) -> torch.optim.Optimizer:
        self.plan(total_steps or STEPS)
        optimizer = self.configure_optimizers()
        self._optimizer = _Plain(optimizer)
        return optimizer

    @property
    def is_sharded(self) -> bool:
        from torch.distributed.fsdp import FSDPModule

        return isinstance(self.model, FSDPModule)

    def is_finite(self, total: Tensor) -> bool:
        return True  # fake tensors have no values

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self._optimizer

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.autograd.backward(loss)
        if self.after_backward is not None:
            self.after_backward()


class _Plain(LightningOptimizer):
    """Lightning's wrapper without its strategy."""

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return self._optimizer.step()


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the full buffer of each collective, and how often it was called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        self.bytes, self.calls = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is DTensor for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func in collective_ops and func not in sync_ops:
            name = NAMES.get(func._schema.name.split("::")[1].strip("_"), func._schema.name)
            self.bytes[name] += int(CollectiveOp.get_comm_tensor_size(func, result, args, kwargs))
            self.calls[name] += 1
        return result


NAMES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "alltoall_base": "all_to_all",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}


INSIDE = {torch.ops.c10d._reduce_scatter_base_.default: 1, torch.ops.aten.logsumexp.default: 0}  # argument copied


class _Inside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows the tracker what real kernels hold and fake ones do not: gloo's reduce_scatter sums a copy of its input,
    logsumexp sums its exponentials."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is DTensor for t in types):
            return NotImplemented
        at = INSIDE.get(func)
        held = None if at is None else torch.empty_like(args[at])
        result = func(*args, **(kwargs or {}))
        del held
        return result


class _AsReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes up for differences between torch's fake tensors and real ones.

    Indexing with a mask has no known size: it is taken to be `n_chosen`. A flag reads as unset (some token is padding),
    a number (a drawn seed, a step) as 1, except for counts: all experts are visited equally often. The output of flash
    attention is laid out by position, not by head. The grouped product takes float32.
    """

    def __init__(self, n_chosen: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_chosen = n_chosen
        self.counts: Any = WeakIdKeyDictionary()  # by storage of integers: their sum, and over how many it goes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (ATEN.index.Tensor, ATEN.index_put.default) and args[1][0].dtype == torch.bool:
            shape, n = args[1][0].shape, self.n_chosen
            assert n is not None, "an objective that chooses positions tells how many"
            args = (args[0], [torch.zeros(n, dtype=torch.int64) for _ in shape], *args[2:])
        if func is ATEN._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self._number(args[0])
        if func is ATEN._grouped_mm.default:
            return _grouped_mm(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is ATEN._scaled_dot_product_flash_attention_for_cpu.default:
            B, N, T, H = result[0].shape
            return result[0].new_empty(B, T, N, H).transpose(1, 2), *result[1:]
        self._count(func, args, result)
        return result

    def _number(self, x: Tensor) -> int:
        total, n = self.counts.get(x.untyped_storage(), (1, 1))
        return int(total // n + (int(x.storage_offset()) % n < total % n))

    def _count(self, func: Any, args: Any, result: Any) -> None:
        """Rows of each expert; of each rank's experts; received rows, as many as were sent."""
        if func is ATEN.scatter_add.default and not args[0].is_floating_point():
            self.counts[result.untyped_storage()] = args[2].numel(), args[0].numel()
        elif func in (ATEN.sum.dim_IntList, ATEN.stack.default, ATEN.clone.default, ALL_TO_ALL):
            made, source = (
                (args[0], args[1]) if func is ALL_TO_ALL
                else (result, args[0][0] if func is ATEN.stack.default else args[0])
            )
            total, n = self.counts.get(source.untyped_storage(), (0, 0))
            if total:
                self.counts[made.untyped_storage()] = total, made.numel() if func is ATEN.sum.dim_IntList else n


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Groups of rows times a matrix each; if both are 2-D, the sum over each group's rows of their outer products."""
    shape = (offs.shape[0], a.shape[0], b.shape[1]) if a.ndim == b.ndim == 2 else (a.shape[0], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype)


ATEN = torch.ops.aten
ALL_TO_ALL = torch.ops.c10d.alltoall_base_.default
