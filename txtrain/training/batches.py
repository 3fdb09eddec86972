"""A batch cut into micro-batches, and the seed of each step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from txtrain.objectives.base import Batch
from txtrain.run_config import RunConfig


def cut(batch: Batch, size: int) -> Iterator[dict[str, Tensor]]:
    """The batch in parts of at most `size` samples."""
    n = len(next(iter(batch.values())))
    for start in range(0, n, size):
        yield {name: value[start : start + size] for name, value in batch.items()}


_EXACT = ("labels", "reference_log_probs", "teacher_log_probs")  # not read by the model: their numbers are not rounded
_BITS = " as bits"


def placed(batch: Batch, device: torch.device, config: RunConfig) -> dict[str, Tensor]:
    """The batch where the model is; numbers that it reads in its precision."""
    halved = torch.bfloat16 if config.trainer.precision == "bf16-true" else None
    read = {name for name, x in batch.items() if x.is_floating_point() and name not in _EXACT}
    return {name: x.to(device, halved if name in read else None) for name, x in batch.items()}


def as_bits(batch: Batch) -> Batch:
    """Exact numbers as integers, since Lightning rounds each float of a batch to the dtype of a model in bfloat16."""
    exact = [name for name in _EXACT if name in batch and batch[name].is_floating_point()]
    return {
        **{name: x for name, x in batch.items() if name not in exact},
        **{f"{name}{_BITS}": batch[name].float().view(torch.int32) for name in exact},
    }


def from_bits(batch: Batch) -> Batch:
    """What `as_bits` was given."""
    return {name.removesuffix(_BITS): x.view(torch.float32) if name.endswith(_BITS) else x for name, x in batch.items()}


def is_filler(batch: Batch) -> bool:
    """Whether the batch is a filler on a rank without samples, so that all ranks make the same number of forwards."""
    index = batch.get("sample_index")
    return index is not None and bool((index < 0).any())


def add(shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]}


def seed_everything(seed: int, step: int | None = None, rank: int = 0) -> None:
    """Seed Python, NumPy and torch for the initial weights (step: None), or for one step of one rank.

    Every step starts from its own seed, so that what happens between steps (a validation, a sample, a callback, a
    resume) cannot shift later random numbers, and there is no generator state to save.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    mixed = int.from_bytes(digest, "little") >> 1
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed formats a stack trace where there is no GPU
    if torch.cuda.is_available():
        torch.cuda.manual_seed(mixed)
