"""What several processes say of their run: with one voice."""

import json
import re
import sys

from tests.distributed import group
from tests.distributed.runs import overrides
from txtrain.metrics import read


def test_communication_is_counted_and_warnings_are_told_once(tmp_path):
    """Under each way to exchange: our buckets, FSDP2's hooks, DeepSpeed's engine, sums within layers."""
    ways = {"ddp": (), "fsdp": (), "deepspeed_stage_2": (), "tp": ()}
    cases = {}
    for way in ways:
        run = overrides(tmp_path, "decoder", way, "trainer.devices=2", "trainer.max_steps=4", "trainer.val_check_interval=4", f"strategy={way}")
        cases[way] = group.Case(run, ["WARN * *"] if way == "ddp" else [])
    listed = tmp_path / "cases.json"
    listed.write_text(json.dumps({name: {"overrides": case.overrides, "callbacks": case.callbacks} for name, case in cases.items()}))
    said = group.run([sys.executable, "-m", "tests.distributed.worker", str(listed)], 2, tmp_path)
    for way in ways:
        table = read(tmp_path / way / "metrics.csv")
        assert all(float(row["time/communication"]) > 0 for row in table), way
        for row in table[1:]:
            passed = sum(float(row[f"time/{name}"]) for name in ("data", "forward_backward", "optimizer", "communication"))
            assert float(row["time/communication"]) < 0.98 * passed, way
    assert said.count("done:") == len(ways)
    assert len(re.findall(r"^\[rank [01]\] .*UserWarning: what all have$", said, re.MULTILINE)) == 1
    assert said.count("what all have") == 1
    for rank in (0, 1):
        assert said.count(f"what {rank} has") == 1
        assert re.search(rf"^\[rank {rank}\] .*callbacks\.py:\d+: UserWarning: what {rank} has$", said, re.MULTILINE)


def test_all_processes_find_the_same_spike_and_the_same_end(tmp_path):
    run = overrides(tmp_path, "decoder", "run", "trainer.devices=2", "trainer.max_steps=60", "trainer.limit_val_batches=0", "strategy=ddp")
    listed = tmp_path / "cases.json"
    listed.write_text(json.dumps({"run": {"overrides": [*run, "trainer.max_divergent_steps=3", "optimizer.lr=1e-5"], "callbacks": ["HIT 40 *"]}}))
    said = group.run([sys.executable, "-m", "tests.distributed.worker", str(listed)], 2, tmp_path, ends_with=1)
    assert len(re.findall(r"Diverged: The run has diverged: the loss of the last 4 steps up to 44", said)) == 2, said
    assert said.count("step 41: the loss jumps") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "run/spikes.jsonl").read_text().splitlines()] == [41, 42, 43, 44]
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
