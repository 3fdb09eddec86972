"""Where the tests of tests/distributed compute: on the processor, or with `pytest --device cuda` on GPUs, one for each process."""

from __future__ import annotations

import os

import pytest

VARIABLE = "TXTRAIN_TEST_DEVICE"
DEVICE = os.environ.get(VARIABLE, "cpu")  # set by conftest.py, before a test is imported, and passed on to workers
BACKEND = "gloo" if DEVICE == "cpu" else "cpu:gloo,cuda:nccl"


def accelerator(device: str = DEVICE) -> str:
    return f"trainer.accelerator={'cpu' if device == 'cpu' else 'gpu'}"


def needs(n_processes: int, device: str = DEVICE) -> None:
    """Skip the test where there is not a GPU for each process."""
    if device == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    if found < n_processes:
        pytest.skip(f"needs {n_processes} CUDA device{'s' if n_processes > 1 else ''}, and torch sees {found}")
