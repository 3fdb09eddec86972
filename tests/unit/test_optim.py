import math

import pytest
import torch
from torch import nn

from tests.training import tiny
from txtrain.config import AdamConfig, SchedulerConfig
from txtrain.errors import ConfigError
from txtrain.module import LitModule
from txtrain.optim import parameter_groups
from txtrain.registry import make


def schedule(kind, total=100, **knobs):
    return make("scheduler", SchedulerConfig(type=kind, **knobs), total_steps=total)


def test_schedules_have_the_values_of_their_definitions():
    constant, linear, cosine = (schedule(kind, warmup_steps=10, min_lr_ratio=0.1) for kind in ("constant", "linear", "cosine"))
    for each in (constant, linear, cosine):
        assert [each(1), each(5), each(10)] == [0.1, 0.5, 1.0]
    assert constant(100) == 1.0
    assert linear(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine(40) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert linear(100) == cosine(100) == pytest.approx(0.1)
    assert cosine(101) == pytest.approx(0.1), "beyond the last step the rate must not rise again"


def test_a_schedule_without_warm_up_or_shorter_than_it_is_defined():
    assert schedule("cosine", total=4)(4) == pytest.approx(0)
    assert schedule("linear", total=5, warmup_steps=50)(5) == 0.1


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_that_needs_the_end_says_so(kind):
    with pytest.raises(ConfigError, match=f"is {kind} instead"):
        schedule(kind, total=None)
    assert schedule("constant", total=None)(10**6) == 1.0


def test_norms_biases_and_embeddings_are_not_decayed(tmp_path):
    module = LitModule(tiny(tmp_path, "model=gpt2", "model.n_layers=1", "optimizer.weight_decay=0.3"))
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    decayed, exempt = parameter_groups(module.model.named_parameters(), 0.3, module.config.optimizer.no_decay)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(any(word in names[p] for word in ("norm", "bias", "embedding")) or "position" in names[p] for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model.named_parameters(), 0.1, ["bias"])
    assert group["params"] == [model.weight]


@pytest.mark.parametrize(("kind", "reference"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_optimizers_equal_torch_and_are_fused(kind, reference):
    config = AdamConfig(type=kind, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    values = []
    for build in (lambda p: make("optimizer", config, params=[{"params": p, "weight_decay": 0.2}]), lambda p: reference(p, 0.1, (0.8, 0.9), 1e-6, 0.2)):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = build([parameter])
        for _ in range(3):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5])
            optimizer.step()
        values.append(parameter.detach())
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    assert make("optimizer", config, params=[{"params": [nn.Parameter(torch.ones(3))]}]).defaults["fused"] is True
