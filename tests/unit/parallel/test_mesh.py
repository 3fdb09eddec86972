"""How long ranks wait for each other."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.training import tiny
from txtrain.checkpoint.saver import Saver
from txtrain.ground.waiting import wait_in
from txtrain.parallel.mesh import Mesh
from txtrain.parallel.world import World


def limit(group):
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_wait_for_one_that_works_or_was_suspended_for_longer_than_torch_would(strategy, tmp_path):
    """It tokenises for hours, say. Who is dead or stands still is seen by the launcher, or by the heartbeat."""
    mesh = Mesh(tiny(tmp_path, f"strategy={strategy}"), World())
    with mesh.started():
        behind = Saver(mesh.checkpoint_group, behind=True, done=print, warn=print)
        groups = [mesh.checkpoint_group, behind.group, mesh._data_group, dist.group.WORLD, *mesh.mesh.get_all_groups()]
        assert [limit(group) for group in groups] == [timedelta(days=7)] * len(groups)
        own = dist.new_group()
        wait_in(own)
        assert limit(own) == timedelta(days=7)
