"""One thread a worker (pytest-xdist starts one for each core), a cache of its own for the whole run, and where it computes (--device)."""

import gc
import os

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
    del os.environ[name]  # of a job that runs the tests: what they stop must not requeue it


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests/distributed computes; cuda: one GPU for each process")


def pytest_configure(config):
    os.environ["TXTRAIN_TEST_DEVICE"] = config.getoption("--device")  # tests.device reads it when the first test imports it


def pytest_collection_modifyitems(items):
    """`-m gpu` and `-m multigpu` collect everywhere, and say why they do not run."""
    items.sort(key=lambda item: item.path.name != "test_ci.py")  # first: at the end the longest test would run alone
    found = torch.cuda.device_count()
    for item in items:
        for mark, n in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(mark) and found < n:
                item.add_marker(pytest.mark.skip(reason=f"needs {n} CUDA device{'s' if n > 1 else ''}, and torch sees {found}"))


def pytest_collection_finish(session):
    """What is imported and collected stays: the garbage collector need not walk through it before each test's own."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Shared by all workers of the run: the text is tokenised once."""
    base = tmp_path_factory.getbasetemp()
    os.environ["TXTRAIN_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")
