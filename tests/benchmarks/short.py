"""The short form of every row of docs/performance.md, beside the ratios that were last recorded.

    python -m tests.benchmarks.short [ROW ...] [--record]        rows by the beginning of their names; all by default

Few layers and rounds: noise of 10 % is usual on a machine that does other work. A row that is a tenth worse than recorded ends in `<- slower`, and the
exit code is 1. `--record` writes what was seen into recorded.json, with date and machine.
"""

import argparse
import datetime as dt
import json
import platform
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import against_transformers, compiled, footprint, losses, peers, start, variants, windows
from tests.benchmarks.data import prepared_peak, streamed, tokenising_share
from tests.benchmarks.sides import DECODERS, FAMILIES, pair

RECORDED = Path(__file__).with_name("recorded.json")
LAYERS, ROUNDS = 2, 2


@cache
def _steps(family: str) -> tuple[float, float]:
    """Theirs over ours, and our share of the peak of matrix products."""
    (ours, theirs), (share, _) = against_transformers.step_times(family, LAYERS, ROUNDS)
    return theirs / ours, share


def _over(measured: Callable[..., tuple[float, ...] | list[float]], *given: Any) -> float:
    """The first of two figures over the second."""
    first, second, *_ = measured(*given)
    return first / second


def _start(what: str) -> float:
    """Its CPU seconds, over those of the fastest side beside it if there is one."""
    ours, *others = start.seconds(what, 1).values()
    return ours / min(others, default=1.0)


def _decode(family: str, rows: int, sampled: bool) -> float:
    ours, theirs = against_transformers.decode_ratio(*pair(family, LAYERS), rows, 24, sampled, ROUNDS)
    return theirs / ours


def _flat(family: str) -> float:
    """Time per token at 2048 positions over that at 256."""
    long, short = (windows.window_times(family, length, ROUNDS, ours_alone=True)[0] for length in (2048, 256))
    return long / short


def _streamed(by_files: bool) -> float:
    """Documents that one of two processes tokenises, over those of one process alone."""
    (alone, _), (one, _), _ = *streamed(by_files, 1, 150), *streamed(by_files, 2, 150)
    return one / alone


# Each row: a ratio, and whether more is better.
ROWS: dict[str, tuple[Callable[[], float], bool]] = {
    **{f"step {family}": (lambda f=family: _steps(f)[0], True) for family in FAMILIES},
    **{f"share of the peak {family}": (lambda f=family: _steps(f)[1], True) for family in FAMILIES},
    **{f"decode {f} {rows} greedy": (partial(_decode, f, rows, False), True) for f in DECODERS for rows in (1, 16)},
    "decode llama2 64 sampled": (partial(_decode, "llama2", 64, True), True),
    **{f"window {family}": (partial(_flat, family), False) for family in ("mistral", "gemma2")},
    **{f"window {f} over transformers": (partial(_over, windows.window_times, f, 2048, ROUNDS), False) for f in ("mistral", "gemma2")},
    **{
        f"loss {kind} {what}": (lambda kind=kind, at=at: losses.loss_ratios(kind, 1 << 17, 1024, 1)[at], False)
        for kind in ("plain", "smoothed", "log-probabilities", "distillation") for at, what in enumerate(("time", "memory"))
    },
    "packed over padded": (lambda: variants.packed_ratios(rounds=ROUNDS)[0], True),
    "packed borders": (lambda: variants.packed_ratios(rounds=ROUNDS)[1], False),
    **{
        f"experts {n} {what}": (lambda n=n, at=at: variants.experts_ratios(n, rounds=ROUNDS)[at], at == 1)
        for n in (8, 64) for at, what in enumerate(("over dense", "beside Mixtral"))
    },
    **{f"step {family} over its peer": (partial(_over, peers.peer_times, family, LAYERS, ROUNDS), False) for family in ("llama2", "gpt2")},
    **{f"loop at dim {dim}": (lambda dim=dim: variants.loop_ratio(dim)[0], False) for dim in (384, 128)},
    "waiting for data": (lambda: variants.loop_ratio(128)[1], False),
    "tokenising": (tokenising_share, True),
    **{f"stream of {what}": (partial(_streamed, files), False) for what, files in (("files", True), ("one file", False))},
    "memory of preparing": (lambda: prepared_peak(40) / prepared_peak(4), False),
    **{f"start {what}": (partial(_start, what), False) for what in ("help", "plan", "update", "generate")},
    **{f"memory {family}": (partial(_over, footprint.step_peaks, family, LAYERS), False) for family in FAMILIES},
    "memory checkpointed": (partial(_over, footprint.checkpointed, "llama2", LAYERS), False),
    **{f"memory cache {family}": (partial(_over, footprint.cache_of, family), False) for family in ("llama2", "mistral", "deepseek_r1")},
    "memory accumulating": (partial(_over, footprint.accumulated), False),
    **{f"compiled {family}": (partial(_over, compiled.compiled_times, family, LAYERS, ROUNDS), False) for family in ("gpt2", "llama2", "t5")},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", nargs="*", help="beginnings of names; none: all")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    slower = False
    for name, (measure, more_is_better) in ROWS.items():
        if given.rows and not any(name.startswith(row) for row in given.rows):
            continue
        try:
            ratio = measure()
        except (ImportError, OSError) as e:  # a peer
            print(f"{name:28} is left out: {e}", flush=True)
            continue
        last = recorded.get(name, {}).get("ratio")
        change = None if last is None else ratio / last if more_is_better else last / ratio
        is_slower = change is not None and change < 1 / 1.1
        slower |= is_slower
        beside = "not recorded" if last is None else f"recorded {last:6.3f}   {change:5.2f} of it" + ("   <- slower" if is_slower else "")
        print(f"{name:28} {ratio:6.3f}   {beside}", flush=True)
        if given.record:
            recorded[name] = {"ratio": round(ratio, 3), "date": dt.date.today().isoformat(), "machine": f"{platform.machine()}, torch {torch.__version__}"}
            RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    sys.exit(int(slower and not given.record))


if __name__ == "__main__":
    main()
