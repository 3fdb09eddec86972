"""What is exchanged while a backward goes on, with one process in place of several."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.equivalence import KINDS
from tests.distributed.runs import overrides
from txtrain import compose
from txtrain.data.module import DataModule
from txtrain.model.build import build_model
from txtrain.objectives.build import build_objective
from txtrain.parallel.buckets import GradientBuckets, as_read


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_on_their_way_before_the_last_ones_are_there(kind, tmp_path, group):
    """All but what is read first: embeddings, positions, and (where it is tied) the head."""
    config = compose(overrides(tmp_path, KINDS[kind], "run"))
    model, objective, batch = build_model(config.model), build_objective(config), DataModule(config).first(8)
    parameters = as_read(model)
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))
    buckets = GradientBuckets(parameters, group, bucket_bytes=1)
    expected = {}

    def backward():
        torch.manual_seed(0)
        objective.total(objective(model, batch, objective.denominators(batch))).backward()

    backward()
    for p in parameters:
        expected[p], p.grad = p.grad, None
    buckets.active = True
    backward()
    sent = sum(p.numel() for bucket in buckets._buckets[: len(buckets._sent)] for p in bucket)
    first = {id(p) for name, p in model.named_parameters() if "embedding" in name or "position" in name}
    late = sum(p.numel() for p in parameters if id(p) in first)
    buckets.finish()
    assert all(expected[p] is None if p.grad is None else p.grad.equal(expected[p]) for p in parameters)
    print(f"{kind}: {sent / sum(p.numel() for p in parameters):.2f} of the values were sent before the backward ended")
    assert sent >= sum(p.numel() for p in parameters) - late
