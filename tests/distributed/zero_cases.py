"""Runs one after the other, in processes that are started once: `python -m tests.distributed.zero_cases N FILE`.

FILE is JSON: [[name, [override, ...]], ...]. What goes wrong in a run is its traceback in FILE.<name>.txt; the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.device import needs

ROOT = Path(__file__).resolve().parents[2]


def launch(n: int, cases: dict[str, list[str]], folder: Path, seconds: float = 300) -> None:
    """Run the cases on n processes; `copy=FOLDER` among a case's overrides: its run_dir starts as a copy of that folder."""
    needs(n)
    file = folder / f"cases{n}-{time.time_ns()}.json"
    file.write_text(json.dumps(list(cases.items())))
    command = [sys.executable, "-m", "tests.distributed.zero_cases", str(n), str(file)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=seconds)
    errors = "\n".join(p.read_text() for p in sorted(folder.glob(f"{file.name}.*.txt")))
    assert not errors, errors
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def start(n: int, file: str) -> int:
    from txtrain.parallel.launch import Group
    from txtrain.parallel.world import STORE

    common = os.environ | {STORE: f"{file}.store", "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    with Group() as group:
        group.start([sys.executable, "-m", "tests.distributed.zero_cases", str(n), file], environments)
        return group.wait()


def work(file: str) -> int:
    import torch
    import torch.distributed as dist

    from tests.device import BACKEND, DEVICE
    from txtrain import compose, train

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKEND, init_method=f"file://{file}.store", rank=rank, world_size=size)
    for name, overrides in json.loads(Path(file).read_text()):
        values = dict(o.split("=", 1) for o in overrides)
        source = values.pop("copy", None)
        if source and rank == 0:
            shutil.copytree(source, values["run_dir"])
        dist.barrier()
        try:
            config = compose([*(o for o in overrides if not o.startswith("copy=")), f"trainer.devices={size}"])
            train(config, callbacks=[in_parts(size)] if getattr(config.strategy, "stage", 0) == 3 else [])
        except Exception:  # the border of the process: the test shows it
            Path(f"{file}.{name}-{rank}.txt").write_text(f"{name}, process {rank} of {size}:\n{traceback.format_exc()}")
            return 1  # the others may wait for this one: the group ends
    dist.destroy_process_group()
    return 0


def in_parts(size: int) -> Any:
    """Stage 3: after the set-up and after each step a process holds its part of every parameter, and nothing else."""
    import lightning.pytorch as pl

    class InParts(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            for name, parameter in pl_module.model.named_parameters():
                held: Any = parameter
                assert parameter.numel() == 0, f"{name}: {parameter.numel()} elements"
                assert held.ds_tensor.numel() == -(-held.ds_numel // size), f"{name}: {held.ds_tensor.numel()} of {held.ds_numel}"

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.on_fit_start(trainer, pl_module)

    return InParts()


if __name__ == "__main__":
    sys.exit(work(sys.argv[2]) if "RANK" in os.environ else start(int(sys.argv[1]), sys.argv[2]))
