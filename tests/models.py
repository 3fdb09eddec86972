"""Small models for tests: one by hand, and a hypothesis strategy over every legal combination of the axes."""

import dataclasses as dc
from typing import Any

import torch
from hypothesis import strategies as st

from txtrain.hf.trainer import build_model
from txtrain.model import options
from txtrain.model.config import ModelConfig
from txtrain.model.shape import InitConfig
from txtrain.model.transformer import Transformer
from txtrain.registry import TABLE


def tiny(**changes: Any) -> ModelConfig:
    """Two layers of everything that Llama has, narrow enough for any test."""
    base: dict[str, Any] = {
        "family": "test",
        "n_layers": 2,
        "dim": 32,
        "n_heads": 4,
        "vocab_size": 61,
        "max_seq_len": 48,
        "attention": options.AttentionConfig(type="mha"),
        "ffn": options.GatedConfig(type="swiglu"),
        "position": options.RoPEConfig(type="rope"),
        "norm": options.RMSNormConfig(type="rms"),
        "embedding": options.TokenEmbeddingConfig(type="token"),
        "head": options.LMHeadConfig(type="lm"),
        "init": InitConfig(std=0.15),  # wide enough that a wrong mask shows in the logits
    }
    return ModelConfig(**base | changes)


def seeded(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return build_model(config)


def shake(model: Transformer, seed: int = 1) -> Transformer:
    """No parameter stays at its neutral value: zeros and ones would hide a missing bias or gain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):  # tables that are computed are none
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def moved(config: ModelConfig, a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value; 0 where it is rounding: how many tokens an expert has in a batch
    changes that of its products, and nothing else."""
    difference = ((a - b).abs().max() / a.abs().max()).item()
    return 0.0 if config.ffn.n_experts and difference < 1e-5 else difference


def ids(batch: int = 2, length: int = 16, vocab: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


multi_head = st.builds(
    lambda kind, head_dim, window, softcap, scale, qk_norm, bias: options.AttentionConfig(
        type=kind,
        n_kv_heads={"mha": None, "gqa": 2, "mqa": 1}[kind],
        head_dim=head_dim,
        window=window,
        softcap=softcap,
        scale=scale,
        qk_norm=qk_norm,
        bias=bias,
    ),
    st.sampled_from(["mha", "gqa", "mqa"]),
    st.sampled_from([None, 6, 16]),
    st.sampled_from([None, 1, 3, (4, None), (None, 2)]),
    st.sampled_from([None, 4.0]),
    st.sampled_from([None, 0.3]),
    st.booleans(),
    st.booleans(),
)
latent = st.builds(
    options.MLAConfig,
    type=st.just("mla"),
    q_rank=st.sampled_from([None, 6]),
    kv_rank=st.sampled_from([None, 10]),
    nope_dim=st.sampled_from([None, 5]),
    rope_dim=st.sampled_from([None, 6]),
    v_dim=st.sampled_from([None, 7]),
    scale=st.sampled_from([None, 0.3]),
    bias=st.booleans(),
)
attentions = st.one_of(multi_head, multi_head, latent)
activations = st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "relu2", "tanh"])
mixtures = st.builds(
    options.MoEConfig,
    type=st.sampled_from(["moe", "moe_softmax"]),
    n_experts=st.sampled_from([4, 8]),
    top_k=st.sampled_from([2, 3]),
    n_shared=st.sampled_from([0, 1, 2]),
    hidden_dim=st.sampled_from([None, 12, 13]),  # 13: rows that the grouped kernel does not take
    activation=activations,
    dense_layers=st.sampled_from([0, 1]),
    gate=st.sampled_from(["sigmoid", "softmax"]),
    normalise=st.booleans(),
    routed_scale=st.sampled_from([1.0, 2.5]),
    n_groups=st.sampled_from([1, 2]),
    bias_update_rate=st.sampled_from([0.0, 1e-3]),
    aux_weight=st.sampled_from([0.0, 0.1]),
)
ffns = st.one_of(
    mixtures,
    st.builds(options.MLPConfig, type=st.just("mlp"), hidden_dim=st.sampled_from([None, 20]), activation=activations, bias=st.booleans()),
    st.builds(
        options.GatedConfig, type=st.sampled_from(["swiglu", "geglu"]), hidden_dim=st.sampled_from([None, 20]), activation=activations, bias=st.booleans()
    ),
)
scalings = st.sampled_from(
    [
        None,
        options.LinearScaling(rope_type="linear", factor=2.0),
        options.NTKScaling(rope_type="ntk", factor=2.0),
        options.YaRNScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        options.Llama3Scaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16),
    ]
)
positions = st.one_of(
    st.builds(options.PositionConfig, type=st.just("none")),
    st.builds(options.SinusoidalConfig, type=st.just("sinusoidal")),
    st.builds(options.LearnedConfig, type=st.just("learned")),
    st.builds(options.RoPEConfig, type=st.just("rope"), theta=st.sampled_from([100.0, 1e4]), scaling=scalings),
    st.builds(options.RelativeConfig, type=st.just("relative"), n_buckets=st.sampled_from([8, 32]), max_distance=st.just(20)),
    st.builds(options.AlibiConfig, type=st.just("alibi")),
)
norms = st.one_of(
    st.builds(options.LayerNormConfig, type=st.just("layer"), bias=st.booleans()),
    st.builds(options.RMSNormConfig, type=st.just("rms"), unit_offset=st.booleans()),
    st.builds(options.NoNormConfig, type=st.just("none")),
)

model_configs = st.builds(
    tiny,
    n_layers=st.sampled_from([1, 2, 3]),
    attention=attentions,
    ffn=ffns,
    position=positions,
    norm=norms,
    norm_position=st.sampled_from(sorted(TABLE["norm_position"])),
    final_norm=st.sampled_from([None, True, False]),
    embedding=st.builds(options.TokenEmbeddingConfig, type=st.just("token"), scale=st.booleans()),
    tie_word_embeddings=st.booleans(),
    logit_softcap=st.sampled_from([None, 5.0]),
    init=st.builds(
        InitConfig,
        distribution=st.sampled_from(["normal", "truncated_normal", "xavier_uniform"]),
        std=st.just(0.1),
        scale_residual=st.booleans(),
    ),
).filter(lambda config: not list(config.check()))

replace = dc.replace
