"""Copies that are written behind the training's back."""

import torch
from safetensors.torch import load_file

from txtrain.checkpoint.saver import Copies, Saver
from txtrain.checkpoint.state import RunState


def test_what_changes_after_the_copy_is_not_in_it_and_its_memory_is_used_again():
    tensors, copies = {"a": torch.arange(4.0), "b": torch.zeros(3, dtype=torch.bfloat16)}, Copies()
    first = copies.of(tensors)
    tensors["a"].fill_(7)
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = copies.of(tensors)
    assert second["a"].tolist() == [7, 7, 7, 7]
    assert second["a"].data_ptr() == first["a"].data_ptr() != tensors["a"].data_ptr()
    tensors["b"] = torch.ones(5)  # another tensor has a place of its own
    assert copies.of(tensors)["b"].tolist() == [1, 1, 1, 1, 1]


def test_a_checkpoint_is_written_from_its_own_moment_while_the_tensors_go_on(tmp_path):
    """The next save uses the memory again only when this one is on the disk."""
    complete, tensors = [], {"a": torch.zeros(1 << 20)}
    saver = Saver(None, behind=True, done=complete.append, warn=print)
    for step in range(1, 6):
        tensors["a"].fill_(step)
        saver.save(tmp_path / f"step_{step:08d}", tensors, RunState(step=step), lambda path: None, must=False)
        tensors["a"].fill_(-1)
    saver.wait()
    assert [path.name for path in complete] == [f"step_{step:08d}" for step in range(1, 6)]
    for step, path in enumerate(complete, start=1):
        (shard,) = path.glob("*.safetensors")
        assert (load_file(shard)["a"] == step).all()


def test_the_copies_memory_is_there_before_the_first_save(tmp_path):
    """And what was in it then is in no checkpoint."""
    tensors, asked = {"a": torch.zeros(1 << 20)}, []
    saver = Saver(None, behind=True, done=lambda path: None, warn=print)
    for _ in range(3):
        saver.prepare(lambda: asked.append(1) or tensors)
    saver.wait()
    memory = saver._copies.of(tensors)["a"]
    tensors["a"].fill_(5)
    saver.save(tmp_path / "step_00000001", tensors, RunState(), lambda path: None, must=False)
    saver.wait()
    (shard,) = (tmp_path / "step_00000001").glob("*.safetensors")
    assert (load_file(shard)["a"] == 5).all()
    assert (memory == 5).all(), "copied into what was there"
    assert asked == [1]
    waiting = Saver(None, behind=False, done=lambda path: None, warn=print)
    waiting.prepare(lambda: asked.append(1) or tensors)
    assert asked == [1], "who waits copies nothing"
