"""What the scripts of slurm/ are like, and what they do before anything is submitted. SLURM itself is not needed: its commands are stand-ins here."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.compose.conftest import ROOT
from txtrain.cli.main import main

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TINY = ("model=gpt2", "model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.vocab_size=257", "data=python_docs", "data.tokenizer=bytes")
RECORDS = """\
#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$RECORD"
echo 17
"""


@pytest.fixture
def login(tmp_path, monkeypatch):
    """A login node: login("one_node.sh", ...) runs a script; its exit code, what it wrote, and the words that sbatch got."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"sbatch": RECORDS, "squeue": "#!/bin/sh\n", "txtrain": f'#!/bin/sh\nexec {sys.executable} -m txtrain "$@"\n'}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    record = tmp_path / "record"

    def run(script, *words):
        record.unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "RECORD": str(record)}
        done = subprocess.run(["bash", str(ROOT / "slurm" / script), *words], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
        return done.returncode, done.stdout + done.stderr, record.read_text().splitlines() if record.exists() else []

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_short_and_safe_and_says_what_it_wants_of_the_cluster_at_its_top(script):
    text = script.read_text()
    lines = text.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 160
    strict = lines.index("set -euo pipefail")
    assert all(line.startswith("#") for line in lines[:strict])
    given = " ".join(line.removeprefix("#SBATCH ") for line in lines[:strict] if line.startswith("#SBATCH "))
    assert {"--requeue", "--open-mode=append"} <= set(given.split())
    assert re.search(r"--signal=USR1@\d+", given)  # without `B:`: it is for srun's tasks
    assert len(re.findall(r"^ *CONTAINER=", text, re.MULTILINE)) == 1
    assert text.index("CONTAINER=") < text.index("# ----\n")
    assert text.index("txtrain plan" if "txtrain plan" in text else '" plan ') < text.index("sbatch", text.index("# ----\n"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_composes_and_fits_is_submitted_with_the_options_of_sbatch_before_the_script(login):
    code, text, words = login("many_nodes.sh", "--nodes=2", "--ntasks-per-node=4", *TINY)
    assert code == 0, text
    assert words == ["--nodes=2", "--ntasks-per-node=4", str(ROOT / "slurm/many_nodes.sh"), *TINY]
    assert re.search(r"on 8 x H100", text)  # the plan is of the options' processes, not of the script's


def test_what_does_not_compose_never_waits_in_a_queue(login):
    code, text, words = login("one_node.sh", *TINY, "model.n_head=4")
    assert (code, words) == (2, [])
    assert "Did you mean model.n_heads?" in text
    code, text, words = login("one_node.sh", *TINY, "data.global_batch_size=12")  # not on the script's 8 processes
    assert (code, words) == (2, [])
    assert "`data.global_batch_size` must be a multiple" in text


def test_what_does_not_fit_never_waits_in_a_queue(login):
    code, text, words = login("one_node.sh", "model=llama2_70b", "data=python_docs", "strategy=ddp", "data.global_batch_size=8")
    assert (code, words) == (2, [])
    assert "`plan.memory` must be at least" in text


def test_an_array_is_of_what_is_not_complete(login, tmp_path):
    (tmp_path / "rates.txt").write_text("# two rates\noptimizer.lr=1e-3\n\noptimizer.lr=3e-4\n")
    for number, status in enumerate(["complete", "preempted"]):
        (tmp_path / f"runs/rates/{number}").mkdir(parents=True)
        (tmp_path / f"runs/rates/{number}/run.json").write_text(json.dumps({"status": status}, indent=2))
    code, text, words = login("array.sh", "--time=5", "rates.txt", *TINY)
    assert code == 0, text
    assert words == ["--job-name=rates", "--array=1", "--time=5", str(ROOT / "slurm/array.sh"), "rates.txt", *TINY]
    (tmp_path / "runs/rates/1/run.json").write_text(json.dumps({"status": "complete"}, indent=2))
    code, text, words = login("array.sh", "rates.txt", *TINY)
    assert (code, words) == (0, [])
    assert "all of runs/rates are complete" in text


def test_a_chain_is_four_jobs_each_after_the_one_before(login):
    code, text, words = login("chain.sh", "--partition=gpu")
    assert code == 0, text
    assert [word for word in words if word.startswith("--job-name")] == [f"--job-name={stage}" for stage in ("prepare", "pretrain", "tune", "export")]
    assert words.count("--dependency=afterok:17") == 3
    assert words.count("--partition=gpu") == 4


def test_the_chain_of_r1_fits_its_gpus_and_is_five_jobs(tmp_path, capsys):
    """The plans as its own words make them, on what the script says it has: policy, reference, cache and rollouts."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "sliding_window": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    text = (ROOT / "slurm/r1.sh").read_text().replace("/shared/Mistral-7B-v0.1", str(tmp_path / "base"))
    (tmp_path / "r1.sh").write_text(text)
    stand_ins = 'txtrain() { printf "%s\\n" "$@" --end; }; sbatch() { printf "%s\\n" "$@" --end >&2; echo 17; }; '
    ran = subprocess.run(["bash", "-c", f"{stand_ins} . ./r1.sh"], cwd=tmp_path, capture_output=True, text=True, check=True)
    jobs = [job.splitlines() for job in ran.stderr.split("--end\n")[:-1]]
    assert [job[1] for job in jobs] == [f"--job-name={stage}" for stage in ("cold", "grpo", "right", "sft", "grpo_2")]
    assert sum("--dependency=afterok:17" in job for job in jobs) == 4
    assert all({"--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8"} <= set(job) for job in jobs)
    plans = [words.splitlines() for words in ran.stdout.split("--end\n") if words.startswith("plan")]
    assert len(plans) == 2
    shown = []
    page = re.search(r"txtrain (plan model=mistral_7b .*?)\n```", (ROOT / "docs/r1.md").read_text(), re.DOTALL)
    assert page
    for words in (*plans, page[1].replace("\\\n", " ").split()):
        assert main([*words, "data.tokenizer=bytes"]) == 0
        shown.append(capsys.readouterr().out)
    assert all("on 64 x H100" in text and "refuses" not in text for text in shown)
    for part in ("read ", "cache ", "16 rows together", "8 of each of 128 prompts"):
        assert part in shown[1]
        assert part in shown[2]
