"""slurm/r1.sh at a laptop's size, from a base to the second GRPO, on a SLURM that the test starts."""

import json
import os
import re
import signal

import pytest

import txtrain
from tests.compose.conftest import ROOT
from tests.slurm.jobs import at_step, facts, paced, said, submit, when

STAGES = ("cold", "grpo", "right", "sft", "grpo_2")
SHAPE = ("model=llama2", "model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.vocab_size=257", "model.max_seq_len=16")
TASK = "data=arithmetic data.difficulty=1 data.n_train=64 data.n_val=8 data.seq_len=12"
FEW = "trainer.max_steps=12 trainer.val_check_interval=12 trainer.limit_val_batches=1 trainer.log_every_n_steps=1 save.every_n_steps=4 sample.n=0"


@pytest.mark.slow
def test_the_chain_of_r1_goes_from_a_base_to_its_second_grpo(cluster, tmp_path):
    """The script as someone edits it, the lines at its top and nothing else, on two nodes; the first GRPO is killed once."""
    sft = ["objective=sft", "data.worked=0.5", "data.global_batch_size=16", "optimizer.lr=0.01", "trainer.max_steps=40", "sample.n=0"]
    txtrain.train(txtrain.compose([*SHAPE, *TASK.split(), *sft, "trainer.accelerator=cpu", f"run_dir={tmp_path / 'base'}"]))
    text = (ROOT / "slurm/r1.sh").read_text()
    edits = {
        r"^RUN=.*$": f"RUN=runs/r1 BASE=base TASK=({TASK})",
        r"^ANSWER=.*$": "ANSWER=('reward.answer.pattern=\"\\d$\"')",
        r"^SFT=.*$": f"SFT=(objective=sft data.global_batch_size=16 optimizer.lr=0.003 {FEW})",
        r"^GRPO=[^)]*\).*$": "GRPO=(objective=grpo objective.{max_new_tokens=6,beta=0.001,reference_reset=4,group_size=4} data.global_batch_size=16\n"
        f"  {' '.join(paced(0.5))} {FEW})",
        r"^SAMPLE=.*$": "SAMPLE=(n=4 temperature=1 max_new_tokens=6 strategy=ddp) RIGHT=(data.seq_len=12 data.val_fraction=0.2)",
        r"^LAID=.*$": "LAID=(strategy=fsdp trainer.accelerator=cpu)",
        r"^NODES=8 GPUS=8 GPU=H100 MEMORY=80GB": "NODES=2 GPUS=1 GPU=H100 MEMORY=80GB",
    }
    for pattern, line in edits.items():
        text, n = re.subn(pattern, lambda _, line=line: line, text, flags=re.MULTILINE)
        assert n == 1, pattern
    script, runs = tmp_path / "r1.sh", tmp_path / "runs/r1"
    script.write_text(text)
    last = int(submit(cluster, tmp_path, str(script), "--cpus-per-task=1", "--time=20"))
    numbers = dict(zip(STAGES, map(str, range(last - 4, last + 1)), strict=True))
    when(at_step(runs / "grpo", 5), cluster, numbers["grpo"])
    for pid in cluster.processes(own="txtrain\0train"):
        os.kill(pid, signal.SIGKILL)
    for stage, number in numbers.items():
        job = cluster.until(number, "ended")
        assert job["JobState"] == "COMPLETED", said(tmp_path, number)
        assert int(job["Restarts"]) == (stage == "grpo"), said(tmp_path, number)
    assert [facts(runs / name)["status"] for name in STAGES if name != "right"] == ["complete"] * 4
    assert all(facts(runs / name)["hardware"]["processes"] == 2 for name in ("grpo", "grpo_2"))
    rows = [json.loads(line) for line in (runs / "right.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 64
    assert 0 < sum(row["reward"] for row in rows) < len(rows)
    assert facts(runs / "sft")["init_from"]["given"] == "base"
    assert facts(runs / "grpo_2")["init_from"]["given"] == "runs/r1/sft"
