"""Every strategy beside one process, on one curve: `python -m tests.benchmarks.strategies [FOLDER] [KEY=VALUE ...]`.

Trains the same run under each strategy on two processes (and on four under hsdp and fsdp_tp) and prints the losses side by side with the
largest relative difference, as docs/distributed.md has them; with matplotlib installed it also draws FOLDER/strategies.png. Two processors
and no hub suffice: the text is that of data=python_docs, unless KEY=VALUE says otherwise (data=wikitext where there is a hub). A run that FOLDER
has is not made again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from txtrain.config.paths import options
from txtrain.monitor.metrics_csv import read

STRATEGIES = {name: 2 for name in options("strategy") if name != "auto"}  # and the number of processes
WIDER = {"hsdp": 4, "fsdp_tp": 4}  # on two processes one of their two dimensions is of size 1
RUNS = [("auto", 1), *STRATEGIES.items(), *WIDER.items()]
RUN = (
    "model=llama2",
    "data=python_docs",
    "trainer.accelerator=cpu",
    "trainer.max_steps=20",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0",
    "data.global_batch_size=8",
    "data.seq_len=64",
    "scheduler.warmup_steps=5",
    "sample.n=0",
)
SHOWN = (1, 5, 10, 15, 20)


def losses(folder: Path, strategy: str, n: int, *more: str) -> list[float]:
    run_dir = folder / f"{strategy}_{n}"  # complete or continued, if it is there
    how = (f"strategy={strategy}", f"trainer.devices={n}", f"run_dir={run_dir}")
    subprocess.run([sys.executable, "-m", "txtrain", *RUN, *more, *how], check=True, stdout=subprocess.DEVNULL)
    return [float(row["loss"]) for row in read(run_dir / "metrics.csv")]


def main() -> None:
    given = sys.argv[1:]
    folder = Path(given.pop(0) if given and "=" not in given[0] else tempfile.mkdtemp(prefix="strategies-"))
    reference: list[float] = []
    print(f"| strategy | processes | {' | '.join(f'step {n}' for n in SHOWN)} | largest relative difference |")
    print(f"|---|---|{'---|' * len(SHOWN)}---|")
    curves = {}
    for strategy, n in RUNS:
        name = "one process" if n == 1 else strategy
        curves[f"{name}, {n}"] = seen = losses(folder, strategy, n, *given)
        reference = reference or seen
        difference = max(abs(a - b) / a for a, b in zip(reference, seen, strict=True))
        print(f"| {name} | {n} | {' | '.join(f'{seen[n - 1]:.5f}' for n in SHOWN)} | {difference:.1e} |", flush=True)
    draw(curves, folder / "strategies.png")


def draw(curves: dict[str, list[float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    for i, (name, seen) in enumerate(curves.items()):  # they lie on each other: the later the thinner
        pyplot.plot(range(1, len(seen) + 1), seen, label=name, linewidth=len(curves) - i)
    pyplot.xlabel("step")
    pyplot.ylabel("loss, nats a token")
    pyplot.legend()
    pyplot.savefig(path, dpi=80)
    print(path)


if __name__ == "__main__":
    main()
