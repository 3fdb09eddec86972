import dataclasses as dc
import re

import pytest
import torch

from tests.training import tiny
from txtrain.checkpoint import run_folder
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.state import RunState
from txtrain.errors import ConfigError


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tiny(tmp_path, "name=try")


def test_the_folder_is_named_by_run_and_time_and_two_in_one_second_are_apart(config):
    first, second = run_folder.choose(config), run_folder.choose(config)
    second.path = first.path
    first.create(config, {})
    second.create(config, {})
    assert re.fullmatch(r"runs/try/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", str(first.path))
    assert str(second.path) == f"{first.path}_2"


def test_under_slurm_the_folder_survives_a_requeue(config, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert str(run_folder.choose(config).path) == "runs/try/slurm-77"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert str(run_folder.choose(config).path) == "runs/try/slurm-70_3"


def test_a_given_folder_wins_over_the_sweeps_and_that_over_the_clock(config):
    assert str(run_folder.choose(config, name="sweep-1").path) == "runs/try/sweep-1"
    assert str(run_folder.choose(dc.replace(config, run_dir="mine"), name="sweep-1").path) == "mine"


def test_two_sweeps_of_one_second_have_folders_of_their_own(config, monkeypatch):
    """Also where the other's member has a checkpoint by now; but the members of a job that is requeued are found again."""
    other = run_folder.choose(config, name="2026-11-27_10-00-00-0")
    other.create(config, {})
    (other.path / "checkpoints/step_00000004").mkdir(parents=True)
    (other.path / "checkpoints/step_00000004/complete").write_text("{}")
    mine = run_folder.choose(config, name="2026-11-27_10-00-00-0")
    assert mine.checkpoint is None
    mine.create(config, {})
    assert str(mine.path) == "runs/try/2026-11-27_10-00-00-0_2"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    again = run_folder.choose(config, name="slurm-77-0")
    again.create(config, {})
    again.end("preempted")
    assert run_folder.choose(config, name="slurm-77-0").path == again.path
    assert not run_folder.choose(config, name="slurm-77-0").exclusive


def test_choosing_writes_nothing(config, tmp_path):
    before = set(tmp_path.rglob("*"))
    run_folder.choose(config)
    run_folder.choose(dc.replace(config, run_dir="mine"))
    assert set(tmp_path.rglob("*")) == before


def test_a_named_run_takes_no_other_folder(config):
    with pytest.raises(ConfigError, match="`run_dir` must not be given"):
        run_folder.choose(dc.replace(config, resume="somewhere"), given=["run_dir"])


def test_a_checkpoint_outside_of_a_run_is_not_continued(config, tmp_path):
    """Its run's folder would be the one two above, whatever that is."""
    where = tmp_path / "mine/saved/step_00000004"
    where.mkdir(parents=True)
    (where / "complete").write_text("{}")
    with pytest.raises(ConfigError, match=r"one of its checkpoints in its folder `checkpoints`, but .* lies in .*/saved\. .*: fork="):
        run_folder.choose(dc.replace(config, resume=str(where)))


def test_differences_leave_out_what_is_free(tmp_path):
    a = {"seed": 1, "trainer": {"max_steps": 3}, "data": {"micro_batch_size": 1, "seq_len": 8}, "model": {"window": [4, None]}}
    b = {"seed": 2, "trainer": {"max_steps": 9}, "data": {"micro_batch_size": 2, "seq_len": 9}, "model": {"window": [4, 8]}}
    assert run_folder.differences(a, b) == [("seed", 1, 2), ("data.seq_len", 8, 9), ("model.window", [4, None], [4, 8])]
    assert run_folder.differences(a, a) == []


def test_what_only_the_first_start_knew_stays_in_run_json(config):
    run = run_folder.RunFolder(run_folder.Path("run"))
    run.create(config, {"fallback": "no hub", "grafts": {"ffn": {"from": "mlp", "to": "swiglu"}}, "step": 0})
    run.end("preempted")
    again = run_folder.RunFolder(run.path, checkpoint=run_folder.Path("run/checkpoints/step_00000001"))
    again.create(config, {"fallback": None, "grafts": {}, "step": 0})
    told = again._read()
    assert (told["status"], told["fallback"], told["grafts"]) == ("running", "no hub", {"ffn": {"from": "mlp", "to": "swiglu"}})


def test_what_run_json_says_with_null_it_does_not_say(config):
    run = run_folder.RunFolder(run_folder.Path("run"), checkpoint=run_folder.Path("run/checkpoints/step_00000001"))
    run.path.mkdir()
    (run.path / "run.json").write_text('{"first_start": null, "complete_for": null, "starts": null}')
    run.create(config, {}, start=7.0)
    assert [run.facts[key] for key in ("first_start", "complete_for", "starts")] == [7.0, 0.0, 1]


@pytest.mark.parametrize("end", ["tmp", "old"])
def test_what_lies_where_checkpoints_are_made_is_removed_whatever_it_is(end, tmp_path):
    kept = tmp_path / "checkpoints" / "kept"
    (tmp_path / "checkpoints" / f"step_1.{end}").mkdir(parents=True)
    kept.write_text("x")
    (tmp_path / "checkpoints" / f"step_2.{end}").symlink_to("kept")
    (tmp_path / "checkpoints" / f"step_3.{end}").touch()
    (tmp_path / "checkpoints" / f"step_4.{end}").symlink_to("nothing")
    saving.clean(tmp_path)
    assert kept.read_text() == "x"
    assert not [*(tmp_path / "checkpoints").glob(f"*.{end}")]


def test_a_newest_checkpoint_that_has_lost_its_marker_is_not_passed_over(config, tmp_path):
    """Nothing silently starts at step 0, or from an older one."""
    path = tmp_path / "run"
    config = dc.replace(config, run_dir=str(path))
    newest = path / "checkpoints/step_00000200"
    newest.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"step_00000200 cannot be read: .*complete.* There is no other intact one\."):
        run_folder.choose(config)
    saving.save(path / "checkpoints/step_00000100", {"model.w": torch.ones(2)}, RunState(step=100), beside=lambda _: None)
    for resume in ("auto", str(path)):
        with pytest.raises(ConfigError, match=rf"step_00000200 cannot be read: .* The newest intact one is step_00000100\. .*: mv {newest} {newest}\.damaged"):
            run_folder.choose(dc.replace(config, run_dir=None if resume != "auto" else str(path), resume=resume))
