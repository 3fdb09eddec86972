"""Optimizers and the average where parameters are cut over processes: the same steps as on one."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_cut_parameters_make_the_same_steps_as_whole_ones(tmp_path, world):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.optim.sharded_program"]
    started = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(world)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(out.strip() == "equal" for out, _ in ended), "\n".join(f"rank {rank}: {err[-4000:]}" for rank, (_, err) in enumerate(ended))
