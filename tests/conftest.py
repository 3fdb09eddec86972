"""One thread a worker (pytest-xdist starts one for each core), and a cache of its own for the whole run."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
    del os.environ[name]  # of a job that runs the tests: what they stop must not requeue it


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Shared by all workers of the run: the text is tokenised once."""
    base = tmp_path_factory.getbasetemp()
    os.environ["TXTRAIN_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")
