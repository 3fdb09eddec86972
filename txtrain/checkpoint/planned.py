"""Ranks that read a checkpoint together, by a plan of torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from txtrain.checkpoint.reader import WEIGHTS, NotFiniteError, Reader
from txtrain.hf.pieces import is_finite


def read_together(reader: Reader, into: Mapping[str, Tensor], group: Any) -> list[BaseException]:
    """Read tensors in place, of a sharded one this rank's shard. Returns what any rank met (`Reader.read`)."""
    try:
        load(dict(into), storage_reader=PlannedReader(reader), process_group=group)
    except CheckpointException as e:  # holds the exceptions of all ranks
        return [exception for exception, _ in e.failures.values()]
    return []


class PlannedReader(HuggingFaceStorageReader):
    """Reads what DCP's plan gives this rank."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(str(reader.folder))
        self.reader = reader

    def read_metadata(self) -> Metadata:
        """The shards of each tensor, from the headers."""
        headers = self.reader.headers
        found = {
            name: TensorStorageMetadata(TensorProperties(dtype=headers.dtypes[name]), torch.Size(shape), [])
            for name, shape in headers.shapes.items()
        }
        for (name, offsets), path in headers.parts.items():
            shape = headers.files[path].entries[name].shape
            found[name].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)))
        places = {MetadataIndex(name, offsets): path for (name, offsets), path in headers.parts.items()}
        return Metadata(dict(found), storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Shards that no rank reads whole (their number has changed) are divided over the ranks to be verified."""
        if not self.reader.verify:
            return plans
        items = [item for plan in plans for item in plan.items]
        rest = {item.storage_index for item in items} - {item.storage_index for item in items if self._whole(item)}
        turns = sorted(rest, key=lambda index: (index.fqn, tuple(index.offset or ())))
        return [dc.replace(plan, storage_data=turns[i :: len(plans)]) for i, plan in enumerate(plans)]

    def _whole(self, item: ReadItem) -> bool:
        index = item.storage_index
        return tuple(item.lengths) == self.reader.headers.files[self.storage_data[index]].entries[index.fqn].shape

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises:
        ConfigError: a tensor has changed since it was written. NotFiniteError: weights hold NaN or infinity.
        """
        from safetensors import safe_open

        strange = []
        for item in plan.items:
            target, index = planner.resolve_tensor(item).detach(), item.storage_index
            path, name = self.storage_data[index], index.fqn
            check = self.reader.finite and name.startswith(WEIGHTS)
            if self._whole(item):
                fine = self.reader.read_part(path, name, target, check)
            else:
                with safe_open(path, "pt") as f:
                    part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target.copy_(f.get_slice(name)[part])
                fine = not check or is_finite(target)
            strange += [] if fine else [name]
            planner.commit_tensor(item, target)
        for index in plan.storage_data or ():
            self.reader.read_part(self.storage_data[index], index.fqn, None, finite=False)
        if strange:
            raise NotFiniteError(*strange)
        done: Future[None] = Future()
        done.set_result(None)
        return done
