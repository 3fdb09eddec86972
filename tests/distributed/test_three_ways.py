"""One run in three parts, each on another number of processes under another strategy, beside the same run on one process.

A shorter one is in test_deepspeed.py, where two processes have started anyway.
"""

import json

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import largest_differences, overrides
from txtrain.monitor.metrics_csv import read

PART, STEPS = 20, 60
ALLOWED = 1e-4  # of the last loss, absolute: rounding that training itself has enlarged


@pytest.mark.slow
def test_twenty_steps_on_one_twenty_on_four_and_twenty_on_two_processes_are_sixty_on_one(tmp_path):
    def run(name, steps, strategy="auto", n=1):
        shape = ("data.global_batch_size=12", "data.micro_batch_size=1", f"trainer.val_check_interval={PART}", f"trainer.max_steps={steps}")
        return overrides(tmp_path, "decoder", name, *shape, f"strategy={strategy}", f"trainer.devices={n}")

    whole = txtrain.train(txtrain.compose(run("whole", STEPS))).run_dir
    parts = txtrain.train(txtrain.compose(run("parts", PART))).run_dir
    train({"fsdp": Case(run("parts", 2 * PART, "fsdp", 4))}, 4, tmp_path / "four", timeout=1800)
    train({"zero": Case(run("parts", STEPS, "deepspeed_stage_2", 2))}, 2, tmp_path / "two", timeout=1800)

    hashes = {json.loads((folder / "run.json").read_text())["data_order_hash"] for folder in (whole, parts)}
    assert len(hashes) == 1, "other samples, or in another order"
    one, other = read(whole / "metrics.csv"), read(parts / "metrics.csv")
    assert [int(row["step"]) for row in other] == [*range(1, STEPS + 1)]
    assert [row["tokens"] for row in one] == [row["tokens"] for row in other]
    last, wanted = float(other[-1]["loss"]), float(one[-1]["loss"])
    print(f"last loss {last:.7f}, on one process {wanted:.7f}; largest relative differences {largest_differences(whole, parts)}")
    assert abs(last - wanted) < ALLOWED, (last, wanted)
