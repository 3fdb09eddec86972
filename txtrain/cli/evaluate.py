"""`txtrain evaluate`: the metrics of a trained model, as a table."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from txtrain.config.composed import Composed, to_file
from txtrain.config.schema_of_trained import Evaluate, OnTrained
from txtrain.errors import ConfigError, visible
from txtrain.parallel.launch import launch, n_processes
from txtrain.parallel.world import World

if TYPE_CHECKING:
    from txtrain.training.evaluation import Evaluation


def run_evaluate(job: Composed) -> int:
    """Evaluate in this process, or in several that it starts, and print the table.

    Raises:
        ConfigError: as `txtrain.evaluate`.
    """
    config: Evaluate = job.config
    check_checkpoint(config)
    if (n := n_processes(config)) > 1 and not config.tasks:  # which are evaluated by one: devices=auto is this one
        return launch(config, partial(to_file, job), n, "evaluate")
    tell_notes(job)
    from txtrain.training.evaluation import run

    if config.tasks:
        made = run(config)
    else:
        with counting("evaluated") as tick:
            made = run(config, tick)
    if World.here().rank == 0:
        print(visible("\n".join(lines(made))))
        if config.out is not None:
            print(f"written: {config.out}")
    return 0


def check_checkpoint(config: OnTrained) -> None:
    """Raise ConfigError if there is none."""
    if config.checkpoint is None:
        raise ConfigError("`checkpoint` must be given: a run, a checkpoint, an export or a Hugging Face folder.")


def tell_notes(job: Composed) -> None:
    for note in job.notes if World.here().rank == 0 else ():
        print(visible(f"txtrain: {note}"), file=sys.stderr)


def lines(made: Evaluation) -> Iterator[str]:
    """What was evaluated, and a row for each metric."""
    facts = made.facts
    step = f", step {facts['step']}" if "step" in facts else ""
    step += ", averaged weights" if facts.get("weights") == "ema" else ""
    read = (
        f"{facts['data']}: {facts['n_samples']:,} samples; objective={facts['objective']}" if "data" in facts
        else f"lm_eval: {', '.join(facts['tasks'])}"
    )
    yield f"{facts['checkpoint']}{step}; {read}"
    width = max(map(len, made.metrics), default=0)
    for name, one in made.metrics.items():
        ends = "" if one.low is None or one.high is None else f"   95 %: {one.low:.6g} to {one.high:.6g}"
        yield f"  {name:<{width}}  {one.value:<12.6g}{ends}   (n = {one.n:,})"


@contextlib.contextmanager
def counting(done: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on standard error: a bar with a rate on a terminal, one line at the end elsewhere; on rank 0 alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if World.here().rank:
        yield lambda n_done, n: None
        return
    console = Console(stderr=True, highlight=False)
    speed = TextColumn("{task.fields[rate]:.1f} rows/s")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn()
    began, first, sets = 0.0, 0, [0, 0]  # rows of sets that are done, and of the present one
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(done, total=None, rate=0.0)

        def tick(n_done: int, n: int) -> None:
            nonlocal began, first
            if not began:  # the first forward is slower than others
                began, first = time.monotonic(), n_done
            rate = (n_done - first) / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=n_done, total=n, rate=rate)
            if n_done == n:
                sets[0] += n

        start = time.monotonic()
        yield tick
    seconds = time.monotonic() - start
    print(f"{done}: {sets[0]:,} rows in {seconds:.1f} s ({sets[0] / max(seconds, 1e-9):.1f} rows/s)", file=sys.stderr)
