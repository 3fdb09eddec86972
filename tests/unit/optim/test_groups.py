"""Which values of the optimizer hold for which parameters."""

import pytest
import torch
from torch import nn

from tests.training import tiny
from txtrain.errors import ConfigError
from txtrain.optim.config import AdamConfig, Depths, GroupConfig, MuonConfig
from txtrain.optim.groups import check_patterns, parameter_groups, set_rates
from txtrain.registry import TABLE, make
from txtrain.training.module import LitModule


def named(groups, model):
    """Name -> the values of the group that it is in."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: {key: value for key, value in group.items() if key != "params"} for group in groups for p in group["params"]}


def test_norms_biases_and_embeddings_are_not_decayed(tmp_path):
    module = LitModule(tiny(tmp_path, "model=gpt2", "model.n_layers=1", "optimizer.weight_decay=0.3"))
    groups = parameter_groups(module.model.named_parameters(), module.config.optimizer)
    found = named(groups, module.model)
    assert len(groups) == 2
    assert found.keys() == {name for name, _ in module.model.named_parameters()}
    for name, p in module.model.named_parameters():
        exempt = any(word in name for word in ("norm", "bias", "embedding"))
        assert found[name]["weight_decay"] == (0.0 if exempt else 0.3), name
        assert exempt or p.ndim == 2


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model.named_parameters(), AdamConfig(type="adamw"))
    assert group["params"] == [model.weight]


def test_of_several_patterns_the_last_that_gives_a_value_holds():
    config = AdamConfig(
        type="adamw",
        lr=1.0,
        weight_decay=0.5,
        groups=(
            GroupConfig(pattern="blocks", lr_scale=0.1, weight_decay=0.3),
            GroupConfig(pattern=r"blocks\.0\.", lr_scale=0.01),
            GroupConfig(pattern="norm", weight_decay=0.2),
        ),
    )
    rate = {name: config.settings(name, (2, 2), Depths(0, 2)) for name in ("blocks.0.proj", "blocks.1.proj", "blocks.0.norm", "head", "final_norm")}
    assert {name: (s["peak_lr"], s["weight_decay"]) for name, s in rate.items()} == {
        "blocks.0.proj": (0.01, 0.3),
        "blocks.1.proj": (0.1, 0.3),
        "blocks.0.norm": (0.01, 0.2),
        "head": (1.0, 0.5),
        "final_norm": (1.0, 0.2),
    }


def test_rates_keep_their_ratio_at_every_step(tmp_path):
    groups = "optimizer.groups=[{pattern: embedding, lr_scale: 0.1}, {pattern: final_norm, lr_scale: 0.0}]"
    module = LitModule(tiny(tmp_path, groups, "optimizer.lr=0.5"))
    optimizer = make("optimizer", module.config.optimizer, params=parameter_groups(module.model.named_parameters(), module.config.optimizer))
    for share in (0.25, 1.0):
        set_rates(optimizer, share)
        found = named(optimizer.param_groups, module.model)
        assert {name: values["lr"] for name, values in found.items()} == {
            name: pytest.approx(0.5 * share * (0.1 if "embedding" in name else 0 if name.startswith("final_norm") else 1)) for name in found
        }


def test_muon_has_the_matrices_of_hidden_layers_and_adamw_the_rest_at_its_own_rate(tmp_path):
    overrides = ("model=deepseek_r1", "model.n_layers=2", "model.dim=32", "model.n_heads=2", "data=text", "data.tokenizer=bytes", "optimizer=muon")
    module = LitModule(tiny(tmp_path, *overrides, "optimizer.adamw_lr=0.003", "optimizer.lr=0.02"))
    found = named(parameter_groups(module.model.named_parameters(), module.config.optimizer), module.model)
    for name, p in module.model.named_parameters():
        hidden = p.ndim >= 2 and not name.startswith(("embedding", "head"))
        assert (found[name]["use_muon"], found[name]["peak_lr"]) == (hidden, 0.02 if hidden else 0.003), name
    assert any(p.ndim == 3 and found[name]["use_muon"] for name, p in module.model.named_parameters()), "experts are stacks of matrices"
    assert not found["embedding.token.weight"]["use_muon"]
    assert MuonConfig(type="muon", lr=0.02).settings("final_norm.weight", (32,), Depths(0, 2))["peak_lr"] == 0.02


def test_a_pattern_that_is_in_no_name_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(ConfigError, match=r"`optimizer\.groups\[1\]\.pattern` must be found .* 'embeding' is in none of \d+\. Did you mean embedding\?"):
        LitModule(tiny(tmp_path, "optimizer.groups=[{pattern: norm, weight_decay: 0.1}, {pattern: embeding, lr_scale: 0.1}]"))
    with pytest.raises(ConfigError, match=r"'xyz' is in none of 2\. The first is weight"):
        check_patterns(["weight", "bias"], AdamConfig(type="adamw", groups=(GroupConfig(pattern="xyz", lr_scale=1.0),)))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.groups=[{pattern: '(', lr_scale: 0.1}]", r"`optimizer\.groups\[0\]\.pattern` must be regular expressions"),
        ("optimizer.groups=[{pattern: norm}]", r"`optimizer\.groups\[0\]` must give lr_scale, weight_decay or both"),
        ("optimizer.groups=[{lr_scale: 0.1}]", r"`optimizer\.groups\[0\]\.pattern` must be given"),
        ("optimizer.groups=[{pattern: norm, lr_scale: -1}]", r"`optimizer\.groups\[0\]\.lr_scale` must be at least 0 or null, but is -1"),
        ("optimizer.groups=[{pattern: norm, lr_scales: 1}]", r"Did you mean optimizer\.groups\[0\]\.lr_scale\?"),
        ("optimizer.param_groups=[]", r"Did you mean optimizer\.groups\?"),
        ("optimizer=adafator", r"`optimizer=adafator` must be one of .*Did you mean optimizer=adafactor\?"),
        ("optimizer=lion optimizer.eps=1", "has no key eps"),
        ("optimizer=muon optimizer.adjust_lr_fn=orginal", "Did you mean original"),
        ("optimizer=muon optimizer.momentum=1.0", r"`optimizer\.momentum` must be at least 0 and below 1, but is 1\.0"),
        ("optimizer=muon optimizer.ns_steps=0", r"`optimizer\.ns_steps` must be at least 1 and at most 99, but is 0"),
        ("optimizer=muon optimizer.adamw=['[']", r"`optimizer\.adamw` must be regular expressions"),
        ("optimizer=muon optimizer.adamw_lr=-1", r"`optimizer\.adamw_lr` must be at least 0 or null"),
        ("optimizer=adafactor optimizer.beta2_decay=0", r"`optimizer\.beta2_decay` must be above 0"),
        ("optimizer=adafactor optimizer.clip_threshold=0", r"`optimizer\.clip_threshold` must be above 0"),
        ("optimizer=adafactor optimizer.beta1=1", r"`optimizer\.beta1` must be at least 0 and below 1, or null, but is 1\.0"),
        ("optimizer=adafactor optimizer.eps=[-1,1]", r"`optimizer\.eps\[0\]` must be at least 0, but is -1\.0"),
        ("scheduler=inverse_sqrt scheduler.decay_steps=3", "Only scheduler=wsd has it"),
        ("ema.decay=1", r"`ema\.decay` must be at least 0 and below 1, or null, but is 1"),
        ("ema.validate=true", r"`ema\.validate` must be false without an average"),
        ("ema.decay=0.9 ema.every_n_steps=0", r"`ema\.every_n_steps` must be at least 1"),
    ],
)
def test_mistakes_are_told(tmp_path, override, says):
    words = override.split(" ") if "[{" not in override else [override]
    with pytest.raises(ConfigError, match=says):
        tiny(tmp_path, *words)


SHAPES = {"proj.weight": (6, 4), "experts": (3, 4, 5), "norm.weight": (7,), "embedding.weight": (9, 4), "patch.embedding": (4, 1, 2, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "knobs", [{"type": "adamw"}, {"type": "adam"}, {"type": "lion"}, {"type": "muon"}, {"type": "adafactor"}, {"type": "adafactor", "beta1": 0.9}]
)
def test_the_bytes_of_the_state_are_those_that_are_kept(knobs, dtype):
    config = TABLE["optimizer"][knobs["type"]].config(**knobs)
    parameters = {name: nn.Parameter(torch.ones(shape, dtype=dtype)) for name, shape in SHAPES.items()}
    optimizer = make("optimizer", config, params=parameter_groups(parameters.items(), config))
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert config.state_bytes(SHAPES, bytes_per_value=dtype.itemsize) == held


def test_an_optimizer_of_ones_own_has_a_state_of_unknown_size():
    from txtrain.optim.config import OptimizerConfig

    assert OptimizerConfig(type="mine").state_bytes(SHAPES) is None


def test_each_layer_below_the_head_has_a_smaller_rate(tmp_path):
    """ELECTRA's and BEiT's rule: 0 for embeddings, i + 1 for block i, n + 1 above."""
    module = LitModule(tiny(tmp_path, "model=gpt2", "model.n_layers=3", "optimizer.lr=1.0", "optimizer.layer_decay=0.5"))
    found = named(parameter_groups(module.model.named_parameters(), module.config.optimizer), module.model)
    rates = {name: values["peak_lr"] for name, values in found.items()}
    assert rates["embedding.token.weight"] == rates["position.embedding.weight"] == 0.5**4
    assert [rates[f"blocks.{i}.ffn.up_proj.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["final_norm.weight"] == 1.0


def test_a_decoder_is_above_its_encoder():
    names = ["embedding.token.weight", "encoder.blocks.0.x", "encoder.blocks.1.x", "encoder.final_norm.weight", "blocks.0.x", "head.weight"]
    depths = Depths.of(names)
    assert [depths.below_head(name) for name in names] == [4, 3, 2, 2, 1, 0]
    assert depths.below_head("encoder.position.embedding.weight") == 4
