"""Head and loss at a large vocabulary, by chunks, beside all logits at once: time, and the peak of memory.

    python -m tests.benchmarks.losses [KIND ...] [--vocabulary 131072] [--tokens 1024] [--rounds 2]

dim 384, float32, forward and backward. all: `F.linear`, then torch's function of the logits. Both sides in turns, as in sides.py; memory is what
lives above inputs and weights, as torch's dispatcher sees it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.sides import DIM, best
from tests.unit.planning.zero_memory import Watched
from txtrain.model.head.distillation import Distillation
from txtrain.model.head.heads import LMHead

Side = Callable[[], Tensor]


def kinds(n_words: int, n_tokens: int) -> tuple[dict[str, tuple[Side, Side]], tuple[Tensor, Tensor]]:
    """By chunks, and of all logits at once: losses of the same tokens. And what they have gradients of."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, n_tokens, DIM, generator=g).requires_grad_()
    weight = (torch.randn(n_words, DIM, generator=g) * 0.1).requires_grad_()
    targets = torch.randint(0, n_words, (1, n_tokens), generator=g)
    head, n = LMHead(DIM, n_words, tied=True, shift=False), torch.tensor(float(n_tokens))
    taught = x.detach() + 0.1  # the teacher's last states; its matrix is the student's

    def whole(of: Callable[..., Tensor], **how: Any) -> Tensor:
        return of(F.linear(x, weight).flatten(0, 1), targets.flatten(), **how)

    def soft(rows: slice) -> Tensor:
        return F.linear(taught[0, rows], weight.detach()).log_softmax(-1)

    def divergence(logits: Tensor, _: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(-1), soft(slice(None)), reduction="sum", log_target=True) / n

    def distilled() -> Tensor:
        how = Distillation(False, 1.0, 0.0, n, lambda consume: consume(soft))
        return head.distilled(x, weight, targets, how)

    sides: dict[str, tuple[Side, Side]] = {
        "plain": (lambda: head.loss(x, weight, targets, n), partial(whole, F.cross_entropy)),
        "smoothed": (lambda: head.loss(x, weight, targets, n, 0.1), partial(whole, F.cross_entropy, label_smoothing=0.1)),
        "log-probabilities": (lambda: head.log_probs(x, weight, targets).sum(), partial(whole, F.cross_entropy, reduction="none")),
        "distillation": (distilled, partial(whole, divergence)),
    }
    return sides, (x, weight)


def loss_ratios(kind: str, n_words: int, n_tokens: int, rounds: int) -> tuple[float, float]:
    """Time and peak memory, as shares of those of all logits at once."""
    made, leaves = kinds(n_words, n_tokens)
    sides, peaks, gradients = made[kind], [], []
    for side in sides:
        with Watched() as watched:
            gradients.append(torch.autograd.grad(side().sum().abs(), leaves))
        peaks.append(watched.peak - watched.held)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max(), "the two sides do not compute the same"
    del gradients
    by_chunks, whole = best(rounds, *(lambda side=side: side().sum().backward() for side in sides))
    return by_chunks / whole, peaks[0] / peaks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", default=["plain", "smoothed", "log-probabilities", "distillation"])
    parser.add_argument("--vocabulary", type=int, default=1 << 17)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind in given.kinds:
        time, memory = loss_ratios(kind, given.vocabulary, given.tokens, given.rounds)
        print(f"{kind:18} {time:.2f} of the time, {memory:.3f} of the memory of all logits at once", flush=True)


if __name__ == "__main__":
    main()
