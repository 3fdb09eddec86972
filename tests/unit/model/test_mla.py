"""Latent attention: two forms of one formula, a cache of latents alone, closed forms."""

import math
from functools import partial

import pytest
import torch

from tests.models import ids, replace, seeded, shake, tiny
from txtrain.model import options
from txtrain.model.attention.kernels import plain
from txtrain.model.attention.latent import LatentAttention
from txtrain.model.build import build_model

mla = partial(options.MLAConfig, type="mla")
SIZES = [{}, {"q_rank": 6, "kv_rank": 10, "nope_dim": 5, "rope_dim": 4, "v_dim": 7, "bias": True}]
YARN = options.YaRNScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
POSITIONS = {
    "rope": options.RoPEConfig(type="rope"),
    "yarn": options.RoPEConfig(type="rope", scaling=YARN),
    "alibi": options.AlibiConfig(type="alibi"),
    "relative": options.RelativeConfig(type="relative"),
    "learned": options.LearnedConfig(type="learned"),
    "none": options.PositionConfig(type="none"),
}


def forced(monkeypatch, absorbed):
    monkeypatch.setattr(LatentAttention, "_absorbed_is_cheaper", lambda self, n_queries: absorbed)


def decoded(model, tokens, mask=None):
    """Logits of a prompt of 5, then of one, two and eight tokens at a time."""
    past, pieces = None, []
    for start, end in ((0, 5), (5, 6), (6, 8), (8, 16)):
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        out = model(tokens[:, start:end], attention_mask=seen, position_ids=positions, past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=["uncompressed queries", "all sizes"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_absorbed_decoding_equals_expanded(sizes, position, padded, monkeypatch):
    model = shake(seeded(tiny(attention=mla(**sizes), position=POSITIONS[position]))).eval()
    mask = None
    if padded:
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, :3] = 0
    forced(monkeypatch, False)
    expanded = decoded(model, ids(), mask)
    forced(monkeypatch, True)
    absorbed = decoded(model, ids(), mask)
    assert ((absorbed - expanded).abs().max() / expanded.abs().max()).item() < 1e-5
    if not padded:
        torch.testing.assert_close(absorbed, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_absorbed_gradients_equal_expanded(monkeypatch):
    model = shake(seeded(tiny(attention=mla(q_rank=6))))
    gradients = []
    for absorbed in (False, True):
        forced(monkeypatch, absorbed)
        gradients.append(torch.autograd.grad(model(ids(), use_cache=True).logits.square().mean(), model.blocks.parameters()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_cheaper_form_is_chosen():
    """DeepSeek's sizes: some 170 queries at a time are worth expanding for."""
    with torch.device("meta"):
        attention = LatentAttention(64, 2, None, 512, 128, 64, 128, torch.nn.LayerNorm, 1.0)
    assert attention._absorbed_is_cheaper(1)
    assert attention._absorbed_is_cheaper(170)
    assert not attention._absorbed_is_cheaper(171)


@torch.no_grad()
def test_the_cache_holds_the_latent_and_one_rotated_key_for_any_number_of_heads():
    for n_heads in (2, 8):
        model = seeded(tiny(n_heads=n_heads, attention=mla(kv_rank=10, nope_dim=4, rope_dim=6, v_dim=4)))
        cache = model(ids(2, 7), use_cache=True).past_key_values
        for layer in cache.layers:
            assert [tuple(x.shape[i] for i in (0, 1, 3)) for x in layer.buffers] == [(2, 1, 10), (2, 1, 6)]
        held = sum(x[:, :, layer.start : layer.end].numel() for layer in cache.layers for x in layer.buffers)
        assert held * 4 == 2 * model.config.cache_bytes(7, bytes_per_value=4)
        assert model.config.attention.cache_values(model.config) == 16


@pytest.mark.parametrize("sizes", SIZES, ids=["uncompressed queries", "all sizes"])
def test_the_expanded_form_is_multi_head_attention_with_keys_and_values_of_low_rank(sizes):
    """Composed by hand from the module's own matrices."""
    config = tiny(attention=mla(**sizes), position=options.PositionConfig(type="none"), n_layers=1)
    model = shake(seeded(config)).eval()
    a, s, n = model.blocks[0].attention, config.attention.sizes(config), config.n_heads
    x = torch.randn(2, 9, config.dim)
    mask = torch.ones(9, 9).tril().bool()
    latent = a.kv_norm(a.kv_down_proj(x))
    q = (a.q_proj(x) if s.q_rank is None else a.q_proj(a.q_norm(a.q_down_proj(x)))).view(2, 9, n, -1)
    k = a.k_proj(latent).view(2, 9, n, -1)
    v = a.v_proj(latent).view(2, 9, n, -1)
    shared = a.k_rope_proj(x)
    out = torch.zeros(2, 9, n, s.v_dim)
    for head in range(n):
        scores = q[:, :, head, : s.nope_dim] @ k[:, :, head].mT + q[:, :, head, s.nope_dim :] @ shared.mT
        p = (scores * a.scale).masked_fill(~mask, -math.inf).softmax(-1)
        out[:, :, head] = p @ v[:, :, head]
    expected = a.o_proj(out.flatten(2))
    seen = []
    hook = a.register_forward_hook(lambda module, args, y: seen.append(y))
    model.blocks[0].attention_residual.forward = lambda _, f: f(x)  # what enters is x itself
    model(ids(2, 9))
    hook.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_rope_turns_its_own_slice_alone():
    config = tiny(attention=mla(rope_dim=6, nope_dim=10))
    assert build_model(config).position.rotary_dim == 6
    odd = replace(config, attention=mla(rope_dim=5))
    assert any("`model.attention.rope_dim` must be even" in problem for problem in odd.check())


def test_scores_are_sharpened_where_yarn_says_so_for_all_dimensions():
    scale = {name: tiny(attention=mla(), position=POSITIONS[name]).attention.arguments(tiny(position=POSITIONS[name]))["scale"] for name in ("rope", "yarn")}
    assert scale["yarn"] / scale["rope"] == pytest.approx((0.1 * math.log(4) + 1) ** 2)


def test_values_may_be_of_another_size_in_every_kernel():
    from txtrain.model.attention.kernels import sdpa
    from txtrain.model.attention.mask import Mask, prepare

    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    prepared = {name: prepare(Mask(6, 6), name, None, q.device, q.dtype) for name in ("plain", "sdpa", "sdpa_masked")}
    expected = plain(q, k, v, prepared["plain"], 0.3, None, 0.0)
    assert expected.shape == (2, 4, 6, 3)
    for name in ("sdpa", "sdpa_masked"):
        torch.testing.assert_close(sdpa(q, k, v, prepared[name], 0.3, None, 0.0), expected, rtol=1e-5, atol=1e-6)


def test_dropout_and_biases_reach_it():
    config = tiny(attention=mla(dropout=0.5, bias=True))
    model = seeded(config)
    assert not torch.equal(model(ids()).logits, model(ids()).logits)
    with_bias = {name.split(".")[-2] for name, _ in model.blocks[0].attention.named_parameters() if name.endswith("bias")}
    assert with_bias == {"kv_down_proj", "k_rope_proj", "o_proj"}, "as in the published models, what is made from latents has none"
