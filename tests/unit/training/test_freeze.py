"""`freeze=`: what is not trained stays as it was to the bit, and costs nothing."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import txtrain
from tests.models import ids, seeded
from tests.models import tiny as tiny_model
from tests.training import rows, tiny, weights
from txtrain.checkpoint.load import load
from txtrain.errors import ConfigError
from txtrain.model.init import init_weights
from txtrain.model.transform import Freeze, Transform, transform
from txtrain.monitor import start_screen
from txtrain.training.batches import seed_everything
from txtrain.training.models_read import described
from txtrain.training.module import LitModule
from txtrain.training.run import train

FROZEN = "freeze=[embedding,blocks.0]"
EMA = "ema.decay=0.9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("freeze")


def run(folder, name, *overrides):
    """tiny's, of 8 steps; the folder of an earlier one of that name where it is there."""
    return train(tiny(folder, "trainer.max_steps=8", "scheduler=constant", f"run_dir={folder / name}", EMA, *overrides)).run_dir


@pytest.fixture(scope="module")
def whole(folder):
    return run(folder, "whole", FROZEN)


def is_frozen(name):
    return "embedding" in name or "blocks.0" in name


def test_frozen_weights_stay_and_all_others_move(folder, whole):
    config = tiny(folder)
    model = described(config)
    seed_everything(config.seed)
    model.to_empty(device="cpu")
    init_weights(model)
    saved = weights(whole)
    for name, parameter in model.named_parameters():
        same = saved[f"model.{name}"] == parameter.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert same == is_frozen(name), name


def test_a_checkpoint_holds_all_weights_and_of_the_trained_ones_state_and_average(whole):
    names = {kind: {name.split(".", 1)[1] for name in weights(whole) if name.startswith(f"{kind}.")} for kind in ("model", "optimizer", "ema")}
    trained = {name for name in names["model"] if not is_frozen(name)}
    assert names["ema"] == trained != names["model"]
    assert names["optimizer"] == {f"{name}.{key}" for name in trained for key in ("exp_avg", "exp_avg_sq", "step")}


def test_the_run_says_how_much_of_it_is_trained(folder, whole):
    model, facts = described(tiny(folder)), json.loads((whole / "run.json").read_text())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert facts["parameters"] == sum(sizes.values())
    assert facts["trained_parameters"] == (n := sum(n for name, n in sizes.items() if not is_frozen(name)))
    assert txtrain.plan(tiny(folder, FROZEN)).n_trained_params == n


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit_and_says_what_it_trains(folder, whole, capsys):
    parts = run(folder, "parts", FROZEN, "trainer.max_steps=5")
    facts = json.loads((whole / "run.json").read_text())
    assert start_screen.trained(facts["trained_parameters"], facts["parameters"]) in " ".join(capsys.readouterr().out.split())
    assert run(folder, "parts", FROZEN) == parts
    assert weights(parts) == weights(whole)
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize("more", ["freeze=[]", "freeze=[attention]", "freeze=[embedding,blocks.0,ffn]", "freeze=[blocks.1,head,final_norm]"])
def test_a_resume_that_freezes_something_else_is_refused_unless_allowed_and_a_fork_may(folder, whole, more):
    """What is thawed starts without a state, and from its weights in the average."""
    with pytest.raises(ConfigError, match="`freeze` must be"):
        train(tiny(folder, EMA, f"run_dir={whole}", "trainer.max_steps=9", more))
    forked = run(folder, f"fork {more}", f"fork={whole}", "trainer.max_steps=10", more)
    before, after = weights(whole), weights(forked)
    stays = Freeze(tuple(more[8:-1].split(",")) if more[8:-1] else ())
    for name in (name for name in after if name.startswith("model.")):
        assert (before[name] == after[name]) == (not stays.trains(name)), name
        assert (f"ema.{name.removeprefix('model.')}" in after) == stays.trains(name), name


def test_it_may_change_by_name(folder):
    run(folder, "thawed", FROZEN, "trainer.max_steps=2")
    thawed = run(folder, "thawed", "trainer.max_steps=4", "resume_allow=[freeze]")
    assert any(name.startswith("optimizer.blocks.0") for name in weights(thawed))


def test_a_checkpoint_of_a_run_that_froze_generates(whole):
    loaded, saved = load(whole).model, weights(whole)
    for name, parameter in loaded.named_parameters():
        assert saved[f"model.{name}"] == parameter.detach().reshape(-1).view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("[embeding]", r"`freeze\[0\]` must be found .* 'embeding' is in none of \d+\. Did you mean embedding\?"),
        ("[attention,nothing]", r"`freeze\[1\]` must be found"),
        ("[.]", r"`freeze` must leave a parameter to be trained, but \['\.'\] has all \d+"),
        ("['(']", "`freeze` must be regular expressions"),
    ],
)
def test_a_mistyped_pattern_is_told_before_anything_is_written(folder, pattern, told):
    with pytest.raises(ConfigError, match=told):
        train(tiny(folder, f"run_dir={folder / 'none'}", f"freeze={pattern}"))
    with pytest.raises(ConfigError, match=told):
        txtrain.plan(tiny(folder, f"freeze={pattern}"))
    assert not (folder / "none").exists()


class Doubled(Transform):
    """Of a user's own: what follows the model's description sees what it made of it."""

    def apply(self, model):
        for block in model.blocks:
            block.ffn.extra = torch.nn.Linear(4, 4, bias=False, device="meta")


def test_transforms_are_applied_one_after_the_other(folder):
    model = described(tiny(folder))
    transform(model, [Doubled(), Freeze(("extra",))])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {f"blocks.{i}.ffn.extra.weight" for i in range(2)}


def test_a_given_model_is_frozen_too(folder):
    config = tiny(folder, FROZEN)
    module = LitModule(config, txtrain.build_model(config.model))
    assert all(p.requires_grad != is_frozen(name) for name, p in module.model.named_parameters())
    assert len([p for group in module.parameter_groups() for p in group["params"]]) == sum(p.requires_grad for p in module.model.parameters())


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(["embedding", "attention", "ffn", r"blocks\.0", "norm", r"^head"]), min_size=1, max_size=4))
def test_gradients_of_what_is_trained_are_those_of_a_run_without_frozen_weights(patterns):
    model = seeded(tiny_model(tie_word_embeddings=False))
    batch = ids(2, 8)

    def gradients():
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    whole = gradients()
    transform(model, [Freeze(tuple(patterns))])
    for name, gradient in gradients().items():
        if Freeze(tuple(patterns)).trains(name):
            assert gradient.equal(whole[name]), name
        else:
            assert gradient is None, name
