"""recipes/r1*.sh: several stages by one command, whatever interrupts it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import weights
from txtrain import compose
from txtrain.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ("trainer.max_steps=30", "trainer.val_check_interval=30", "trainer.limit_val_batches=1", "data.global_batch_size=16", "save.every_n_steps=10")


def started(recipe: str, folder: Path, *more: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}", "ASKED": "160"}
    more = (*SMALL, f"data.cache_dir={folder.parent / 'cache'}", "trainer.accelerator=cpu", *more)
    return subprocess.Popen(["bash", str(RECIPES / recipe), str(folder), *more], env=environment, start_new_session=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a `txtrain` of this checkout."""
    command = tmp_path / "bin" / "txtrain"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m txtrain "$@"\n')
    command.chmod(0o755)
    return tmp_path


def test_every_stage_of_the_recipes_composes(tmp_path: Path) -> None:
    """Those that begin with a model; what `init_from` names is there only once they run."""
    script = '. ./r1_stages.sh; printf "%s\\n" "${MODEL[@]}" "${TASK[@]}"; for kind in SFT GRPO; do declare -n words=$kind; printf "%s\\n" -- "${words[@]}"; done; printf "%s\\n" "${ANSWER[@]}"'
    said = subprocess.run(["bash", "-c", script, "r1.sh"], cwd=RECIPES, capture_output=True, text=True, check=True).stdout
    task, sft, grpo = (part.split("\n") for part in said.strip().split("\n--\n"))
    assert compose([*task, *sft, "data.worked=0.35", "trainer.max_steps=800"]).model.n_params < 450_000
    config = compose([*task, *grpo])
    assert config.reward.answer.pattern == r"\d$"
    assert config.objective.prompts(config) == 32


def test_a_recipe_of_several_stages_is_named_with_its_command() -> None:
    with pytest.raises(ConfigError, match=rf"r1_zero has several stages, each a run: bash {RECIPES / 'r1_zero.sh'}"):
        compose(["recipe=r1_zero"])


@pytest.mark.slow
def test_a_recipe_that_is_killed_in_two_of_its_stages_ends_with_the_weights_of_one_that_is_not(home: Path) -> None:
    assert started("r1.sh", home / "whole").wait(1200) == 0
    killed = home / "killed"
    for sign in ("grpo/checkpoints/step_00000010", "right.jsonl.part"):
        run = started("r1.sh", killed)
        while not (killed / sign).exists():
            assert run.poll() is None, f"it ended before {sign}"
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert started("r1.sh", killed).wait(1200) == 0
    assert weights(killed / "grpo_2") == weights(home / "whole" / "grpo_2")
    assert (killed / "right.jsonl").read_bytes() == (home / "whole" / "right.jsonl").read_bytes()
