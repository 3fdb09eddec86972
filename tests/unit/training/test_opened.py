"""Weights that a running training replaces meanwhile: all ranks read the same ones, and say which."""

import dataclasses as dc
import io
import json
from pathlib import Path

import pytest

from tests.training import tiny
from txtrain import compose, evaluate
from txtrain.cli.main import main
from txtrain.errors import ConfigError
from txtrain.parallel.one_process import OneProcess
from txtrain.training import evaluation
from txtrain.training import opened as opening
from txtrain.training.models_read import models_read
from txtrain.training.opened import opened_alike, trained_weights
from txtrain.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("opened")
    made = train(tiny(folder, f"run_dir={folder / 'run'}", "trainer.max_steps=2", "save.every_n_steps=1", "save.keep_last=2"))
    return made.run_dir


def of_step(run, step):
    return run / f"checkpoints/step_{step:08d}"


class Second(OneProcess):
    """A rank whose file system shows another newest checkpoint than the first rank's."""

    firsts: Path

    def first(self, do):
        return self.firsts

    @property
    def is_first(self):
        return False


def test_every_rank_opens_the_checkpoint_that_the_first_has_found(run):
    config = compose(["data=text", f"data.path={run}/../text.txt", f"checkpoint={run}", "trainer.accelerator=cpu"], verb="evaluate")
    rank = Second(dc.replace(config, checkpoint=str(run)))
    rank.firsts = of_step(run, 1)
    assert trained_weights(rank.config, rank, str)[0].path == of_step(run, 1)
    taught = tiny(run.parent, "objective=distill", f"objective.teacher={run}")
    assert models_read(taught, rank)["teacher"].path == of_step(run, 1)


def test_a_checkpoint_that_another_rank_has_not_found_is_closed_and_the_next_one_opened(run):
    gone, closed = [True, False], []

    class Rank(OneProcess):
        def any(self, flag):
            return flag or gone.pop(0)

    class Weights:
        def __init__(self, path):
            self.path = path

        def close(self):
            closed.append(self.path)

    there = [of_step(run, 1), of_step(run, 9), of_step(run, 2)]  # the second is removed before it is opened

    def opened(path):
        if not path.exists():
            raise OSError
        return Weights(path)

    source, told = opened_alike(Rank(tiny(run.parent)), lambda: there.pop(0), opened, lambda path: path.name)
    assert (source.path.name, told, closed) == ("step_00000002", "step_00000002", [of_step(run, 1)])


def test_a_checkpoint_that_only_the_first_rank_has_is_told(run, monkeypatch):
    """On two machines that share no file system; it may come to the other within a minute."""

    class Rank(OneProcess):
        def any(self, flag):
            return True

    now = iter(range(0, 1000, 25))
    monkeypatch.setattr(opening.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(opening.time, "sleep", lambda seconds: None)
    with pytest.raises(ConfigError, match=f"{of_step(run, 2)} must be on a file system that all processes share"):
        opened_alike(Rank(tiny(run.parent)), lambda: of_step(run, 2), lambda path: io.BytesIO(), str)


def test_the_step_that_is_told_is_the_one_that_is_measured(run, tmp_path, monkeypatch, capsys):
    words = ["data=text", f"data.path={run.parent / 'text.txt'}", "trainer.accelerator=cpu", "split=validation", "n_bootstrap=0", f"data.cache_dir={tmp_path}"]
    known = {step: evaluate(of_step(run, step), compose(words, verb="evaluate")).metrics["loss"].value for step in (1, 2)}
    ranks_of, later = evaluation.ranks_of, of_step(run, 2).rename(tmp_path / "later")

    def saved_meanwhile(cfg):
        if later.exists():
            later.rename(of_step(run, 2))
        return ranks_of(cfg)

    monkeypatch.setattr(evaluation, "ranks_of", saved_meanwhile)
    assert main(["evaluate", f"checkpoint={run}", *words, f"out={tmp_path / 'out.json'}"]) == 0
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["metrics"]["loss"]["value"] == known[said["step"]]
    assert Path(said["checkpoint"]).name == f"step_{said['step']:08d}"
