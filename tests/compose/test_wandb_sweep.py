"""slurm/wandb_sweep.yaml: what W&B's agent would type is a command line of ours."""

import itertools
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from txtrain import compose
from txtrain.checkpoint.run_folder import choose
from txtrain.cli.main import parse

SWEEP = yaml.safe_load((Path(__file__).parents[2] / "slurm" / "wandb_sweep.yaml").read_text())


def commands():
    """For the ends of each range and each listed value, as `wandb agent` makes them."""
    ends = {key: how.get("values") or [how[end] for end in ("min", "max", "value") if end in how] for key, how in SWEEP["parameters"].items()}
    for values in itertools.product(*ends.values()):
        given = {key: {"value": value} for key, value in zip(ends, values, strict=True)}
        filled = {"program": [SWEEP["program"]], **create_sweep_command_args({"args": given})}
        words = create_sweep_command(list(SWEEP["command"]))
        yield [word for chunk in words for word in (filled[chunk[2:-1]] if chunk.startswith("${") else [chunk])]


def test_every_trial_composes_with_its_values():
    made = []
    for program, *words in commands():
        line = parse(words)
        assert (program, line.verb, line.flags) == ("txtrain", "train", {})
        config = compose(line.overrides)
        made.append((config.optimizer.lr, config.model.position.type, config.model.attention.window))
        assert set(config.logger) == {"wandb"}
    assert len(set(made)) == len(made) == 8
    assert {rate for rate, _, _ in made} == {1e-4, 3e-3}
    assert {window for _, _, window in made} == {128, (64, None)}


def test_the_metric_is_a_column_and_a_smaller_one_is_better():
    from txtrain.monitor.metrics_csv import COLUMNS

    assert SWEEP["metric"]["name"] in COLUMNS
    assert SWEEP["metric"]["goal"] == "minimize"


@pytest.mark.parametrize("job", [None, "77"])
def test_a_trial_has_a_folder_by_its_id_also_where_one_job_runs_several(monkeypatch, tmp_path, job):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    place = choose(compose(["model=mistral", "data=wikitext"]))
    assert (str(place.path), place.exclusive) == ("runs/mistral-wikitext/sweep-abc123", False)
