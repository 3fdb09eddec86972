"""What a model that knows nothing but the frequency of each token would reach on a run's validation targets.

    python -m tests.benchmarks.unigram RUN_DIR

Frequencies are those of the targets of the first training epoch (plus one each, so that none is impossible); what they predict are the
targets of the run's own validation, drawn as the run draws them. Where many targets are special, as in span corruption, a second baseline
is the one to beat: which sentinel is next, is known from those before, so it need only tell whether a special token comes at all.
"""

import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from txtrain.config.composed import from_file
from txtrain.config.schema import Train
from txtrain.monitor.metrics_csv import latest
from txtrain.objectives.base import IGNORED, Objective, build_objective
from txtrain.training.data_module import Batch, DataModule


def counted(objective: Objective, batches: Iterable[Batch], vocab_size: int) -> Tensor:
    """How often each token is a target, [V]."""
    counts_V = torch.zeros(vocab_size)
    for batch in batches:
        ids = objective.target_ids(batch)
        counts_V += torch.bincount(batch["labels"][batch["labels"] != IGNORED] if ids is None else ids, minlength=vocab_size)
    return counts_V


def main() -> None:
    run = Path(sys.argv[1])
    config = from_file(Train, run / "config.yaml").config
    data, objective = DataModule(config), build_objective(config)
    data.prepare()
    assert data.tokenizer is not None, "the run was not trained on text"
    size = data.tokenizer.vocab_size
    epoch = itertools.islice(data.train_dataloader(), data.n_train // config.data.global_batch_size)
    train_V, val_V = counted(objective, epoch, size), counted(objective, data.val_dataloader(), size)
    special_V = torch.zeros(size, dtype=torch.bool)
    special_V[list(data.tokenizer.special_ids())] = True
    p_V = (train_V + 1) / (train_V + 1).sum()

    def nats(p_V: Tensor) -> float:
        """A validation target."""
        return float(-(p_V.log() * val_V).sum() / val_V.sum())

    best = int(train_V.argmax())
    accuracy = float(val_V[best] / val_V.sum())
    baselines = {"unigram": nats(p_V), "unigram, special tokens in order": nats(torch.where(special_V, p_V[special_V].sum(), p_V))}
    print(f"{int(train_V.sum()):,} targets of an epoch, {int(val_V.sum()):,} of the validation, {float(val_V[special_V].sum() / val_V.sum()):.1%} special")
    seen = latest(run / "metrics.csv")
    loss = seen.get("val_mlm_loss", seen["val_loss"])
    print(f"model                               {loss:.4f} nats a target")
    for name, value in baselines.items():
        print(f"{name:<35} {value:.4f} nats a target, perplexity {math.exp(value - loss):.2f} times the model's")
    print(f"always {data.tokenizer.decode([best])!r:<28} {accuracy:.4f} right", end="")
    print(f"; the model {seen['masked_accuracy']:.4f}, {seen['masked_accuracy'] / accuracy:.2f} times" if "masked_accuracy" in seen else "")


if __name__ == "__main__":
    main()
