"""What a run says of itself, in whole runs of a tiny model."""

import datetime
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.compose.conftest import ROOT
from tests.training import rows, tiny, weights
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import run_folder
from txtrain.checkpoint.state import RunState
from txtrain.data.samples.rows import OrderedSamples
from txtrain.ground.convert import plain
from txtrain.monitor import monitor
from txtrain.monitor.metrics_csv import EXACT, WALL_CLOCK, read
from txtrain.parallel.timers import PHASES
from txtrain.training.run import train

LONG = ("trainer.max_steps=60", "trainer.val_check_interval=100", "trainer.limit_val_batches=0", "save.every_n_steps=20", "save.keep_last=9")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Text and cache, shared by the runs of this file."""
    return tmp_path_factory.mktemp("watched")


class Hit(pl.Callback):
    """Makes the weights worthless before a step (0-based), as a bad batch or a broken device does."""

    def __init__(self, *steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step in self.steps:
            with torch.no_grad():
                module.model.final_norm.weight.mul_(30)


def spikes(run):
    return [json.loads(line) for line in (run / "spikes.jsonl").read_text().splitlines()]


def test_a_state_keeps_the_times_of_its_moment(runs):
    """A checkpoint behind the training is written later."""
    seen = monitor.Watch(tiny(runs), None, None, SimpleNamespace(tell=lambda *a, **k: None), None, RunState(times={"data": 1.0}))
    kept = seen.state()["times"]
    seen.times["data"] += 1.0
    assert kept["data"] == 1.0


def test_the_columns_of_time_add_up_to_what_has_passed(runs):
    began = time.perf_counter()
    train(tiny(runs, f"run_dir={runs / 'times'}", "trainer.log_every_n_steps=3", "sample.n=1"))
    passed = time.perf_counter() - began
    table = read(runs / "times/metrics.csv")
    assert tuple(table[0])[: len(EXACT) + len(WALL_CLOCK)] == EXACT + WALL_CLOCK
    times = {name: sum(float(row[f"time/{name}"]) for row in table) for name in PHASES}
    last = table[-1]
    training = sum(times[name] for name in ("data", "forward_backward", "optimizer", "communication"))
    assert sum(times.values()) <= passed
    assert float(last["seconds"]) * 0.5 < training <= float(last["seconds"]) * 1.05
    assert all(times[name] > 0 for name in PHASES if name != "communication"), times
    assert times["communication"] == 0, "there is one process"
    assert [float(row["time/validation"]) > 0 for row in table] == [bool(row["val_loss"]) for row in table], "a validation belongs to its row"
    assert all(0 < float(row["goodput"]) < 1 and float(row["mfu"]) == float(row["hfu"]) > 0 for row in table)
    assert 0.05 < float(last["memory_gib"]) < 64


def test_the_hardware_does_more_where_activations_are_computed_again(runs):
    train(tiny(runs, f"run_dir={runs / 'again'}", "trainer.activation_checkpointing=full", "trainer.max_steps=3", "trainer.limit_val_batches=0"))
    config = tiny(runs)
    once, again = config.model.flops_per_sample(32), config.model.recomputed_flops(32, checkpointing="full")
    for row in read(runs / "again/metrics.csv"):
        assert float(row["hfu"]) == pytest.approx(float(row["mfu"]) * (once + again) / once)
    assert 0.2 < again / once < 1 / 3


# ---------------------------------------------------------------------------------------------------------------- goodput


DIES = """
import os, signal, sys
from pathlib import Path
import lightning.pytorch as pl
from tests.training import tiny
from txtrain.training.run import train

class Die(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == 45:
            os.kill(os.getpid(), signal.SIGKILL)

train(tiny(Path(sys.argv[1]), f"run_dir={sys.argv[2]}", *sys.argv[3:]), callbacks=[Die()])
"""


@pytest.mark.slow
def test_goodput_counts_lost_steps_and_the_time_between_death_and_restart(runs):
    """kill -9 after a checkpoint: what came after it is lost, and the clock has gone on meanwhile."""
    run = runs / "killed"
    config = tiny(runs, f"run_dir={run}", *LONG, "save.every_n_steps=30")

    program = [sys.executable, "-c", DIES, str(runs), str(run), *LONG, "save.every_n_steps=30"]
    died = subprocess.run(program, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert died.returncode == -signal.SIGKILL, died.stderr
    told = json.loads((run / "run.json").read_text())
    assert (told["status"], told["starts"]) == ("running", 1)
    kept = checkpoint.read_state(checkpoint.locate(run)).seconds
    time.sleep(1.0)
    result = train(config)
    after = json.loads((run / "run.json").read_text())
    assert (after["status"], after["starts"], after["first_start"]) == ("complete", 2, told["first_start"])
    whole = time.time() - told["first_start"]
    assert result.metrics["seconds"] > kept
    assert after["goodput"] == pytest.approx(result.metrics["seconds"] / whole, rel=0.2)
    assert after["goodput"] <= 1 - 1.0 / whole, "a second of waiting is lost at least"


def test_a_start_that_was_killed_before_its_first_checkpoint_counts_too(runs):
    place = run_folder.RunFolder(runs / "early")
    config = tiny(runs, f"run_dir={runs / 'early'}")
    place.create(config, {}, start=1000.0)
    place._release()
    again = run_folder.RunFolder(runs / "early")
    again.create(config, {}, start=1500.0)
    assert again.began == 1000.0
    again._release()
    other = run_folder.RunFolder(runs / "early")
    other.create(tiny(runs, f"run_dir={runs / 'early'}", "optimizer.lr=0.5"), {}, start=2000.0)
    assert other.began == 2000.0, "another run in the same folder"
    other._release()


def test_the_time_in_which_a_run_was_complete_is_not_counted():
    first = run_folder._life({}, 100.0)
    assert first == {"first_start": 100.0, "complete_for": 0.0, "starts": 1}
    ended = "2026-12-01T00:01:40+00:00"
    start = 50.0 + datetime.datetime.fromisoformat(ended).timestamp()
    more = run_folder._life(first | {"status": "complete", "ended": ended}, start)
    assert more == {"first_start": 100.0, "complete_for": 50.0, "starts": 2}
    assert run_folder._life(first | {"status": "preempted", "ended": ended}, start)["complete_for"] == 0.0


# ----------------------------------------------------------------------------------------------------------------- spikes


def test_the_spikes_of_a_long_run_are_kept_up_to_the_step_that_it_goes_on_from(tmp_path):
    """However many there are, each with the samples of its batch; an unfinished line of a killed run is removed."""
    path, samples = tmp_path / "spikes.jsonl", json.dumps(list(range(10**5)))
    lines = [f'{{"step": {step}, "loss": 9.5, "sample_index": {samples}}}\n' for step in range(1, 26)]
    assert sum(map(len, lines[:20])) > 12_000_000
    path.write_text("".join(lines) + lines[0][:-1])
    monitor._keep_until(25, path)
    assert path.read_text() == "".join(lines)
    monitor._keep_until(20, path)
    assert path.read_text() == "".join(lines[:20])
    monitor._keep_until(0, path)
    assert path.read_text() == ""


def test_a_spike_is_told_with_its_samples_and_alike_after_a_resume(runs, capsys):
    whole, parts = runs / "spiked", runs / "spiked-parts"
    config = tiny(runs, *LONG, f"run_dir={whole}")
    train(config, callbacks=[Hit(44)])
    said = capsys.readouterr().out
    assert 1 <= said.count("the loss jumps") < len(spikes(whole)), "a streak is one line"
    assert f"step 45: the loss jumps to {spikes(whole)[0]['loss']:.4f} from a median of" in said
    assert str(whole / "spikes.jsonl") in said
    first = spikes(whole)[0]
    assert first["step"] == 45
    assert len(first["sample_index"]) == 8
    assert first["loss"] == float(read(whole / "metrics.csv")[44]["loss"]) > 2 * first["median"]
    assert [int(row["loss_spikes"]) for row in read(whole / "metrics.csv")][43:45] == [0, 1]
    assert int(read(whole / "metrics.csv")[-1]["loss_spikes"]) == len(spikes(whole))

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if module.step == 46:
                raise KeyError("a failure after the spike, before the next checkpoint")

    config = tiny(runs, *LONG, f"run_dir={parts}")
    with pytest.raises(KeyError):
        train(config, callbacks=[Hit(44), Stop()])
    assert spikes(parts)[0]["step"] == 45
    train(config, callbacks=[Hit(44)])
    assert (parts / "spikes.jsonl").read_text() == (whole / "spikes.jsonl").read_text()
    assert rows(parts) == rows(whole)
    assert weights(parts) == weights(whole)


def test_a_line_that_a_killed_run_left_unfinished_goes():
    assert monitor._step('{"step": 3, "lo') > 10**9
    assert monitor._step('{"step": 3}\n') == 3


def test_a_run_that_has_diverged_ends_where_asked_and_says_the_key(runs):
    run = runs / "diverged"
    config = tiny(runs, *LONG, f"run_dir={run}", "trainer.max_divergent_steps=4", "optimizer.lr=1e-5")
    with pytest.raises(monitor.Diverged, match=r"the last 5 steps up to 49 .*trainer\.max_divergent_steps=4 ends it"):
        train(config, callbacks=[Hit(44)])
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    with pytest.raises(monitor.Diverged):
        train(config, callbacks=[Hit(44)])
    assert train(tiny(runs, *LONG, f"run_dir={run}", "trainer.max_divergent_steps=null", "optimizer.lr=1e-5")).status == "complete"


# --------------------------------------------------------------------------------------------------------------- slowness


def test_a_slow_run_is_told_why_once_enough_has_been_seen(runs, capsys, monkeypatch):
    monkeypatch.setattr("txtrain.monitor.slowness.SECONDS", 0.02)
    config = tiny(runs, f"run_dir={runs / 'slow'}", *LONG, "trainer.max_steps=30")
    read_them = OrderedSamples.__getitems__

    def slowly(self, rows):
        time.sleep(0.1)
        return read_them(self, rows)

    monkeypatch.setattr(OrderedSamples, "__getitems__", slowly)
    train(config)
    said = capsys.readouterr().out
    assert said.count("slow: ") == 1
    assert "of a step is waiting for data: data.num_workers=" in said or "`txtrain prepare`" in said


def test_compilation_is_counted_by_rows(runs):
    """Rows in which something was compiled, from the second on."""
    config = tiny(runs)
    seen = monitor.Watch(config, None, None, SimpleNamespace(tell=lambda *a, **k: None), None, RunState())
    world = SimpleNamespace(size=1, local_size=1)
    module = SimpleNamespace(step=0, device=torch.device("cpu"), parallel=SimpleNamespace(is_first=True, size=1, world=world))
    times = {f"time/{name}": 1.0 for name in PHASES}
    counts = iter([5, 5, 6, 6, 7, 8])
    for _ in range(6):
        module.step += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(monitor, "_compiled", lambda: next(counts))
            seen._judge(module, times | {"mfu": 0.5})
    assert seen._compiled_again == 3
    assert seen._stretch.compiled_again == 3
    assert seen._stretch.steps == 5, "the first row warms up"


# ------------------------------------------------------------------------------------------------------------------ traces


def test_a_profile_is_a_trace_of_its_steps(runs, capsys):
    run = runs / "profiled"
    plain = runs / "unprofiled"
    short = ("trainer.max_steps=8", "trainer.limit_val_batches=0")
    train(tiny(runs, *short, f"run_dir={plain}"))
    capsys.readouterr()
    train(tiny(runs, *short, f"run_dir={run}", "profile=true"))
    said = capsys.readouterr().out
    path = run / "profile/steps_4_6_rank0.json.gz"
    assert f"profile of steps 4 to 6: {path}" in said
    assert "share  calls  operator" in said
    assert said.count("aten::") >= 5
    with gzip.open(path) as f:
        names = [event.get("name") for event in json.load(f)["traceEvents"]]
    assert [n for n in dict.fromkeys(names) if n and n.startswith("step ")] == ["step 4", "step 5", "step 6"]
    text = (run / "profile/steps_4_6_rank0.txt").read_text().splitlines()
    assert text[0].split() == ["ms", "a", "step", "share", "calls", "operator"]
    assert any("aten::mm" in line for line in text)
    assert rows(run) == rows(plain), "watching changes nothing"
    assert weights(run) == weights(plain)


def test_a_profile_under_resume_traces_what_is_left_of_its_steps(runs, capsys):
    run = runs / "profiled-later"
    first = tiny(runs, "trainer.max_steps=5", "scheduler=constant", "trainer.limit_val_batches=0", f"run_dir={run}")
    train(first)
    steps = ("profile=true", "profile_steps=[4,7]", "scheduler=constant", "trainer.limit_val_batches=0", f"run_dir={run}")
    train(tiny(runs, "trainer.max_steps=6", *steps))
    assert sorted(p.name for p in (run / "profile").iterdir()) == ["steps_6_6_rank0.json.gz", "steps_6_6_rank0.txt"], "the run ended in between"
    train(tiny(runs, "trainer.max_steps=8", *steps))
    assert (run / "profile/steps_7_7_rank0.json.gz").exists()
    capsys.readouterr()
    train(tiny(runs, "trainer.max_steps=10", *steps))
    assert "profile_steps=[4,7] are done already: nothing is traced." in capsys.readouterr().out
    train(tiny(runs, "trainer.max_steps=12", *steps[:1], *steps[2:]))
    assert "the run ended before step 14: nothing is traced" in capsys.readouterr().out


def test_a_profile_without_a_folder_shows_its_operators(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny(runs, "trainer.fast_dev_run=2", "profile=true", "profile_steps=[1,2]"))
    said = capsys.readouterr().out
    assert "profile of steps 1 to 2; trainer.fast_dev_run keeps no trace" in said
    assert said.count("aten::") >= 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["profile_steps=[1,2]"], "`profile_steps` must be null without profile=true"),
        (["profile=true", "profile_steps=[5,4]"], "`profile_steps` must be the first and the last step to trace, but is [5, 4]"),
        (["profile=true", "profile_steps=[0,4]"], "`profile_steps[0]` must be at least 1"),
        (["verbosity=loud"], "`verbosity` must be one of quiet, normal, verbose"),
        (["trainer.max_divergent_steps=-1"], "`trainer.max_divergent_steps` must be at least 0"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(runs, keys, says):
    with pytest.raises(ValueError) as e:
        tiny(runs, *keys)
    assert says in str(e.value)


# ---------------------------------------------------------------------------------------------------------------- a process


@pytest.mark.slow
def test_a_quiet_run_says_its_end_alone(runs):
    config = runs / "quiet.yaml"
    config.write_text(yaml.safe_dump(plain(tiny(runs, f"run_dir={runs / 'quiet'}", "verbosity=quiet", "sample.n=1"))))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TXTRAIN_CONFIG": str(config)}
    done = subprocess.run([sys.executable, "-m", "txtrain", "train"], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.endswith(f"done: {runs / 'quiet'}")
