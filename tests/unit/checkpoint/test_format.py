"""The format: complete or absent, by canonical names, without a pickle."""

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import _hf_utils as words
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import reader, restore
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.state import RunState
from txtrain.config.resume_from import run_folder
from txtrain.errors import ConfigError
from txtrain.optim import state as optimizer_state
from txtrain.run_config import SaveConfig


class Kill(BaseException):
    """Stands for a SIGKILL: nothing may catch it."""


def model_and_optimizer(seed, cls=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.register_buffer("counts", torch.randint(9, (5,)))
    optimizer = cls(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3)).pow(2).sum().backward()
        optimizer.step()
    return model, optimizer


def save(run, step, seed, val_loss=None):
    tensors = restore.training_tensors(*model_and_optimizer(seed))
    path = checkpoint.path_of(run, step)
    saving.save(path, tensors, RunState(step=step, metrics={"val_loss": val_loss} if val_loss else {}), beside=lambda _: None)
    return path


class Counting(torch.optim.SGD):
    """Keeps numbers of Python beside its tensors, of each kind."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"], state["sum"] = state.get("step", 0) + 1, state.get("sum", 0.1) + float(p.grad.abs().sum()) / 3
            state["even"] = state["step"] % 2 == 0
            state["m"] = state.get("m", 0) + p.grad


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, Counting])
def test_model_and_optimizer_come_back_bit_for_bit(tmp_path, cls):
    before = model_and_optimizer(0, cls)
    saved, numbers = restore.training_tensors(*before), optimizer_state.numbers(*before)
    path = checkpoint.path_of(tmp_path, 3)
    saving.save(path, saved, RunState(step=3, optimizer=numbers), beside=lambda _: None)
    model, _ = model_and_optimizer(1, cls)
    optimizer = cls(model.parameters(), lr=0.1)
    restore.load_training(path, model, optimizer)
    loaded = restore.training_tensors(model, optimizer)
    assert loaded.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []
    assert optimizer.param_groups[0]["lr"] == 0.1
    restored = optimizer_state.numbers(model, optimizer)
    assert {name: (type(n), n) for name, n in restored.items()} == {name: (type(n), n) for name, n in numbers.items()}
    if cls is Counting:
        kept = optimizer.state[model[0].weight]
        assert (kept["step"], kept["even"], len(restored)) == (3, False, 12)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, Counting])
def test_a_parameter_that_has_had_no_gradient_has_no_state_before_and_after(tmp_path, cls):
    """BERT's head for sentence pairs where there are none; an expert that no token has come to."""

    class Partly(cls):
        def step(self, closure=None):
            held = self.param_groups[0]["params"]
            self.param_groups[0]["params"] = [p for p in held if p.grad is not None]
            super().step(closure)
            self.param_groups[0]["params"] = held

    def made(seed, steps):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = Partly(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model[0](torch.ones(2, 3)).sum().backward()
            optimizer.step()
        return model, optimizer

    before, path = made(0, 3), checkpoint.path_of(tmp_path, 3)
    saved, numbers = restore.training_tensors(*before), optimizer_state.numbers(*before)
    saving.save(path, saved, RunState(step=3, optimizer=numbers), beside=lambda _: None)
    after = made(1, 0)
    restore.load_training(path, *after)
    loaded = restore.training_tensors(*after)
    assert loaded.keys() == saved.keys()
    assert not [name for name in loaded if name.startswith("optimizer.1.")]
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert optimizer_state.numbers(*after) == numbers
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="of another model: optimizer"):
        restore.load_training(path, other, torch.optim.RMSprop(other.parameters(), momentum=0.9))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, Counting])
def test_an_optimizer_whose_steps_were_all_skipped_has_no_state_before_and_after(tmp_path, cls):
    def made(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 4)
        return model, cls(model.parameters(), lr=0.1)

    before, after, path = made(0), made(1), checkpoint.path_of(tmp_path, 2)
    saving.save(path, restore.training_tensors(*before), RunState(step=2, skipped=(2, 2)), beside=lambda _: None)
    restore.load_training(path, *after)
    assert not after[1].state
    assert torch.equal(after[0].weight, before[0].weight)
    saving.save(path, restore.training_tensors(*before), RunState(step=2, skipped=(1, 1)), beside=lambda _: None)
    with pytest.raises(ConfigError, match="of another"):  # an update, and no state: another optimizer's
        restore.load_training(path, *made(1))


def test_numbers_of_another_optimizer_are_refused(tmp_path):
    before = model_and_optimizer(0, Counting)
    path = checkpoint.path_of(tmp_path, 3)
    numbers = optimizer_state.numbers(*before)
    del numbers["0.bias.sum"]
    saving.save(path, restore.training_tensors(*before), RunState(step=3, optimizer=numbers), beside=lambda _: None)
    with pytest.raises(ConfigError, match=r"another optimizer: 0\.bias\.sum is no number there"):
        restore.load_training(path, *model_and_optimizer(1, Counting))


def test_names_are_canonical(tmp_path):
    names = checkpoint.shapes(save(tmp_path, 1, seed=0))
    assert {"model.0.weight", "model.counts", "optimizer.0.weight.exp_avg", "optimizer.1.bias.step"} <= names.keys()
    assert names["optimizer.0.weight.exp_avg"] == (4, 3)


def test_weights_alone_need_no_optimizer(tmp_path):
    path = save(tmp_path, 1, seed=0)
    want, got = model_and_optimizer(0)[0].state_dict(), model_and_optimizer(1)[0]
    restore.load_weights(path, got)
    assert all(torch.equal(got.state_dict()[name], want[name]) for name in want)


def test_another_model_is_refused_by_name_and_shape(tmp_path):
    path = save(tmp_path, 1, seed=0)
    other = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    other.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"model\.0\.bias is \(4,\) there, \(5,\) here"):
        restore.load_weights(path, other)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    path = save(tmp_path, 1, seed=0)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json", ""}
    assert json.loads((path / "complete").read_text()).keys() == {p.name for p in path.iterdir()} - {"complete"}


@pytest.fixture
def killer(monkeypatch):
    """Makes the n-th call that changes the disk die instead; counts them."""

    class Killer:
        at, calls = None, 0

        def wrap(self, owner, name):
            real = getattr(owner, name)

            def call(*args, **kwargs):
                self.calls += 1
                if self.at is not None and self.calls >= self.at:  # the dead do nothing more
                    raise Kill
                return real(*args, **kwargs)

            monkeypatch.setattr(owner, name, call)

    made = Killer()
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (os, "unlink")):
        made.wrap(owner, name)
    return made


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "same step again"])
def test_killed_at_any_moment_of_a_save_the_newest_is_the_old_or_the_new(tmp_path, killer, same_step):
    def attempt(run, at):
        save(run, 1, seed=0)
        killer.calls, killer.at = 0, at
        save(run, 1 if same_step else 2, seed=1)
        saving.rotate(run, SaveConfig(keep_last=1, keep_best=0))
        killer.at = None

    attempt(tmp_path / "counted", None)
    moments = killer.calls
    assert moments > 8
    outcomes = set()
    for at in range(1, moments + 1):
        run = tmp_path / str(at)
        with pytest.raises((Kill, CheckpointException)):  # torch wraps whatever is raised within it
            attempt(run, at)
        killer.at = None
        saving.clean(run)
        newest = checkpoint.locate(run)
        for each in checkpoint.complete(run):
            checkpoint.verify(each)
        model, optimizer = model_and_optimizer(2)
        restore.load_training(newest, model, optimizer)
        found = {seed for seed in (0, 1) if torch.equal(model[0].weight, model_and_optimizer(seed)[0][0].weight)}
        assert len(found) == 1, f"killed at call {at}: neither the old nor the new"
        assert {p.name for p in (run / "checkpoints").iterdir()} <= {"step_00000001", "step_00000002"}, f"killed at call {at}: leftovers"
        outcomes |= found
    assert outcomes == {0, 1}


@pytest.mark.parametrize("strange", [None, math.nan])
def test_rotation_keeps_the_newest_and_the_best(tmp_path, strange):
    """As a metric NaN is none: it would be neither better nor worse than any."""
    for step, loss in ((1, strange), (2, 1.0), (3, strange), (4, 2.0), (5, strange)):
        save(tmp_path, step, seed=0, val_loss=loss)
    assert [checkpoint.step_of(path) for path in saving.best_of(tmp_path, SaveConfig())] == [2, 4]
    saving.rotate(tmp_path, SaveConfig(keep_last=2, keep_best=1))
    assert [checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)] == [2, 4, 5]
    saving.rotate(tmp_path, SaveConfig(keep_last=1, keep_best=0))
    assert [checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)] == [5]


@pytest.fixture
def held(monkeypatch):
    """Files that a reader holds open on NFS: what is removed leaves .nfsXXXX, so that its folder is not empty."""
    real = shutil.rmtree

    def rmtree(path, *more, **how):
        real(path, *more, **how)
        path.mkdir()
        (path / ".nfs0001").touch()
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)


def test_what_cannot_be_removed_is_told_and_taken_for_no_checkpoint(tmp_path, held, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, seed=0)
    (told,) = saving.rotate(tmp_path, SaveConfig(keep_last=1, keep_best=0))
    assert re.search(r"step_00000001 could not be removed \(Directory not empty\): the next start tries again", told)
    again = save(tmp_path, 2, seed=1)
    for step in (1, 2):
        checkpoint.verify(save(tmp_path, step, seed=1))
    assert len(saving.clean(tmp_path)) == 3
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [1, 2]
    assert not list(again.glob(".nfs*"))
    monkeypatch.undo()
    assert saving.clean(tmp_path) == []
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000001", "step_00000002"}


def test_a_checkpoint_that_may_not_be_renamed_stays_and_one_that_is_gone_is_gone(tmp_path, monkeypatch):
    paths = [save(tmp_path, step, seed=0) for step in (1, 2, 3)]
    real = Path.rename

    def rename(path, to):
        if path == paths[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if path == paths[1]:
            shutil.rmtree(path)
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    (told,) = saving.rotate(tmp_path, SaveConfig(keep_last=1, keep_best=0))
    assert told == f"{paths[0]} could not be removed (Permission denied): it stays."
    assert checkpoint.complete(tmp_path) == [paths[0], paths[2]]


def test_locate_takes_a_run_or_a_checkpoint_and_says_what_is_wrong(tmp_path):
    first, second = save(tmp_path, 1, seed=0), save(tmp_path, 20, seed=0)
    assert (checkpoint.locate(tmp_path), checkpoint.locate(str(first))) == (second, first)
    (second / "complete").unlink()
    for where in (tmp_path, second):
        with pytest.raises(ConfigError, match=f"step_00000020 cannot be read: complete, .* is missing. The newest intact one: init_from={first}"):
            checkpoint.locate(where, "init_from")
    with pytest.raises(ConfigError, match=r"`checkpoint` must be .* does not exist"):
        checkpoint.locate(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_is_found_from_within_its_run(tmp_path, monkeypatch):
    """And says in which run it lies, wherever the command was typed."""
    run, path = tmp_path / "run", save(tmp_path / "run", 5, seed=0)
    (run / "config.yaml").write_text("a: 1")
    (run / "checkpoints" / "step_00000009").mkdir()  # damaged
    for inside, where in ((path, "."), (path / "..", path.name), (path, f"../{path.name}"), (tmp_path, path.relative_to(tmp_path))):
        monkeypatch.chdir(inside)
        found = checkpoint.locate(where)
        assert (found.name, found.parents[1].samefile(run)) == (path.name, True)
        assert run_folder(str(where)).samefile(run)
    assert str(found) == f"run/checkpoints/{path.name}"  # as it was typed
    monkeypatch.chdir(run / "checkpoints" / "step_00000009")
    with pytest.raises(ConfigError, match=f"The newest intact one is {path.name}"):
        checkpoint.locate(".", key="resume")


def test_the_file_is_the_one_that_dcp_and_safetensors_write(tmp_path):
    """Every type and shape, through their readers; and through ours what theirs wrote."""
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "half": torch.randn(1, 2, 3).half(),
        "step": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "double": torch.randn(2, 2).double(),
    }
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    saving.write_tensors(ours, tensors | {"transposed": torch.arange(6.0).reshape(2, 3).T})
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(theirs), save_distributed=True), no_dist=True)
    names = [path.name for folder in (ours, theirs) for path in folder.iterdir()]
    assert names == [names[0]] * 2
    with safetensors.safe_open(ours / names[0], "pt") as one, safetensors.safe_open(theirs / names[0], "pt") as other:
        assert one.metadata().keys() == other.metadata().keys() | {"txtrain"}
    found = load_file(ours / names[0])
    assert found.pop("transposed").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name
        assert found[name].data_ptr() % tensor.element_size() == 0
    into = {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}
    restore.load_tensors(theirs, into)
    assert all(into[name].equal(tensor) for name, tensor in tensors.items())
    dcp.load(into := {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}, storage_reader=HuggingFaceStorageReader(str(ours)), no_dist=True)
    assert all(into[name].equal(tensor) for name, tensor in tensors.items())


def test_a_wrong_path_in_a_run_is_told_the_nearest_right_one(tmp_path):
    run, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000006"
    newest.mkdir(parents=True)
    (newest / checkpoint.MARKER).touch()
    for wrong, near in ((newest.with_name("step_00000009"), newest), (newest.parent, run), (run / "config.yaml", run)):
        for asked in (checkpoint.locate, run_folder):
            with pytest.raises(ConfigError, match=re.escape(f" Nearest: {near}.")) as e:
                asked(str(wrong))
            assert len(e.value.problems) == 1  # and not how to mend a config.yaml


def test_the_reader_without_dcp_knows_its_words():
    assert (reader.SHARDING, reader.OFFSETS, reader.NUMBERS) == (words.CUSTOM_METADATA_KEY, words.SAVED_OFFSETS_KEY, words.DTYPE_MAP)
