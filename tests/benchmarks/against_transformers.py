"""Training steps and decoding side by side with transformers.

    python -m tests.benchmarks.against_transformers [step] [decode] [--families ...] [--rounds 3] [--layers 6] [--batches 1 16] [--new 64] [--profile]

Each family has 6 layers, dim 384, 6 heads (2 for keys and values where the class has them apart), a vocabulary of 8192; a step is forward, backward
and AdamW on 8 x 256 tokens. Decoding reads 32 tokens and writes `--new`, greedily and sampled; `--profile`: the share of matrix products in
it, which both sides compute alike, and the operations that take most of a step. How it is measured: sides.py.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers

from tests.benchmarks.sides import DECODERS, FAMILIES, VOCAB, batch_of, best, flops_of, pair, product, shares, step_of
from txtrain.model.few_rows import kernels
from txtrain.model.generation import generate

PROMPT = 32


def step_times(family: str, layers: int, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of a step, ours and theirs; and the share of the peak of matrix products that each is, paired."""
    models = pair(family, layers)[::-1]
    batch = batch_of(family)
    steps = [step_of(model, batch) for model in models]
    work, n_flops = product()
    *times, bare = best(rounds, *steps, work)
    return times, [flops_of(step) / time * bare / n_flops for step, time in zip(steps, times, strict=True)]


def decode_ratio(theirs: Any, ours: Any, rows: int, new: int, sampled: bool, rounds: int) -> tuple[float, float]:
    """CPU seconds of a token of all rows, ours and theirs."""
    prompt = torch.randint(5, VOCAB, (rows, PROMPT))
    given: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    given |= {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    theirs.eval()
    ours.eval()
    our_time, their_time = best(
        rounds,
        lambda: generate(ours, prompt, max_new_tokens=new, eos_token_id=None, temperature=float(sampled)),
        lambda: theirs.generate(prompt, **given),
    )
    return our_time / new, their_time / new


def products_share(ours: Any, rows: int, new: int) -> float:
    """Of the time of greedy decoding, that in matrix products: torch's, and those of the kernels for few rows."""
    prompt, seconds = torch.randint(5, VOCAB, (rows, PROMPT)), [0.0]

    def timed(product: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            begin = time.process_time()
            made = product(*given)
            seconds[0] += time.process_time() - begin
            return made

        return call

    own = kernels()
    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(F, "linear", timed(F.linear)))
        if not isinstance(own, str):
            patched.enter_context(mock.patch.object(own, "_product", timed(own._product)))
        for _ in range(2):  # the first warms up
            seconds[0], begin = 0.0, time.process_time()
            generate(ours, prompt, max_new_tokens=new, eos_token_id=None, temperature=0.0)
    return seconds[0] / (time.process_time() - begin)


def lines(given: argparse.Namespace) -> Iterator[str]:
    for family in given.families if "step" in given.what else ():
        (ours, theirs), reached = step_times(family, given.layers, given.rounds)
        peak = f"of the peak {reached[0]:.2f}, theirs {reached[1]:.2f}"
        yield f"{family:12} step      ours {ours * 1e3:7.0f} ms   theirs {theirs * 1e3:7.0f} ms   {theirs / ours:.2f} x   {peak}"
        for model in pair(family, given.layers)[::-1] if given.profile else ():
            most = [*shares(step_of(model, batch_of(family))).items()][:14]
            yield f"{'':12} {type(model).__name__}: " + ", ".join(f"{name.removeprefix('aten::')} {share:.1%}" for name, share in most)
    for family in (f for f in given.families if f in DECODERS) if "decode" in given.what else ():
        models = pair(family, given.layers)
        for rows in given.batches:
            for sampled in (False, True):
                ours, theirs = decode_ratio(*models, rows, given.new, sampled, given.rounds)
                how = "sampled" if sampled else "greedy"
                if given.profile:
                    how += f", products {products_share(models[1], rows, given.new):.0%}"
                yield f"{family:12} {rows:3} rows, {how:8} ours {ours * 1e3:7.2f} ms   theirs {theirs * 1e3:7.2f} ms a token   {theirs / ours:.2f} x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", default=["step", "decode"])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, CPU seconds of one thread, best of {given.rounds}")
    for line in lines(given):
        print(line, flush=True)


if __name__ == "__main__":
    main()
