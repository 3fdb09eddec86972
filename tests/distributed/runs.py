"""Tiny runs of every kind of model, and how two of them are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.device import accelerator
from tests.training import write_text
from txtrain.checkpoint.format import locate, shapes
from txtrain.checkpoint.restore import load_tensors
from txtrain.monitor.metrics_csv import read

COMMON = (
    accelerator(),
    "trainer.max_steps=10",
    "trainer.val_check_interval=5",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "save.every_n_steps=1000",
    "sample.n=0",
    "scheduler=constant",
    "scheduler.warmup_steps=3",
    "data.global_batch_size=8",
    "model.n_layers=2",
    "model.dim=32",
    "model.n_heads=4",
    "model.dropout=0",
)
TEXT = ("model.vocab_size=360", "model.max_seq_len=32", "data=text", "data.tokenizer=bytes", "data.val_fraction=0.2")
MODELS = {
    "decoder": ("model=llama2", *TEXT),
    "tied decoder with softcaps and windows": ("model=gemma2", *TEXT, "model.attention.window=[8,null]"),
    "encoder": ("model=bert", *TEXT),
    "two stacks": ("model=t5", *TEXT, "model.output_dropout=0", "model.ffn.dropout=0"),
    "two stacks of 2017": ("model=transformer", "data=reverse", "objective.n_decoded=0", "model.max_seq_len=32"),
    "images": ("model=vit",),
    "experts": ("model=deepseek_r1", *TEXT),
}


def documents(folder: Path) -> Path:
    """A folder of eight texts, made if it is not there: BERT's pairs need several."""
    if not folder.exists():
        folder.mkdir(parents=True)
        lines = write_text(folder / "0.txt").read_text().splitlines(keepends=True)
        for i in range(8):
            (folder / f"{i}.txt").write_text("".join(lines[i::8]))
    return folder


def overrides(folder: Path, model: str, name: str, *more: str) -> list[str]:
    """Of a run in folder/name. All runs of a folder share text and cache."""
    text = documents(folder / "text")
    data = [f"data.path={text}"] if "data=text" in MODELS[model] else []
    return [*MODELS[model], *COMMON, *data, f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / name}", *more]


def largest_differences(a: Path, b: Path, columns: tuple[str, ...] = ("loss", "val_loss", "grad_norm")) -> dict[str, float]:
    """Of each column, the largest relative difference of any row."""
    ours, theirs = read(a / "metrics.csv"), read(b / "metrics.csv")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    pairs = {name: [(float(x[name]), float(y[name])) for x, y in zip(ours, theirs, strict=True) if x[name]] for name in columns}
    assert all(pairs.values()), pairs
    return {name: max(abs(x - y) / abs(x) for x, y in values) for name, values in pairs.items()}


def tensors(run_dir: Path) -> dict[str, Any]:
    """Every tensor of the newest checkpoint, whole, by whomever it was written."""
    import torch

    path = locate(run_dir)
    made = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes(path).items()}
    load_tensors(path, made)
    return made
