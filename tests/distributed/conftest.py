"""docs/distributed.md is written from the differences that were seen when TXTRAIN_WRITE_DOCS=1 (without xdist)."""

import os
from pathlib import Path

import torch

from tests.device import DEVICE
from tests.distributed import equivalence


def pytest_sessionfinish(session, exitstatus):
    if os.environ.get("TXTRAIN_WRITE_DOCS") == "1" and exitstatus == 0 and equivalence.SEEN and not hasattr(session.config, "workerinput"):
        where = f"{os.cpu_count()} CPU cores, gloo" if DEVICE == "cpu" else f"{torch.cuda.get_device_name()}, NCCL"
        equivalence.write(Path(session.config.rootpath) / "docs" / "distributed.md", f"torch {torch.__version__}, {where}.")
