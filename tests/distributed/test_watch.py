"""What several processes say of their run: with one voice."""

import json
import re
import sys

import pytest

from tests.distributed import group
from tests.distributed.runs import overrides
from txtrain.monitor.metrics_csv import read


def trained(cases, folder):
    """What two processes print that train the cases."""
    listed = folder / "cases.json"
    listed.write_text(json.dumps({name: {"overrides": case.overrides, "callbacks": case.callbacks} for name, case in cases.items()}))
    return group.run([sys.executable, "-m", "tests.distributed.worker", str(listed)], 2, folder)


@pytest.mark.slow
def test_communication_is_counted_and_warnings_are_told_once(tmp_path):
    """Under each way to exchange: our buckets, FSDP2's hooks, DeepSpeed's engine, sums within layers."""
    ways = {"ddp": (), "fsdp": (), "deepspeed_stage_2": (), "tp": ()}
    cases = {}
    for way in ways:
        run = overrides(
            tmp_path, "decoder", way, "trainer.devices=2", "trainer.max_steps=4", "trainer.val_check_interval=4", f"strategy={way}", "verbosity=quiet"
        )
        cases[way] = group.Case(run, ["WARN * *"] if way == "ddp" else [])
    said = trained(cases, tmp_path)
    for way in ways:
        table = read(tmp_path / way / "metrics.csv")
        assert all(float(row["time/communication"]) > 0 for row in table), way
        for row in table[1:]:
            passed = sum(float(row[f"time/{name}"]) for name in ("data", "forward_backward", "optimizer", "communication"))
            assert float(row["time/communication"]) < passed, way
    assert said.count("done:") == len(ways)
    assert len(re.findall(r"^\[rank [01]\] .*UserWarning: what all have$", said, re.MULTILINE)) == 1
    assert said.count("what all have") == 1
    for rank in (0, 1):
        assert said.count(f"what {rank} has") == 1
        assert re.search(rf"^\[rank {rank}\] .*callbacks\.py:\d+: UserWarning: what {rank} has$", said, re.MULTILINE)


@pytest.mark.slow
def test_all_processes_find_the_same_spike(tmp_path):
    run = overrides(tmp_path, "decoder", "run", "trainer.devices=2", "trainer.max_steps=46", "trainer.limit_val_batches=0", "strategy=ddp", "optimizer.lr=1e-5")
    said = trained({"run": group.Case([*run, "verbosity=quiet"], ["HIT 40 *"])}, tmp_path)
    one, two = re.findall("^LOSSES (.*)$", said, re.MULTILINE)
    assert one == two
    assert (json.loads(one)["n_spikes"], json.loads(one)["far_off"]) == (6, 6)
    assert said.count("step 41: the loss jumps") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "run/spikes.jsonl").read_text().splitlines()] == [41, 42, 43, 44, 45, 46]
