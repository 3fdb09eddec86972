"""The graft rule: what a swap keeps and drops. Regenerate the golden file with TXTRAIN_UPDATE_GOLDEN=1."""

import os
from itertools import product

import pytest

from tests.compose.conftest import ROOT
from tests.compose.test_families import LAPTOP
from txtrain.errors import ConfigError
from txtrain.registry import TABLE

GRAFTED = ("attention", "ffn", "position", "norm")  # embedding and head follow from what a model reads and says
GOLDEN = ROOT / "tests/golden/grafts.txt"


def told(axis, graft):
    kept, dropped = (", ".join(f"{k}={v}" for k, v in graft[part].items()) or "-" for part in ("kept", "dropped"))
    return f"{axis}: {graft['from']} -> {graft['to']}; kept {kept}; dropped {dropped}"


@pytest.mark.slow
def test_every_single_swap_is_legal_and_keeps_and_drops_what_the_golden_file_says(job):
    lines = []
    keys = [*((f"model/{axis}", axis) for axis in GRAFTED), ("model.norm_position", "norm_position")]
    for family, (key, axis) in product(LAPTOP, keys):
        for option in TABLE[axis]:
            composed = job(f"model={family}", f"{key}={option}")
            grafts, got = composed.grafts, getattr(composed.config.model, axis)
            assert getattr(got, "type", got) == option
            lines += [f"{family:<12}{told(name, graft)}" for name, graft in grafts.items()]
    if os.environ.get("TXTRAIN_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text("\n".join(lines) + "\n")
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


def test_a_family_by_itself_is_no_graft(job):
    for family in LAPTOP:
        assert job(f"model={family}").grafts == {}


def test_naming_the_familys_own_option_changes_nothing(job):
    assert job("model=mistral", "model/attention=gqa", "model/ffn=swiglu").config == job("model=mistral").config


def test_options_of_one_class_keep_all_but_what_their_files_set(job):
    swapped = job("model=gemma2", "model/attention=mqa")
    attention = swapped.config.model.attention
    assert (attention.type, attention.n_kv_heads, attention.window, attention.softcap) == ("mqa", 1, (64, None), 50.0)
    assert swapped.grafts["attention"]["dropped"] == {"n_kv_heads": 2}
    assert job("model=mistral_7b", "model/attention=mha").config.model.attention.n_kv_heads is None


def test_a_swap_takes_the_new_options_own_activation(job):
    swapped = job("model=gpt2", "model/ffn=swiglu")
    assert (swapped.config.model.ffn.activation, swapped.config.model.ffn.bias) == ("silu", True)
    assert swapped.grafts["ffn"] == {"from": "mlp", "to": "swiglu", "kept": {"bias": True}, "dropped": {"activation": "gelu_tanh"}}


def test_a_width_carries_only_between_ffns_of_as_many_matrices(job):
    assert job("model=llama2_7b", "model/ffn=geglu").config.model.ffn.hidden_dim == 11008
    assert job("model=llama2_7b", "model/ffn=mlp").config.model.ffn.hidden_dim is None


def test_what_a_family_lost_by_its_own_graft_does_not_come_back(job, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/wide.yaml").write_text("defaults: [gpt2, _self_]\nfamily: wide\nffn: {hidden_dim: 1000}\n")
    (tmp_path / "model/gated.yaml").write_text("defaults: [wide, _self_, override ffn: swiglu]\nfamily: gated\n")
    back = job("model=gated", "model/ffn=mlp", config_dir=tmp_path)
    assert back.config.model.ffn.hidden_dim is None
    assert back.grafts["ffn"] == {"from": "swiglu", "to": "mlp", "kept": {"bias": True}, "dropped": {}}


def test_the_command_line_wins_and_is_checked_against_the_new_option(job):
    assert job("model=mistral", "model/attention=mha", "model.attention.window=8").config.model.attention.window == 8
    with pytest.raises(ConfigError, match="Only model/position=rope has it"):
        job("model=mistral", "model/position=alibi", "model.position.scaling=null")
    with pytest.raises(ConfigError, match=r"`model\.attention\.n_kv_heads` must be 1"):
        job("model=mistral", "model/attention=mqa", "model.attention.n_kv_heads=2")


def test_a_moved_norm_is_reported(job):
    assert job("model=gemma2", "model.norm_position=pre").grafts == {"norm_position": {"from": "sandwich", "to": "pre", "kept": {}, "dropped": {}}}


def test_a_recipe_is_one_more_layer(job, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/own.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: mistral, override /model/ffn: mlp]\nmodel: {ffn: {hidden_dim: 100}, attention: {window: null}}\n"
    )
    own = job("recipe=own", config_dir=tmp_path)
    assert (own.config.model.ffn.hidden_dim, own.config.model.attention.window) == (100, None)
    assert (own.grafts["ffn"]["from"], own.grafts["ffn"]["to"]) == ("swiglu", "mlp")
    back = job("recipe=own", "model/ffn=swiglu", config_dir=tmp_path)
    assert back.config.model.ffn == job("model=mistral").config.model.ffn
    assert back.grafts["ffn"] == {"from": "mlp", "to": "swiglu", "kept": {}, "dropped": {"hidden_dim": 100}}
    assert job("recipe=own", "model=llama2", config_dir=tmp_path).config.model.ffn.type == "mlp"


def test_type_is_written_only_in_an_options_own_file(job, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/sly.yaml").write_text("# @package _global_\nmodel: {attention: {type: mqa}}\n")
    with pytest.raises(ConfigError, match="write model/attention=mqa"):
        job("recipe=sly", config_dir=tmp_path)


def test_a_presets_knobs_are_its_own_mechanism_and_change_no_other_swap(job, tmp_path):
    (tmp_path / "model/attention").mkdir(parents=True)
    (tmp_path / "model/attention/narrow.yaml").write_text("type: gqa\nn_kv_heads: 1\nwindow: 16\n")
    assert job("model=mistral", "model/attention=narrow", config_dir=tmp_path).config.model.attention.window == 16
    assert job("model=mistral", "model/attention=mqa", config_dir=tmp_path).config.model.attention.window == 64
