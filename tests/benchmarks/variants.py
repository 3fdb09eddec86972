"""Our own model beside our own model: packed documents, experts, and the loop beside a bare step.

    python -m tests.benchmarks.variants [packed] [experts] [loop] [--rounds 3]

packed     tokens trained a second of packed documents (mean length a tenth of the sequence) over the same with padding; and what their borders cost
experts    a step of 8 and 64 experts over that of the dense model with as many active parameters, and that of transformers' Mixtral over ours
loop       a step of `txtrain.train` (Lightning, metrics, loader, logging) over the bare step in a plain loop, on the same model and batch

Sides in turns, as in sides.py; the loop's steps and the bare ones are two runs of one process, of which the least steps are compared.
"""

import argparse
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import txtrain
from tests.benchmarks.sides import BATCH, DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, best, step_of
from txtrain.monitor.metrics_csv import read

SHAPE = (f"model.dim={DIM}", f"model.n_heads={HEADS}", f"model.vocab_size={VOCAB}", "model.dropout=0")


def model_of(*overrides: str) -> Any:
    return txtrain.build_model(txtrain.compose([*SHAPE, *overrides]).model)


@cache
def packed_ratios(length: int = 512, layers: int = 2, rounds: int = 3) -> tuple[float, float]:
    """How many times as many tokens a second as with padding; and the time with borders over that without."""
    model = model_of("model=llama2", f"model.n_layers={layers}", f"model.max_seq_len={length}")
    ids = torch.randint(5, VOCAB, (4, length))
    cuts = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 10 / length
    documents = cuts.cumsum(1)
    lengths = [int(n) for row in documents for n in row.bincount() if n]
    padded = torch.full((len(lengths), length), 0)
    mask = torch.zeros_like(padded)
    for row, n in enumerate(lengths):
        padded[row, :n], mask[row, :n] = ids.flatten()[:n], 1
    few = slice(0, 4)  # as many rows as are packed: a step of all of them is as much longer
    plain = {"input_ids": ids, "labels": ids}
    with_padding = {"input_ids": padded[few], "labels": padded[few].masked_fill(mask[few] == 0, -100), "attention_mask": mask[few]}
    sides = ({**plain, "document_ids": documents}, plain, with_padding)
    bordered, borderless, wide = best(rounds, *(step_of(model, batch) for batch in sides))
    return (ids.numel() / bordered) / (int(mask[few].sum()) / wide), bordered / borderless


@cache
def experts_ratios(n_experts: int, layers: int = 2, rounds: int = 3) -> tuple[float, float]:
    """A step's time over the dense model's, and Mixtral's of transformers over ours."""
    import transformers

    active = 2
    common = "model=llama2", f"model.n_layers={layers}", "model/attention=gqa", f"model.attention.n_kv_heads={KV_HEADS}"
    dense = model_of(*common, f"model.ffn.hidden_dim={HIDDEN}")
    knobs = f"model.ffn.n_experts={n_experts}", f"model.ffn.top_k={active}", f"model.ffn.hidden_dim={HIDDEN // active}", "model.ffn.n_shared=0"
    ours = model_of(*common, "model/ffn=moe_softmax", *knobs, "model.ffn.dense_layers=0")
    theirs = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=DIM, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCAB,
            intermediate_size=HIDDEN // active, num_local_experts=n_experts, num_experts_per_tok=active, sliding_window=None,
        )
    )
    ids = torch.randint(5, VOCAB, (BATCH, 256))
    batch = {"input_ids": ids, "labels": ids}
    our_time, dense_time, their_time = best(rounds, *(step_of(model, batch) for model in (ours, dense, theirs)))
    return our_time / dense_time, their_time / our_time


class _Steps(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        self.seconds.append(now - self.begin)
        self.begin, self.batch = now, batch


@cache
def loop_ratio(dim: int = DIM, layers: int = 2, steps: int = 12) -> tuple[float, float]:
    """A step of the loop, from the end of one to the end of the next, over the bare step; and its share of waiting for data."""
    seen = _Steps()
    heads = f"model.n_heads={max(1, dim // 64)}"
    with tempfile.TemporaryDirectory() as folder:
        keys = ["model=gpt2", "data=python_docs", f"model.dim={dim}", heads, f"model.n_layers={layers}", "model.dropout=0", "sample.n=0"]
        keys += ["data.seq_len=256", f"data.global_batch_size={BATCH}", f"data.micro_batch_size={BATCH}", "trainer.limit_val_batches=0"]
        keys += [f"trainer.max_steps={steps}", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "verbosity=quiet", f"run_dir={folder}/run", "save.every_n_steps=100000"]
        config: Any = txtrain.compose(keys)
        txtrain.train(config, callbacks=[seen])
        waited = shares_of(Path(folder) / "run/metrics.csv")["time/data"]
    model = txtrain.build_model(config.model)
    ids = seen.batch["input_ids"]
    (bare,) = best(steps, step_of(model, {"input_ids": ids, "labels": ids}))
    return min(seen.seconds[3:]) / bare, waited


def shares_of(metrics: Path) -> dict[str, float]:
    """What the run's time went into, without the first row's, in which it warms up."""
    rows = read(metrics)[1:]
    times = {name: sum(float(row[name] or 0) for row in rows) for name in rows[0] if name.startswith("time/")}
    return {name: time / sum(times.values()) for name, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", default=["packed", "experts", "loop"])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "packed" in given.what:
        tokens, borders = packed_ratios(rounds=given.rounds)
        print(f"packed: {tokens:.1f} times the tokens a second of padding; borders {borders:.2f} of the time without", flush=True)
    for n in (8, 64) if "experts" in given.what else ():
        dense, theirs = experts_ratios(n, rounds=given.rounds)
        print(f"{n:2} experts: {dense:.2f} of the dense model's time; transformers {theirs:.2f} x", flush=True)
    for dim in (DIM, DIM // 3) if "loop" in given.what else ():
        print(f"the loop at dim {dim}: {{:.3f}} of the bare step; {{:.2%}} of it waiting for data".format(*loop_ratio(dim)), flush=True)


if __name__ == "__main__":
    main()
