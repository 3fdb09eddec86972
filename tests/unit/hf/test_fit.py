"""Weights that start a model which differs from theirs."""

import dataclasses as dc

import pytest
import torch
import torch.nn.functional as F

from tests.models import seeded, shake, tiny
from txtrain import compose
from txtrain.errors import ConfigError
from txtrain.hf.fit import fitted
from txtrain.hf.load import open_folder
from txtrain.hf.pieces import fill
from txtrain.hf.save import save_pretrained
from txtrain.model import options


def started(source, config, allowed=()):
    """What a run does before its first step, and what it says of the weights."""
    model = seeded(config, seed=5)
    source, fit = fitted(source, model, config, allowed)
    fill(model.state_dict(), source.pieces)
    return model.state_dict(), fit


def saved(config, folder):
    model = shake(seeded(config))
    save_pretrained(model, folder)
    return model.state_dict()


def small(family, *given):
    return compose([f"model={family}", "model.n_layers=2", "model.dim=32", "model.n_heads=4", "data.path=x", *given]).model


BYTES = ("data=text", "data.tokenizer=bytes", "model.max_seq_len=16")
KINDS = {  # tables with a row for each token
    "llama2": {"embedding.token.weight", "head.weight"},
    "gpt2": {"embedding.token.weight"},
    "bert": {"embedding.token.weight", "head.bias"},
    "t5": {"embedding.token.weight"},
}


@pytest.mark.parametrize("family", KINDS)
def test_new_tokens_start_at_the_mean_of_the_old_ones(family, tmp_path):
    config = small(family, *BYTES, "model.vocab_size=61")
    before = saved(config, tmp_path)
    after, fit = started(open_folder(tmp_path), dc.replace(config, vocab_size=70))
    assert set(fit.resized) == KINDS[family]
    assert not fit.initialised
    assert not fit.skipped
    for name, tensor in after.items():
        if name not in KINDS[family]:
            assert torch.equal(tensor, before[name]), name
            continue
        assert torch.equal(tensor[:61], before[name]), name
        mean = before[name].double().mean(0).float()
        assert torch.equal(tensor[61:], mean.expand(9, *mean.shape)), name


def test_longer_learned_positions_are_interpolated_and_shorter_ones_are_the_first(tmp_path):
    config = small("gpt2", *BYTES, "model.vocab_size=61")
    table = saved(config, tmp_path)["position.embedding.weight"]
    longer, fit = started(open_folder(tmp_path), dc.replace(config, max_seq_len=31))
    assert fit.resized == {"position.embedding.weight": ((16, 32), (31, 32))}
    torch.testing.assert_close(longer["position.embedding.weight"][::2], table, rtol=1e-6, atol=1e-6)
    between = (table[1:] + table[:-1]) / 2
    torch.testing.assert_close(longer["position.embedding.weight"][1::2], between, rtol=1e-6, atol=1e-6)
    shorter, _ = started(open_folder(tmp_path), dc.replace(config, max_seq_len=7))
    assert torch.equal(shorter["position.embedding.weight"], table[:7])


def vit(side):
    return small("vit", "data=images", f"model.embedding.image_size={2 * side}", f"model.max_seq_len={side**2 + 1}")


def test_positions_of_another_image_size_are_those_of_transformers(tmp_path):
    """ViT's own `interpolate_pos_encoding`, written out: bicubic over the patches, the class token's vector stays."""
    table = saved(vit(4), tmp_path)["position.embedding.weight"]
    after, fit = started(open_folder(tmp_path), vit(6))
    assert list(fit.resized) == ["position.embedding.weight"]
    patches = table[None, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = F.interpolate(patches, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).view(-1, 32)
    assert torch.equal(after["position.embedding.weight"][0], table[0])
    torch.testing.assert_close(after["position.embedding.weight"][1:], wanted, rtol=0, atol=0)


def test_another_head_is_initialised_and_told(tmp_path):
    config = vit(4)
    before = saved(config, tmp_path)
    after, fit = started(open_folder(tmp_path), dc.replace(config, head=dc.replace(config.head, n_classes=3)))
    assert fit.initialised == fit.skipped == ("head.classifier.weight", "head.classifier.bias")
    assert set(fit.loaded) == before.keys() - set(fit.initialised)
    assert after["head.classifier.weight"].shape == (3, 32)
    decoder = small("gpt2", *BYTES, "model.vocab_size=61")
    saved(decoder, tmp_path / "gpt2")
    classes = options.ClassHeadConfig(type="class", n_classes=2, pooling="last")
    _, fit = started(open_folder(tmp_path / "gpt2"), dc.replace(decoder, head=classes))
    assert fit.initialised == ("head.classifier.weight",), "a decoder's has no bias, as in transformers"
    assert not fit.skipped, "a tied head has no tensor"


def test_what_does_not_fit_is_refused_by_name_and_shapes_and_allowed_by_pattern(tmp_path):
    config = tiny()
    before = saved(config, tmp_path)
    wider = dc.replace(config, n_layers=3, ffn=options.GatedConfig(type="swiglu", hidden_dim=40))
    with pytest.raises(ConfigError) as e:
        started(open_folder(tmp_path), wider)
    said = str(e.value)
    assert "blocks.0.ffn.gate_proj.weight is (88, 32) there, (40, 32) here" in said
    assert "To initialise what is absent there and skip what is absent here: init_allow_missing=[blocks.0.ffn" in said
    with pytest.raises(ConfigError, match=r"init_allow_missing=\[blocks\.2\.\]\.$"):
        started(open_folder(tmp_path), dc.replace(config, n_layers=3))
    after, fit = started(open_folder(tmp_path), wider, [r"\.ffn\.", r"^blocks\.2\."])
    assert all(r in fit.initialised for r in ("blocks.0.ffn.gate_proj.weight", "blocks.2.attention.q_proj.weight"))
    assert fit.skipped == tuple(name for name in before if ".ffn." in name)
    assert torch.equal(after["blocks.1.attention.q_proj.weight"], before["blocks.1.attention.q_proj.weight"])
    with pytest.raises(ConfigError, match=r"`init_allow_missing\[0\]` must be found in the name of a parameter, but 'heed' is in none"):
        started(open_folder(tmp_path), config, ["heed"])


def test_learned_positions_may_be_skipped_for_others(tmp_path):
    config = small("gpt2", *BYTES, "model.vocab_size=61")
    saved(config, tmp_path)
    rotary = dc.replace(config, position=options.RoPEConfig(type="rope"))
    with pytest.raises(ConfigError, match=r"position\.embedding\.weight is \(16, 32\) there, absent here"):
        started(open_folder(tmp_path), rotary)
    _, fit = started(open_folder(tmp_path), rotary, ["position"])
    assert fit.skipped == ("position.embedding.weight",)


def test_a_table_that_a_pattern_names_is_initialised_anew(tmp_path):
    config = small("llama2", *BYTES, "model.vocab_size=61")
    saved(config, tmp_path)
    _, fit = started(open_folder(tmp_path), dc.replace(config, vocab_size=70), ["embedding.token"])
    assert fit.initialised == ("embedding.token.weight",)
    assert list(fit.resized) == ["head.weight"]
