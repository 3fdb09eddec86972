"""`trainer.compile=true` beside eager: a step after warm-up, breaks of the graph, and what the first step takes.

    python -m tests.benchmarks.compiled [FAMILY ...] [--layers 2] [--rounds 3]

CPU seconds, those of the C++ compiler among them, with an empty cache. The shape and the turns: sides.py.
"""

import argparse
import os
import resource
import tempfile
import time

import torch

from tests.benchmarks.sides import FAMILIES, batch_of, best, pair, step_of
from txtrain.parallel.activation_checkpointing import wrap_blocks


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def compiled_times(family: str, layers: int, rounds: int) -> tuple[float, float, float, int]:
    """A compiled step, an eager one, the first one, and breaks of the graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # what a pool compiles would not be counted
    batch = batch_of(family)
    compiled, eager = (pair(family, layers)[1] for _ in range(2))
    wrap_blocks(compiled, "none", True)
    step = step_of(compiled, batch)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        begin = cpu_seconds()
        step()
        first = cpu_seconds() - begin
        fast, slow = best(rounds, step, step_of(eager, batch))
    return fast, slow, first, sum(torch._dynamo.utils.counters["graph_break"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for family in given.families:
        fast, slow, first, breaks = compiled_times(family, given.layers, given.rounds)
        print(f"{family:12} compiled {fast * 1e3:6.0f} ms   eager {slow * 1e3:6.0f} ms   {slow / fast:.2f} x   first step {first:5.1f} s   breaks {breaks}", flush=True)


if __name__ == "__main__":
    main()
