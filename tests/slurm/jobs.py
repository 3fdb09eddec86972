"""Small runs as jobs, submitted as a person would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.compose.conftest import ROOT
from tests.slurm.cluster import ENDED, Cluster
from tests.training import TINY, rows, weights, write_text

STEPS = 24
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30")
ONE_CPU = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30")


def overrides(folder: Path, *more: str) -> list[str]:
    """Of a tiny run on a text in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return [*TINY, f"trainer.max_steps={STEPS}", f"data.path={text}", f"data.cache_dir={folder / 'cache'}", *more]


def paced(seconds: float) -> list[str]:
    return ["imports=[tests.slurm.pace]", "callbacks.pace._target_=tests.slurm.pace.Pace", f"callbacks.pace.seconds={seconds}"]


def submit(cluster: Cluster, folder: Path, script: str, *words: str, **env: str) -> str:
    """`bash slurm/SCRIPT WORDS` in `folder`; the job's number, which sbatch says last, after the plan."""
    return cluster.call("bash", str(ROOT / "slurm" / script), "--parsable", *words, cwd=folder, **env).split()[-1]


def at_step(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether so many steps are in metrics.csv."""
    return lambda: (run_dir / "metrics.csv").exists() and (run_dir / "metrics.csv").read_text().count("\n") > step


def when(true: Callable[[], bool], cluster: Cluster, job: str | None = None, timeout: float = 400) -> None:
    """Wait, as long as there is a reason to: while `job` has not ended.

    Raises:
        AssertionError: it does not come true in time, or cannot any more.
    """
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"{cluster.quietly('squeue')}\n{cluster.logs()}"
        if job is not None:
            found = cluster.job(job)
            assert found["JobState"] not in ENDED or true(), f"job {job} has ended: {found}"
        time.sleep(0.3)


def facts(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return found


def same(a: Path, b: Path) -> None:
    """Two runs have the same rows of metrics.csv, and the same tensors, bit for bit.

    Raises:
        AssertionError: with the first row that differs.
    """
    ours, theirs = rows(a), rows(b)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert next(((x, y) for x, y in zip(ours, theirs, strict=True) if x != y), None) is None
    assert weights(a) == weights(b)


def said(folder: Path, number: str) -> str:
    """What a job has written, of all its starts."""
    return (folder / f"slurm-{number}.out").read_text()
