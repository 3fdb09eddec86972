"""Training steps with a sliding window at growing lengths, beside transformers: the same weights and tokens, one process, sides in turns.

    python -m tests.benchmarks.windows [FAMILY ...] [--lengths 256 2048 8192] [--rounds 3] [--threads 1] [--ours] [--profile]

2 layers, dim 384, 6 heads (2 for keys and values), a vocabulary of 8192, window 128; 2048 tokens a step, or one sequence where it is longer.
CPU seconds of forward and backward, the least of the rounds: other work on the machine does not count. Ratios above 1: txtrain is faster.
`--profile`: where our time goes, by operation.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from tests.benchmarks.sides import batch_of, best, loss_of, pair, shares

TOKENS = 2048


def works(family: str, length: int) -> list[Callable[[], None]]:
    """Forward and backward, ours and theirs."""
    batch = batch_of(family, max(1, TOKENS // length), length)

    def work(model: torch.nn.Module) -> None:
        loss_of(model, batch).backward()
        model.zero_grad()

    return [partial(work, side.train()) for side in reversed(pair(family, 2, length))]


def window_times(family: str, length: int, rounds: int, ours_alone: bool = False) -> list[float]:
    """CPU seconds of forward and backward, ours and, unless ours_alone, theirs."""
    return best(rounds, *works(family, length)[: 1 if ours_alone else 2])


def compare(family: str, length: int, rounds: int, ours_alone: bool) -> str:
    times = window_times(family, length, rounds, ours_alone)
    per_token = times[0] / max(TOKENS, length) * 1e3
    theirs = "" if ours_alone else f"  theirs {times[1]:7.2f} s  ratio {times[1] / times[0]:.2f}"
    return f"{family:8} {length:6} ours {times[0]:7.2f} s  {per_token:6.3f} ms a token{theirs}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=["mistral", "gemma2"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", action="store_true", help="without transformers")
    parser.add_argument("--profile", action="store_true", help="the operations that take 1 % of our time or more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.families:
        for n in given.lengths:
            if given.profile:
                found = shares(works(name, n)[0])
                print(f"{name:8} {n:6}", *(f"{what} {100 * share:.0f} %" for what, share in found.items() if share >= 0.01), sep="  ", flush=True)
            else:
                print(compare(name, n, given.rounds, given.ours), flush=True)
