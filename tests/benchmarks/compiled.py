"""`trainer.compile=true` beside eager: a step after warm-up, breaks of the graph, and what the first step takes.

    python -m tests.benchmarks.compiled [FAMILY ...] [--layers 2] [--rounds 3]

CPU seconds, those of the C++ compiler among them, with an empty cache; and the first step by the clock, where as many kernels are compiled at once
as there are cores. The shape and the turns: sides.py.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from tests.benchmarks.sides import FAMILIES, batch_of, best, pair, step_of
from txtrain.parallel.activation_checkpointing import wrap_blocks


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def compiled_step(family: str, layers: int, n_at_once: int) -> tuple[Callable[[], None], float, float]:
    """A step of compiled blocks, and what the first one took: CPU seconds, unless kernels are compiled by other processes; and by the clock."""
    from torch._inductor import config

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config.compile_threads = n_at_once
    model = pair(family, layers)[1]
    wrap_blocks(model, "none", True)
    step = step_of(model, batch_of(family))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        begin, by_clock = cpu_seconds(), time.perf_counter()
        step()
        return step, cpu_seconds() - begin, time.perf_counter() - by_clock


def compiled_times(family: str, layers: int, rounds: int) -> tuple[float, float, float, int]:
    """A compiled step, an eager one, the first one, and breaks of the graph."""
    step, first, _ = compiled_step(family, layers, 1)
    fast, slow = best(rounds, step, step_of(pair(family, layers)[1], batch_of(family)))
    return fast, slow, first, sum(torch._dynamo.utils.counters["graph_break"].values())


def first_by_clock(family: str, layers: int) -> float:
    """Of a process of its own, its imports of the compiler included."""
    words = [sys.executable, "-m", "tests.benchmarks.compiled", family, "--layers", str(layers), "--first"]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", action="store_true", help="the first step by the clock alone, in seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for family in given.families:
        if given.first:
            print(compiled_step(family, given.layers, os.cpu_count() or 1)[-1])
            continue
        fast, slow, first, breaks = compiled_times(family, given.layers, given.rounds)
        by_clock = first_by_clock(family, given.layers)
        took = f"first step {first:5.1f} CPU s, {by_clock:5.1f} s by the clock"
        print(f"{family:12} compiled {fast * 1e3:6.0f} ms   eager {slow * 1e3:6.0f} ms   {slow / fast:.2f} x   {took}   breaks {breaks}", flush=True)


if __name__ == "__main__":
    main()
