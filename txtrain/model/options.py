"""The options of the model's axes: their knobs, what is legal, and what they cost in closed form. No torch.

A config names the knobs of one option. `arguments` gives the constructor's parameters, every null resolved; `check`
yields what is illegal; `n_params` and `flops` count. The classes are in the modules beside the configs.
"""

from __future__ import annotations

from txtrain.model.attention.latent_config import MLAConfig
from txtrain.model.attention.multi_head_config import AttentionBase, AttentionConfig
from txtrain.model.component import Component
from txtrain.model.embedding.config import PatchEmbeddingConfig, TokenEmbeddingConfig
from txtrain.model.ffn.dense_config import Activation, FFNBase, GatedConfig, MLPConfig
from txtrain.model.ffn.moe_config import MoEConfig
from txtrain.model.head.config import ClassHeadConfig, LMHeadConfig, MLMHeadConfig
from txtrain.model.norm.config import (
    LayerNormConfig,
    NoNormConfig,
    NormBase,
    NormPositionConfig,
    RMSNormConfig,
    SandwichConfig,
)
from txtrain.model.position.config import (
    AlibiConfig,
    LearnedConfig,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    PositionBase,
    PositionConfig,
    RelativeConfig,
    RoPEConfig,
    RoPEScalingConfig,
    SinusoidalConfig,
    YaRNScaling,
)

__all__ = [
    "Activation", "AlibiConfig", "AttentionBase", "AttentionConfig", "ClassHeadConfig", "Component", "FFNBase",
    "GatedConfig", "LMHeadConfig", "LayerNormConfig", "LearnedConfig", "LinearScaling", "Llama3Scaling",
    "MLAConfig", "MLMHeadConfig", "MLPConfig", "MoEConfig", "NTKScaling", "NoNormConfig", "NormBase",
    "NormPositionConfig", "PatchEmbeddingConfig", "PositionBase", "PositionConfig", "RMSNormConfig",
    "RelativeConfig", "RoPEConfig", "RoPEScalingConfig", "SandwichConfig", "SinusoidalConfig",
    "TokenEmbeddingConfig", "YaRNScaling",
]
