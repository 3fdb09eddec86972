"""kill -9 at any moment costs no more than the steps since the last complete checkpoint, and changes nothing."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest
import torch

import txtrain
from tests.compose.conftest import ROOT
from tests.distributed.runs import largest_differences
from tests.training import rows, tiny, weights, write_chats, write_labels, write_preferences

STEPS = 12
EVERY_STEP = (f"trainer.max_steps={STEPS}", "save.every_n_steps=1", "model.dropout=0.1", "data.micro_batch_size=2")
BEHIND = "save.async=true"
CHUNKS = {  # of ten kills each
    "waiting": (1, ()),
    "behind": (1, (BEHIND,)),
    "behind, seldom": (1, (BEHIND, "save.every_n_steps=3")),
    "numbers beside tensors": (1, ("optimizer=muon", "optimizer.lr=0.01", "ema.decay=0.9")),
    "bfloat16": (1, (BEHIND, "trainer.precision=bf16-mixed", "optimizer=adafactor", "optimizer.lr=0.01")),
    "ddp": (2, ("strategy=ddp", BEHIND)),
    "fsdp": (2, ("strategy=fsdp",)),
    "fsdp, behind": (2, ("strategy=fsdp", BEHIND)),
}
TUNING = {
    "sft": lambda folder: ("objective=sft", *write_chats(folder)),
    "classification": lambda folder: ("data=labels", f"data.path={write_labels(folder / 'labels.csv')}", "data.seq_len=32"),
    "dpo": lambda folder: ("objective=dpo", *write_preferences(folder), base(folder)),
    "dpo, cached": lambda folder: ("objective=dpo", "objective.reference=cached", *write_preferences(folder), base(folder)),
    "distill": lambda folder: ("objective=distill", base(folder, "objective.teacher")),
    "lora": lambda folder: ("adapter=lora", base(folder)),
    "lora, labels": lambda folder: ("adapter=lora", "adapter.modules_to_save=[norm]", *TUNING["classification"](folder), base(folder)),
    "lora, all": lambda folder: ("adapter=lora", "adapter.lora_dropout=0.1", "adapter.target_modules=all-linear", base(folder)),
}
ACROSS = {  # of two processes: killed under the first, continued under the second
    "ddp, then tp": (("strategy=ddp", BEHIND), ("strategy=tp",)),
    "fsdp, then stage 3": (("strategy=fsdp",), ("strategy=deepspeed_stage_3",)),
    "stage 2, then one process": (("strategy=deepspeed_stage_2",), ("strategy=auto", "trainer.devices=1")),
}
SEVERAL = [*zip(TUNING, itertools.cycle(ACROSS))]


def base(folder, key="init_from"):
    """An export of a model like the run's, with other weights."""
    torch.manual_seed(5)
    txtrain.save_pretrained(txtrain.build_model(tiny(folder).model), folder / "base")
    return f"{key}={folder / 'base'}"


def killed_and_continued(folder, kills, n, overrides, then=()):
    """Every continuation ends with the rows and weights of the run that nobody killed; every other one, if `then` moves it, but for rounding.

    Gives the number of kills that met a save, and what each left.
    """
    seed = random.randrange(10**6)
    last = {override.split("=")[0]: override for override in (*EVERY_STEP, *overrides)}
    given = [*last.values(), f"trainer.devices={n}", "then", *then]
    program = [sys.executable, "-m", "tests.distributed.kills", str(folder), str(seed), str(kills), *given]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=1800)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    left = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(left) == kills, (seed, left)
    one, tensors = rows(folder / "whole"), weights(folder / "whole")
    assert [int(row["step"]) for row in one] == [*range(1, STEPS + 1)]
    for i in range(kills):
        what = f"seed {seed}, kill {i}, which left {left[i]}"
        if then and i % 2:
            differences = largest_differences(folder / "whole", folder / str(i))
            assert max(differences.values()) < 1e-5, (what, differences)
            continue
        assert rows(folder / str(i)) == one, what
        assert weights(folder / str(i)) == tensors, what
    return sum(any(not name[-1].isdigit() for name in names) for names in left), left


@pytest.mark.slow
@pytest.mark.parametrize("chunk", CHUNKS)
def test_ten_runs_killed_at_random_moments_end_as_the_one_that_was_not(chunk, tmp_path):
    met, left = killed_and_continued(tmp_path, 10, *CHUNKS[chunk])
    print(f"{met} of 10 kills met a save: {left}")
    assert met, f"no kill met a save: {left}"


@pytest.mark.slow
@pytest.mark.parametrize("what", TUNING)
def test_so_do_runs_that_tune(what, tmp_path):
    """Five kills each, the last of them while the run starts."""
    met, left = killed_and_continued(tmp_path, 5, 1, (BEHIND, *TUNING[what](tmp_path)))
    print(f"{met} of 5 kills met a save: {left}")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "how"), SEVERAL)
def test_so_do_runs_of_two_processes_that_tune_also_under_another_strategy(what, how, tmp_path):
    before, after = ACROSS[how]
    given = (*before, *TUNING[what](tmp_path))
    dry = [f"{override.split('=')[0]}=0" for override in (*EVERY_STEP, *given) if "dropout=" in override]  # ranks that do not share matrices draw apart
    killed_and_continued(tmp_path, 2, 2, (*given, *(dry if how[:4] != "fsdp" else ())), after)
