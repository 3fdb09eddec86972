import math

import pytest
import torch

from tests.models import ids, seeded, tiny
from txtrain.model import options
from txtrain.model.build import construct
from txtrain.model.generation import generate
from txtrain.model.position import encodings
from txtrain.registry import TABLE


def test_rotation_turns_each_pair_by_position_times_frequency():
    rope = encodings.RoPE(8, theta=100.0)
    x = torch.randn(1, 1, 5, 8)
    turned = rope.rotation(torch.arange(5)[None] + 3, x.dtype)(x)
    for t in range(5):
        for i in range(4):
            angle = (t + 3) * 100.0 ** (-2 * i / 8)
            a, b = x[0, 0, t, i], x[0, 0, t, i + 4]
            assert turned[0, 0, t, i] == pytest.approx((a * math.cos(angle) - b * math.sin(angle)).item(), abs=1e-5)
            assert turned[0, 0, t, i + 4] == pytest.approx((b * math.cos(angle) + a * math.sin(angle)).item(), abs=1e-5)


def test_linear_scaling_divides_positions():
    plain = encodings.frequencies(8, 1e4, None).inverse
    assert torch.equal(encodings.frequencies(8, 1e4, options.LinearScaling(rope_type="linear", factor=4.0)).inverse, plain / 4)


def test_ntk_scaling_keeps_the_highest_frequency_and_stretches_the_lowest():
    plain = encodings.frequencies(64, 1e4, None).inverse
    theta, left = options.NTKScaling(rope_type="ntk", factor=4.0).resolved(1e4, 64)
    assert left is None
    ntk = encodings.frequencies(64, theta, None).inverse
    assert ntk[0] == plain[0]
    assert (plain[-1] / ntk[-1]).item() == pytest.approx(4.0, rel=1e-4)


def test_dynamic_scaling_begins_beyond_max_seq_len_and_reaches_ntk_of_the_same_stretch():
    scaling = options.DynamicScaling(rope_type="dynamic", factor=3.0)
    plain, rope = encodings.RoPE(8, 1e4), encodings.RoPE(8, 1e4, scaling, max_seq_len=16)
    short, long = torch.arange(16)[None], torch.arange(32)[None]
    for was, is_ in zip(plain.rotation(short, torch.float64), rope.rotation(short, torch.float64), strict=True):
        assert torch.equal(was, is_)
    ntk = encodings.RoPE(8, *options.NTKScaling(rope_type="ntk", factor=3 * 32 / 16 - 2).resolved(1e4, 8))
    for was, is_ in zip(ntk.rotation(long, torch.float64), rope.rotation(long, torch.float64), strict=True):
        assert torch.allclose(was, is_, atol=1e-6)
    assert not torch.allclose(plain.rotation(long, torch.float64).sin, rope.rotation(long, torch.float64).sin, atol=1e-3)


@torch.no_grad()
def test_dynamic_scaling_follows_each_row_alone():
    """Neither a longer row nor padding on either side changes it."""
    scaling = options.DynamicScaling(rope_type="dynamic", factor=4.0)
    model = seeded(tiny(max_seq_len=8, position=options.RoPEConfig(type="rope", scaling=scaling))).eval()
    tokens = ids(2, 40)
    alone = model(tokens[:1, :20]).logits
    assert (model(tokens).logits[:1, :20] - alone).abs().max() > 1e-3, "a longer text is read otherwise"
    behind = (torch.arange(40) < torch.tensor([[20], [40]])).long()
    torch.testing.assert_close(model(tokens, attention_mask=behind).logits[:1, :20], alone, rtol=1e-4, atol=1e-5)
    before = behind.flip(1)
    shifted, positions = torch.stack((tokens[0].roll(20), tokens[1])), (before.cumsum(1) - 1).clamp(min=0)
    found = model(shifted, attention_mask=before, position_ids=positions).logits
    torch.testing.assert_close(found[:1, 20:], alone, rtol=1e-4, atol=1e-5)
    together = generate(model, shifted[:, 14:26], before[:, 14:26], max_new_tokens=9)
    assert torch.equal(together[0, 6:], generate(model, tokens[:1, :6], max_new_tokens=9)[0])


def test_yarn_interpolates_long_wavelengths_and_keeps_short_ones():
    scaling = options.YaRNScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    plain, (yarn, factor) = encodings.frequencies(64, 1e4, None).inverse, encodings.frequencies(64, 1e4, scaling)
    assert yarn[0] == plain[0]
    assert (plain[-1] / yarn[-1]).item() == pytest.approx(4.0)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def test_what_yarn_takes_the_logarithm_of_is_refused_where_it_has_none():
    def problems(theta=1e4, **changes):
        scaling = options.YaRNScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, **changes)
        return [*tiny(position=options.RoPEConfig(type="rope", theta=theta, scaling=scaling)).check()]

    assert problems() == []
    said = "`model.position.theta` must be above 1 with model.position.scaling.rope_type=yarn, but is 1 instead."
    assert problems(theta=1.0) == [said]
    for key in ("beta_fast", "beta_slow"):
        (found,) = problems(**{key: 0.0})
        assert found.startswith(f"`model.position.scaling.{key}` must be above 0"), found


def test_llama3_blends_between_its_two_wavelengths():
    scaling = options.Llama3Scaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = encodings.frequencies(64, 1e4, None).inverse, encodings.frequencies(64, 1e4, scaling).inverse
    wavelength, ratio = 2 * math.pi / plain, plain / scaled
    assert torch.allclose(ratio[wavelength < 16], torch.tensor(1.0))
    assert torch.allclose(ratio[wavelength > 64], torch.tensor(8.0))
    between = ratio[(wavelength > 16) & (wavelength < 64)]
    assert len(between) > 0
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize(
    ("n_heads", "expected"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),  # the four of 4 heads, then every other one of 8
    ],
)
def test_alibi_slopes(n_heads, expected):
    assert list(encodings.alibi_slopes(n_heads)) == pytest.approx(expected)


def test_alibi_bias_is_minus_slope_times_distance():
    bias = encodings.ALiBi(2).bias(torch.tensor([[3, 4]]), torch.tensor([[0, 1, 2, 3, 4]]))
    assert bias.shape == (1, 2, 2, 5)
    assert bias[0, 0, 0].tolist() == [-(2**-4) * d for d in (3, 2, 1, 0, 1)]


def test_t5_buckets_are_exact_up_to_half_then_logarithmic():
    causal = encodings.RelativeBias(2, n_buckets=32, max_distance=128, causal=True)
    distances = torch.arange(200)
    buckets = causal.bucket(-distances)
    assert buckets[:16].tolist() == list(range(16))
    assert (buckets.diff() >= 0).all()
    assert buckets[127] <= 31
    assert (buckets[128:] == 31).all()
    assert (causal.bucket(distances) == 0).all(), "a causal table does not look ahead"
    both = encodings.RelativeBias(2, n_buckets=32, max_distance=128, causal=False)
    assert both.bucket(torch.tensor([-3, 3])).tolist() == [3, 19]


def test_sinusoids_have_the_papers_values():
    added = encodings.Sinusoidal(6, 1e4, "interleaved").add(torch.zeros(1, 4, 6), torch.arange(4)[None])
    halves = encodings.Sinusoidal(6, 1e4, "halves").add(torch.zeros(1, 4, 6), torch.arange(4)[None])
    assert torch.equal(halves, torch.cat((added[..., 0::2], added[..., 1::2]), -1))
    for t in range(4):
        for i in range(3):
            angle = t / 1e4 ** (2 * i / 6)
            assert added[0, t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert added[0, t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("kind", ["rope", "relative", "alibi"])
def test_relative_schemes_see_distances_only(kind):
    option = {"rope": options.RoPEConfig, "relative": options.RelativeConfig, "alibi": options.AlibiConfig}[kind](type=kind)
    model = seeded(tiny(position=option)).eval()
    tokens = ids()
    shifted = model(tokens, position_ids=(torch.arange(16) + 1000)[None].expand_as(tokens)).logits
    torch.testing.assert_close(shifted, model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rope", "relative", "alibi"])
def test_every_scheme_tells_order(kind):
    option = {
        "sinusoidal": options.SinusoidalConfig,
        "learned": options.LearnedConfig,
        "rope": options.RoPEConfig,
        "relative": options.RelativeConfig,
        "alibi": options.AlibiConfig,
    }[kind](type=kind)
    model = seeded(tiny(position=option, n_layers=1)).eval()
    a = model(torch.tensor([[5, 9, 7]])).logits[0, -1]
    b = model(torch.tensor([[9, 5, 7]])).logits[0, -1]
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("name", TABLE["position"])
def test_a_config_and_its_module_end_at_the_same_position(name):
    config = TABLE["position"][name].config(type=name)
    model = tiny(position=config)
    assert construct("position", config, model).max_positions == config.max_positions(model)
