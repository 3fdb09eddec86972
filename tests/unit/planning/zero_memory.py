"""A real step of one of two processes under DeepSpeed, every storage watched: prints bytes held between steps and at the fullest moment.

    python -m tests.unit.planning.zero_memory BUCKET[,AHEAD] overrides...

AHEAD: elements that stage 3 gathers ahead, and the distance between two uses of a parameter from which on it is given back.
"""

import contextlib
import gc
import json
import sys
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import txtrain
from txtrain.parallel import deepspeed, deepspeed_engine
from txtrain.parallel.build import make_parallel
from txtrain.planning.memory.batch_shapes import tensors_of
from txtrain.training.simulate import Unattended, _Plain


class Watched(TorchDispatchMode):
    """Bytes of all storages that were there at the beginning, or came out of an operation since."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for found in gc.get_objects():
            with contextlib.suppress(Exception):  # lazy modules raise when they are looked at
                if isinstance(found, torch.Tensor):
                    self.add(found)
        self.held = self.now

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            if isinstance(made, torch.Tensor):
                self.add(made)
        return result


class Stepped(_Plain):
    """The engine's step where a LightningOptimizer is expected."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)


def near(ahead: int) -> None:
    made = deepspeed.engine_config

    def config(*given: Any) -> dict[str, Any]:
        found = made(*given)
        found["zero_optimization"] |= {"stage3_prefetch_bucket_size": ahead, "stage3_max_reuse_distance": ahead}
        return found

    deepspeed.engine_config = config


def main(bucket: int, ahead: int | None, words: list[str]) -> None:
    deepspeed_engine.BUCKET = bucket
    if ahead is not None:
        near(ahead)
    config = txtrain.compose(words)
    parallel = make_parallel(config)
    with parallel.started():
        module = Unattended(config, None, parallel)
        module.configure_model()
        module.plan(10)
        module._optimizer = Stepped(module.configure_optimizers())
        batch = tensors_of(config, config.data.global_batch_size // parallel.size)
        for step in range(2):
            gc.collect()
            with Watched() as seen:
                module.training_step(batch, step)
        print(json.dumps({"held": seen.held, "peak": seen.peak}), flush=True)


if __name__ == "__main__":
    sizes = [int(n) for n in sys.argv[1].split(",")]
    main(sizes[0], sizes[1] if len(sizes) > 1 else None, sys.argv[2:])
