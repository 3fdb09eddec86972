import random

import numpy as np
import torch

import txtrain
from tests.training import tiny
from txtrain.data.samples.packed import PackedSamples
from txtrain.objectives.causal_lm import CausalLM
from txtrain.training.batches import cut, seed_everything
from txtrain.training.module import LitModule


def test_a_module_is_described_without_storage(tmp_path):
    module = LitModule(tiny(tmp_path))
    assert all(p.is_meta for p in module.model.parameters())
    module.configure_model()
    once = [p.clone() for p in module.model.parameters()]
    module.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(once, module.model.parameters(), strict=True)), "initialised twice"


def test_the_same_seed_gives_the_same_weights_whatever_came_before(tmp_path):
    made = []
    for _ in range(2):
        torch.rand(3)
        module = LitModule(tiny(tmp_path))
        module.configure_model()
        made.append(module.model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_each_step_and_each_process_has_random_numbers_of_its_own():
    def draws(*place):
        seed_everything(*place)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    assert draws(1, 5, 0) == draws(1, 5, 0)
    different = [draws(*place) for place in ((1, None, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0))]
    for numbers in zip(*different, strict=True):
        assert len(set(numbers)) == len(different)


def test_a_batch_is_cut_without_loss():
    batch = {"a": torch.arange(10).view(5, 2), "b": torch.arange(5)}
    parts = list(cut(batch, 2))
    assert [len(part["b"]) for part in parts] == [2, 2, 1]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)


def test_validation_is_weighted_by_targets_and_counts_bytes(tmp_path, monkeypatch):
    """One batch with 3 targets of loss 1 and one with a single target of loss 5: the mean is 2, not 3."""
    module = LitModule(tiny(tmp_path))
    module._token_bytes = torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    labels = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, -100, -100, 3]])
    per_token = iter((1.0, 5.0))
    monkeypatch.setattr(CausalLM, "__call__", lambda self, model, batch, n: {"loss": next(per_token) * self.denominators(batch)["loss"] / n["loss"]})
    module.on_validation_epoch_start()
    for batch in labels:
        module.validation_step({"labels": batch}, 0)
    module.on_validation_epoch_end()
    assert module.val_metrics["val_loss"] == 2.0
    assert module.val_metrics["perplexity"] == np.exp(2.0)
    assert module.val_metrics["bits_per_byte"] == 8 / np.log(2) / (1 + 2 + 3 + 3)


def test_a_step_without_a_target_has_loss_0(tmp_path, monkeypatch):
    def nothing(self, rows, draws=None):
        return {"input_ids": torch.zeros(len(rows), 32, dtype=torch.long), "labels": torch.full((len(rows), 32), -100)}

    monkeypatch.setattr(PackedSamples, "batch", nothing)
    made = txtrain.train(tiny(tmp_path, "trainer.fast_dev_run=2"))
    assert (made.metrics["loss"], made.metrics["val_loss"]) == (0.0, 0.0)


def test_wrapping_blocks_renames_nothing(tmp_path):
    from txtrain.model.block import Block
    from txtrain.parallel.activation_checkpointing import wrap_blocks

    module = LitModule(tiny(tmp_path))
    module.configure_model()
    names = list(module.model.state_dict())
    wrap_blocks(module.model, "full", compiled=True)
    assert list(module.model.state_dict()) == names
    assert all("forward" in vars(m) for m in module.model.modules() if isinstance(m, Block))
