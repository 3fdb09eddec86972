"""The families and sizes: published counts, what a laptop preset must allow."""

import math
import re

import pytest
from omegaconf import OmegaConf

import txtrain
from tests.cases import some
from tests.compose.conftest import ROOT
from txtrain.config.paths import CONF
from txtrain.ground.convert import plain

PUBLISHED = {
    "gpt1_base": 116_534_784,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "mistral_7b": 7_241_732_096,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "transformer_base": 63_082_496,  # the paper rounds to 65 M, the next one to 213 M
    "transformer_big": 214_245_376,
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "vit_h14": 632_045_800,
    "deepseek_r1_671b": 671_026_404_352,  # without the module that predicts a second token, as it is told
}
LAPTOP = ["gpt1", "gpt2", "llama2", "mistral", "gemma", "gemma2", "transformer", "bert", "t5", "t5_v1_1", "vit", "deepseek_r1"]


def test_the_families_are_those_tested_here():
    assert sorted(txtrain.families()) == sorted([*LAPTOP, *PUBLISHED])


# Of the others test_yaml.py counts what `published` tells, which is this table (below).
@pytest.mark.parametrize("name", some(PUBLISHED, ("gpt2_small", "gemma2_27b", "t5_11b", "deepseek_r1_671b")))
def test_published_size_has_the_published_number_of_parameters(name, job):
    model = job(f"model={name}").config.model
    assert model.n_params - model.n_params_by_part()["mtp"] == PUBLISHED[name]
    assert name == f"{model.family}_{model.size}"


@pytest.mark.parametrize("name", LAPTOP)
def test_laptop_size_knows_its_published_ones_and_no_ancestors(name, job):
    model = job(f"model={name}").config.model
    assert (model.family, model.size) == (name, "laptop")
    assert model.published == {n: count for n, count in PUBLISHED.items() if n.rpartition("_")[0] == name}
    assert 1e6 < model.n_params < 20e6


@pytest.mark.parametrize("name", some(LAPTOP, ("gpt2", "mistral", "transformer", "deepseek_r1")))
def test_laptop_size_shrinks_to_four_heads_on_64(name, job):
    model = job(f"model={name}", "model.n_heads=4", "model.dim=64").config.model
    assert getattr(model.attention, "n_kv_heads", None) in (None, 1, 2)
    assert model.attention.rotary_dim(model) % 2 == 0


@pytest.mark.parametrize("name", txtrain.families())
def test_file_opens_with_its_delta(name):
    first = (CONF / "model" / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(r"# .+ = .+", first), first


def told_in_the_documentation() -> list[tuple[str, str]]:
    """Family and YAML of each section of docs/families.md."""
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    return re.findall(r"^## [^\n]*: `(\w+)`[^\n]*\n.*?```yaml\n(.*?)```", page, re.DOTALL | re.MULTILINE)


def test_the_documentation_has_every_family():
    assert sorted(family for family, _ in told_in_the_documentation()) == sorted(set(LAPTOP) - {"t5_v1_1"})  # in T5's section


@pytest.mark.parametrize(("family", "text"), told_in_the_documentation())
def test_what_the_documentation_says_of_a_family_is_so(family, text, job):
    config = plain(job(f"model={family}").config.model)
    told = OmegaConf.to_container(OmegaConf.create(text))  # which reads 1e-6 as a number
    chosen = {key.removeprefix("override "): option for d in told.pop("defaults") if isinstance(d, dict) for key, option in d.items()}
    assert {axis: config[axis]["type"] for axis in chosen} == chosen
    for key, value in told.items():
        got = {k: config[key][k] for k in value} if isinstance(value, dict) else config[key]
        assert got == value, f"{family}: {key}"


def test_what_the_papers_say(job):
    gpt1, gpt2, llama2, mistral, gemma, gemma2, transformer, bert, t5, t5_v1_1, vit, deepseek_r1 = (job(f"model={name}").config.model for name in LAPTOP)
    assert (gpt1.norm_position, gpt1.has_final_norm, gpt1.dropout, gpt1.init.scale_residual) == ("post", False, 0.1, False)
    assert (gpt2.norm_position, gpt2.has_final_norm, gpt2.dropout, gpt2.init.scale_residual) == ("pre", True, 0.0, True)
    assert (llama2.tie_word_embeddings, llama2.attention.bias, llama2.ffn.bias, llama2.norm.eps) == (False, False, False, 1e-5)
    assert (llama2.init.scale_residual, llama2.init.position_std) == (False, None)
    assert (mistral.attention.type, mistral.attention.n_kv_heads, mistral.attention.window) == ("gqa", 2, 64)
    assert (gemma.embedding.scale, gemma.norm.unit_offset, gemma.norm.eps, gemma.ffn.activation) == (True, True, 1e-6, "gelu_tanh")
    assert (gemma2.norm_position, gemma2.attention.window, gemma2.attention.softcap, gemma2.logit_softcap) == ("sandwich", (64, None), 50.0, 30.0)
    assert job("model=gemma2_27b").config.model.attention.scale == pytest.approx(144**-0.5, rel=1e-15)
    assert (transformer.norm_position, transformer.has_final_norm, transformer.embedding.scale, transformer.ffn.activation) == ("post", False, True, "relu")
    assert (transformer.dropout, transformer.attention.dropout, transformer.share_embeddings, transformer.tie_word_embeddings) == (0.1, 0.0, True, True)
    assert (bert.norm.eps, bert.embedding.norm, bert.embedding.n_types, bert.head.type, bert.ffn.activation) == (1e-12, True, 2, "mlm", "gelu")
    assert (t5.attention.scale, t5.head.scale, t5.tie_word_embeddings, t5.ffn.activation, t5.ffn.bias) == (1.0, True, True, "relu", False)
    assert (t5_v1_1.attention.scale, t5_v1_1.head.scale, t5_v1_1.tie_word_embeddings, t5_v1_1.ffn.type) == (1.0, False, False, "geglu")
    assert (t5.position.n_buckets, t5.position.max_distance, t5.norm.eps, t5.attention.bias) == (32, 128, 1e-6, False)
    assert (vit.norm_position, vit.has_final_norm, vit.head.type, vit.embedding.type, vit.embedding.norm) == ("pre", True, "class", "patch", False)
    assert (deepseek_r1.attention.type, deepseek_r1.ffn.type, deepseek_r1.ffn.gate, deepseek_r1.ffn.aux_weight) == ("mla", "moe", "sigmoid", 0.0)
    assert (deepseek_r1.ffn.bias_update_rate, deepseek_r1.norm.eps, deepseek_r1.mtp_depth) == (1e-3, 1e-6, 1)


def test_what_deepseek_r1_671b_costs(job):
    model = job("model=deepseek_r1_671b").config.model
    assert round(model.n_active_params / 1e9) == 38, "published as 37 B, without the embedding"
    assert model.cache_bytes(1) == 61 * (512 + 64) * 2
    assert model.attention.arguments(model)["scale"] == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
