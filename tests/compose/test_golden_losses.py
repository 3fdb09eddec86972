"""The losses of 20 steps of every family, as text. Regenerate with TXTRAIN_UPDATE_GOLDEN=1, and say in the commit why they moved.

Compared to 1e-4 relative. Another order of summation (threads, micro-batches) moved no loss by more than 3e-7 in trials; other processors
and versions of torch round differently. What a mistake moves: a window one position too narrow 5e-4, one warm-up step more 3e-2, a softcap of
29 for 30 on the logits 1.4e-4. Smaller ones (gelu for its tanh form: 1e-5) are for the parity tests.
"""

import os
import random

import pytest

import txtrain
from tests.compose.conftest import ROOT
from tests.training import rows

DECODERS = ["gpt1", "gpt2", "llama2", "mistral", "gemma", "gemma2"]
FOLDER = ROOT / "tests/golden/losses"
STEPS = 20
RUN = (
    "model.n_layers=2",
    "model.dim=64",
    "model.n_heads=4",
    "model.vocab_size=257",
    "model.max_seq_len=96",  # above the windows of Mistral and Gemma 2
    "model.init.std=0.15",  # wide enough that a wrong mask or scale shows in the losses
    "model.dropout=0",  # its random numbers differ between torch's builds with and without MKL
    "data=text",
    "data.path=text.txt",
    "data.tokenizer=bytes",
    "data.micro_batch_size=4",
    "scheduler.warmup_steps=4",
    "trainer.accelerator=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0",
    "sample.n=0",
    "run_dir=run",
)


def text() -> str:
    """Some 60 kB of sentences from a list of words; the same on every machine (`random.random` is, other methods need not be)."""
    draw = random.Random(0).random
    words = ["".join("aeioulnrst"[int(draw() * 10)] for _ in range(2 + int(draw() * 6))) for _ in range(300)]
    return "\n".join(" ".join(words[int(draw() ** 2 * 300)] for _ in range(12)) + "." for _ in range(1000)) + "\n"


@pytest.mark.parametrize("family", DECODERS)
def test_losses_of_the_first_steps_are_the_golden_ones(family, clean_room):
    (clean_room / "text.txt").write_text(text())
    result = txtrain.train(txtrain.compose([f"model={family}", *RUN]))
    seen = [float(row["loss"]) for row in rows(result.run_dir)]
    golden = FOLDER / f"{family}.txt"
    if os.environ.get("TXTRAIN_UPDATE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("".join(f"{step} {loss:.7f}\n" for step, loss in enumerate(seen, start=1)))
    wanted = [float(line.split()[1]) for line in golden.read_text().splitlines()]
    assert len(seen) == len(wanted) == STEPS
    for step, (got, want) in enumerate(zip(seen, wanted, strict=True), start=1):
        assert got == pytest.approx(want, rel=1e-4), f"{family}: loss {got:.7f} at step {step}, {want:.7f} in {golden.name}"
