"""Whole runs with loggers that fail, sleep or work: the training is the same."""

import shutil
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from torch import nn

from tests.training import rows, tiny
from tests.unit.monitor.bad_loggers import Remembers
from txtrain import compose, plan
from txtrain.errors import ConfigError
from txtrain.model.build import build_model
from txtrain.monitor.loggers.build import make_loggers
from txtrain.monitor.loggers.sinks import Sink
from txtrain.monitor.metrics_csv import read
from txtrain.training.run import train

BAD = "tests.unit.monitor.bad_loggers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loggers")


@pytest.fixture(scope="module")
def plain(folder):
    return rows(train(tiny(folder, f"run_dir={folder / 'plain'}")).run_dir)


def with_logger(folder, name, *more):
    given = f"logger.mine._target_={BAD}.{name}"
    return tiny(folder, f"run_dir={folder / name}{len(more)}", f"imports=[{BAD}]", given, *more)


@pytest.mark.parametrize("more", [(), ("logger.mine.start=false",)])
def test_a_logger_that_raises_is_said_once_and_the_run_is_the_same(folder, plain, capsys, more):
    done = train(with_logger(folder, "Raises", *more))
    assert (done.status, rows(done.run_dir)) == ("complete", plain)
    assert capsys.readouterr().out.replace("\n", " ").count("logger mine failed: OSError: the server is gone.") == 1


@pytest.mark.parametrize(("more", "says"), [((), "failed: OSError: no route to host."), (("logger.mine.seconds=60",), "cannot be made (no answer for 1 s)")])
def test_a_logger_without_a_server_costs_itself_alone(folder, plain, capsys, monkeypatch, more, says):
    monkeypatch.setattr("txtrain.monitor.loggers.build._MAKING", 1.0)
    done = train(with_logger(folder, "Unreachable", *more))
    assert (done.status, rows(done.run_dir)) == ("complete", plain)
    assert capsys.readouterr().out.replace("\n", " ").count(f"logger mine {says}") == 1


def test_a_logger_that_sleeps_delays_nothing_but_the_end(folder, plain, capsys, monkeypatch):
    monkeypatch.setattr(Sink, "patience", lambda self, status: 0.5)
    began = time.monotonic()
    done = train(with_logger(folder, "Sleeps"))
    assert time.monotonic() - began < 120  # one row alone takes 600
    assert (done.status, rows(done.run_dir)) == ("complete", plain)
    assert "logger mine has not finished after 0 s" in capsys.readouterr().out.replace("\n", " ")


def test_a_logger_of_ones_own_is_told_of_configuration_rows_and_end(folder, plain):
    done = train(with_logger(folder, "Remembers"))
    named, config, *told, save, status = Remembers.told[str(done.run_dir)]
    assert (named, config[:2], save, status) == (("named", "mine"), ("config", 1337), "save", "success")
    assert "text.txt" in config[2]
    assert config[3]["n_params"] > 1000
    assert [step for step, _ in told] == [int(row["step"]) for row in read(done.run_dir / "metrics.csv")]
    assert {name: str(told[-1][1][name]) for name in ("loss", "val_loss", "lr")} == {name: plain[-1][name] for name in ("loss", "val_loss", "lr")}


def test_a_logger_is_told_of_the_memory_of_one_of_the_runs_processes(tmp_path):
    config = compose(["model=llama2", "strategy=fsdp", f"imports=[{BAD}]", f"logger.mine._target_={BAD}.Remembers"])
    for n_ranks in (1, 8):
        place = SimpleNamespace(path=tmp_path / str(n_ranks), facts={}, first_step=0)
        make_loggers(config, place, print, n_ranks).close("complete")
    alone, shared = (Remembers.told[str(tmp_path / str(n_ranks))][1][3]["memory"] for n_ranks in (1, 8))
    assert (alone, shared) == (plan(config).memory, plan(compose(["model=llama2", "strategy=fsdp", "trainer.devices=8"])).memory)


def test_a_logger_is_told_no_figures_of_a_model_that_was_given(folder):
    config = with_logger(folder, "Remembers", "freeze=['^base']", "trainer.max_steps=1", "trainer.limit_val_batches=0", "seed=1337")
    done = train(config, model=Own(config.model))
    assert Remembers.told[str(done.run_dir)][1][3] == {}


class Own(nn.Module):
    """A model whose parameters have names of its own."""

    def __init__(self, config):
        super().__init__()
        self.layers, self.base = build_model(config), nn.Linear(1, 1)

    def forward(self, *args, **given):
        return self.layers(*args, **given)


class Asks(pl.Callback):
    """What callbacks do with loggers: look for their class, log by themselves, reach the client."""

    def on_train_start(self, trainer, module):
        (logger,) = trainer.loggers
        assert isinstance(logger, Remembers)
        logger.log_metrics({"mine": 1.0}, step=0)


def test_callbacks_reach_the_loggers(folder):
    done = train(with_logger(folder, "Remembers", "trainer.max_steps=1"), callbacks=[Asks()])
    assert Remembers.told[str(done.run_dir)][2] == (0, {"mine": 1.0})


def test_a_preempted_run_is_no_success(folder):
    import os
    import signal

    class Interrupt(pl.Callback):
        def on_train_batch_end(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)

    done = train(with_logger(folder, "Remembers", "trainer.max_steps=5", "save.every_n_steps=5"), callbacks=[Interrupt()])
    assert (done.status, Remembers.told[str(done.run_dir)][-1]) == ("preempted", "failed")


def test_a_resumed_run_hides_what_tensorboard_had_of_the_steps_that_it_repeats(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = folder / "tensorboard"
    given = (f"run_dir={place}", "logger=tensorboard", "logger.x_axis=tokens", "save.every_n_steps=4", "save.keep_best=0")
    train(tiny(folder, *given, "trainer.max_steps=4"))
    (place / "checkpoints").rename(folder / "checkpoints of 4")
    rows = (place / "metrics.csv").read_text()
    train(tiny(folder, *given, "trainer.max_steps=7", "resume=never"))  # stands for a run that was killed after step 7
    shutil.rmtree(place / "checkpoints")
    (folder / "checkpoints of 4").rename(place / "checkpoints")
    (place / "metrics.csv").write_text(rows)
    train(tiny(folder, *given, "trainer.max_steps=8"))
    read_back = EventAccumulator(str(place / "tensorboard")).Reload()
    assert [event.step for event in read_back.Scalars("loss")][-4:] == [256 * step for step in range(5, 9)]
    assert max(event.step for event in read_back.Scalars("loss")) == 8 * 256


def test_a_run_that_begins_again_before_its_first_checkpoint_hides_what_tensorboard_had(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = folder / "begun_again"
    train(tiny(folder, f"run_dir={place}", "logger=tensorboard", "trainer.max_steps=3"))
    shutil.rmtree(place / "checkpoints")
    train(tiny(folder, f"run_dir={place}", "logger=tensorboard", "trainer.max_steps=2"))
    assert [event.step for event in EventAccumulator(str(place / "tensorboard")).Reload().Scalars("loss")] == [1, 2]


def test_an_argument_that_a_logger_does_not_have_ends_the_run_before_anything_is_written(folder):
    with pytest.raises(ConfigError, match=r"`logger\.mine` .* cannot be made"):
        train(with_logger(folder, "Remembers", "logger.mine.adress=x", "trainer.max_steps=2", "sample.n=1"))
    assert not (folder / "Remembers3").exists()
