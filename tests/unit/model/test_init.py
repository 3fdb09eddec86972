from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import replace, seeded, tiny
from txtrain.model import options
from txtrain.model.build import build_model, transformer
from txtrain.model.init import init_weights
from txtrain.model.shape import InitConfig
from txtrain.model.shapes_only import shapes_only

WIDE = tiny(dim=256, vocab_size=1000, n_layers=8, position=options.LearnedConfig(type="learned"), max_seq_len=512)


def test_papers_spreads():
    init = InitConfig(std=0.02, embedding_std=0.5, position_std=0.01, scale_residual=True)
    model = seeded(replace(WIDE, init=init, tie_word_embeddings=False))
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    assert spread["embedding.token.weight"] == pytest.approx(0.5, rel=0.02)
    assert spread["position.embedding.weight"] == pytest.approx(0.01, rel=0.02)
    assert spread["head.weight"] == pytest.approx(0.02, rel=0.02)
    for i in range(8):
        for matrix in ("attention.q_proj", "ffn.gate_proj", "ffn.up_proj"):
            assert spread[f"blocks.{i}.{matrix}.weight"] == pytest.approx(0.02, rel=0.02)
        for matrix in ("attention.o_proj", "ffn.down_proj"):
            assert spread[f"blocks.{i}.{matrix}.weight"] == pytest.approx(0.02 / 4, rel=0.02), "divided by sqrt(2 * 8 layers)"


def test_truncated_normal_ends_at_two_deviations_and_xavier_at_its_bound():
    model = seeded(replace(WIDE, init=InitConfig(distribution="truncated_normal", std=0.1)))
    assert 0.19 < model.blocks[0].attention.q_proj.weight.abs().max() <= 0.2
    model = seeded(replace(WIDE, init=InitConfig(distribution="xavier_uniform")))
    bound = (6 / (256 + 256)) ** 0.5
    assert 0.99 * bound < model.blocks[0].attention.q_proj.weight.abs().max() <= bound


def test_biases_start_at_zero_and_norms_at_the_identity():
    for norm in (options.LayerNormConfig(type="layer"), options.RMSNormConfig(type="rms"), options.RMSNormConfig(type="rms", unit_offset=True)):
        config = tiny(norm=norm, ffn=options.MLPConfig(type="mlp"), attention=options.AttentionConfig(type="mha", bias=True, qk_norm=True))
        for name, p in seeded(config).named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all(), name
            elif "norm" in name:
                assert (p == (0 if getattr(norm, "unit_offset", False) else 1)).all(), name


def test_torchs_generator_decides_and_only_it():
    a, b, c = seeded(tiny(), 1), seeded(tiny(), 1), seeded(tiny(), 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.token.weight, c.embedding.token.weight)


def test_a_parameter_starts_the_same_whatever_else_is_built():
    small, deep = seeded(tiny(n_layers=1)), seeded(tiny(n_layers=3))
    for name, p in small.named_parameters():
        assert torch.equal(p, deep.get_parameter(name)), name


def test_on_meta_nothing_is_allocated():
    with torch.device("meta"):
        model = build_model(tiny(dim=8192, n_layers=80, n_heads=64, vocab_size=32000))
    assert sum(p.numel() for p in model.parameters()) > 60e9
    assert all(p.is_meta for p in model.parameters())


def test_a_module_that_cannot_be_filled_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(3))

    model = seeded(tiny())
    model.blocks[0].ffn = Odd()
    with pytest.raises(ValueError, match=r"`blocks.0.ffn` \(Odd\) owns parameters or buffers"):
        init_weights(model)


class Ran(TorchDispatchMode):
    """The operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_what_has_no_storage_draws_nothing_and_other_threads_draw():
    with shapes_only(), ThreadPoolExecutor(1) as beside:
        with Ran() as ran:
            model = transformer(WIDE), nn.Conv2d(3, 8, 3)
        elsewhere = beside.submit(nn.Linear, 9, 9).result()
    assert not any("normal" in name or "uniform" in name for name in ran.names), ran.names
    assert {p.device.type for part in model for p in part.parameters()} == {"meta"}
    assert elsewhere.weight.std() > 0.1
