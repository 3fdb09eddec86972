"""The options of the model's axes: their knobs, what is legal, and what they cost in closed form. No torch.

A config names the knobs of one option. `arguments` resolves the ones left open (null) and gives the flat parameters of the class
that is built; `check` yields what is illegal; `n_params` and `flops` count. The classes stand in the modules beside this one:
attention.py, ffn.py, position.py, norm.py, embedding.py, residual.py.
"""

from __future__ import annotations

from txtrain.model.axes.attention import AttentionBase, AttentionConfig
from txtrain.model.axes.base import Component
from txtrain.model.axes.embedding import PatchEmbeddingConfig, TokenEmbeddingConfig
from txtrain.model.axes.ffn import Activation, GatedConfig, MLPConfig
from txtrain.model.axes.head import ClassHeadConfig, LMHeadConfig, MLMHeadConfig
from txtrain.model.axes.mla import MLAConfig
from txtrain.model.axes.moe import MoEConfig
from txtrain.model.axes.norm import LayerNormConfig, NoNormConfig, NormBase, NormPositionConfig, RMSNormConfig, SandwichConfig
from txtrain.model.axes.position import (
    AlibiConfig,
    LearnedConfig,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    PositionConfig,
    RelativeConfig,
    RoPEConfig,
    RoPEScalingConfig,
    SinusoidalConfig,
    YaRNScaling,
)

__all__ = [
    "Activation",
    "AlibiConfig",
    "AttentionBase",
    "AttentionConfig",
    "ClassHeadConfig",
    "Component",
    "GatedConfig",
    "LMHeadConfig",
    "LayerNormConfig",
    "LearnedConfig",
    "LinearScaling",
    "Llama3Scaling",
    "MLAConfig",
    "MLMHeadConfig",
    "MLPConfig",
    "MoEConfig",
    "NTKScaling",
    "NoNormConfig",
    "NormBase",
    "NormPositionConfig",
    "PatchEmbeddingConfig",
    "PositionConfig",
    "RMSNormConfig",
    "RelativeConfig",
    "RoPEConfig",
    "RoPEScalingConfig",
    "SandwichConfig",
    "SinusoidalConfig",
    "TokenEmbeddingConfig",
    "YaRNScaling",
]
