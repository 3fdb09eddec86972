"""What a checkpoint costs: size, time, and how long training waits for it, beside `torch.save` of the same tensors.

    python -m tests.benchmarks.saves [FOLDER] [key=value ...]        a decoder of 110 M parameters with AdamW's state

Each round does all of them one after the other, so that the ratios hold on a machine that does other things as well; the middle of the
rounds is printed, and the first asynchronous save apart: the memory that it copies into was taken beside the training, after the first step as
in a run. `torch.save` is followed by the same fsync. A step is one of 1 x 128 tokens; training goes on with such steps while a checkpoint is written behind it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import txtrain
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import restore
from txtrain.checkpoint.saver import Saver
from txtrain.checkpoint.state import RunState
from txtrain.ground import files
from txtrain.registry import make
from txtrain.training.module import LitModule

ROUNDS = 3
MODEL = (
    *("model=llama2", "model.n_layers=12", "model.dim=768", "model.n_heads=12", "model.vocab_size=32000", "model.max_seq_len=128"),
    *("data=text", "data.path=none", "data.tokenizer=bytes", "trainer.accelerator=cpu"),
)
TORCH, WAITING, FIRST, STALL, BEHIND = "torch.save", "waiting", "behind: the first one's stall", "behind: the stall", "behind: until it is complete"
STEP, STEP_BESIDE = "a step", "a step while a checkpoint is written"


class Training:
    """A model and its optimizer, as a run has them after its first step."""

    def __init__(self, overrides: list[str]) -> None:
        config = txtrain.compose([*MODEL, *overrides])
        assert isinstance(config, txtrain.config.schema.Train)
        module = LitModule(config)
        module.configure_model()
        self.model = module.model
        self.optimizer = make("optimizer", config.optimizer, params=module.parameter_groups())
        self.ids = torch.randint(0, config.model.vocab_size, (1, config.model.max_seq_len))
        self.step()

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        return restore.training_tensors(self.model, self.optimizer)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def nothing(path: Path) -> None: ...


def measure(folder: Path, training: Training) -> tuple[dict[str, list[float]], dict[str, int]]:
    seen: dict[str, list[float]] = {name: [] for name in (TORCH, WAITING, FIRST, STALL, BEHIND, STEP, STEP_BESIDE)}
    sizes: dict[str, int] = {}
    waiting, behind = (Saver(None, behind, done=nothing, warn=print) for behind in (False, True))

    def with_torch(path: Path) -> None:
        torch.save(training.tensors(), path)
        files.sync(path)

    behind.prepare(training.tensors)
    training.step()
    for i in range(ROUNDS + 1):
        file, one, other = folder / "torch.pt", folder / "step_00000001", folder / "step_00000002"
        seen[TORCH].append(timed(lambda: with_torch(file)))  # noqa: B023
        seen[WAITING].append(timed(lambda: waiting.save(one, training.tensors(), RunState(step=1), nothing, must=False)))  # noqa: B023
        seen[STEP].append(timed(training.step))
        began = time.perf_counter()
        stall = timed(lambda: behind.save(other, training.tensors(), RunState(step=2), nothing, must=False))  # noqa: B023
        seen[STALL if i else FIRST].append(stall)
        while not checkpoint.is_complete(other):
            seen[STEP_BESIDE].append(timed(training.step))
        behind.wait()
        seen[BEHIND].append(time.perf_counter() - began)
        print(f"round {i}: {', '.join(f'{name} {times[-1]:.2f}' for name, times in seen.items() if times)}", file=sys.stderr, flush=True)
        sizes |= {TORCH: file.stat().st_size, WAITING: sum(p.stat().st_size for p in one.rglob("*") if p.is_file())}
        file.unlink()
        for path in (one, other):
            shutil.rmtree(path)
    return seen, sizes


def main() -> None:
    given = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="saves-", dir=given.pop(0) if given and "=" not in given[0] else None))
    training = Training(given)
    n, held = sum(p.numel() for p in training.model.parameters()), sum(t.nbytes for t in training.tensors().values())
    try:
        seen, sizes = measure(folder, training)
    finally:
        shutil.rmtree(folder)
    middle = {name: statistics.median(times) for name, times in seen.items() if times}
    print(f"{n / 1e6:.1f} M parameters, {held / 1e6:,.1f} MB of tensors; torch.save {sizes[TORCH] / 1e6:,.1f} MB, checkpoint {sizes[WAITING] / 1e6:,.1f} MB")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {ROUNDS + 1} rounds, {folder.parent}")
    print("| | seconds | as a share of waiting | of torch.save | all rounds |")
    print("|---|---|---|---|---|")
    for name, value in middle.items():
        rounds = ", ".join(f"{x:.2f}" for x in seen[name][:12])
        print(f"| {name} | {value:.2f} | {value / middle[WAITING]:.3f} | {value / middle[TORCH]:.3f} | {rounds} |")
    print(json.dumps({"stall/waiting": middle[STALL] / middle[WAITING]}))


if __name__ == "__main__":
    main()
