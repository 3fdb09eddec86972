"""Every single swap on every family trains: built, forward, backward, optimizer, twice, through `txtrain.train`."""

import math
from itertools import product

import pytest

import txtrain
from tests.training import rows, write_text
from txtrain.registry import TABLE

DECODERS = ["gpt1", "gpt2", "llama2", "mistral", "gemma", "gemma2"]
SMALL = (
    "model.n_layers=2",
    "model.dim=64",
    "model.n_heads=4",
    "model.vocab_size=257",
    "model.max_seq_len=32",
    "model.dropout=0",  # so that the loss on one batch must fall, and not by luck
    "data=text",
    "data.path=text.txt",
    "data.tokenizer=bytes",
    "scheduler=constant",
    "scheduler.warmup_steps=0",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.overfit_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0",
    "sample.n=0",
    "run_dir=run",
)
KEYS = {"model/attention": "attention", "model/ffn": "ffn", "model/position": "position", "model/norm": "norm", "model.norm_position": "norm_position"}
SWAPS = [f"{key}={option}" for key, axis in KEYS.items() for option in TABLE[axis]]


def losses(*overrides: str) -> list[float]:
    """Of each step of a run with these overrides, all on the same batch."""
    result = txtrain.train(txtrain.compose([*overrides, *SMALL]))
    return [float(row["loss"]) for row in rows(result.run_dir)]


@pytest.mark.parametrize(("family", "swap"), list(product(DECODERS, SWAPS)))
def test_every_swap_on_every_family_trains(family, swap, clean_room):
    write_text(clean_room / "text.txt")
    first, second = losses(f"model={family}", swap)
    assert second < first < 2 * math.log(257), f"{family} {swap}: loss {first} at the start, {second} after one update"


def test_grafts_on_several_axes_at_once_train(clean_room):
    write_text(clean_room / "text.txt")
    first, second = losses("model=gpt2", "model.norm_position=post", "model/position=rope", "model/ffn=swiglu")
    assert second < first
