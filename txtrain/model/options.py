"""The options of the model's axes: their knobs, what is legal, and what they cost in closed form. No torch.

A config names the knobs of one option. `arguments` gives the constructor's parameters, every null resolved; `check`
yields what is illegal; `n_params` and `flops` count. The classes are in the modules beside the configs.
"""

from __future__ import annotations

from txtrain.model.attention.latent_config import MLAConfig as MLAConfig
from txtrain.model.attention.multi_head_config import AttentionBase as AttentionBase
from txtrain.model.attention.multi_head_config import AttentionConfig as AttentionConfig
from txtrain.model.component import Component as Component
from txtrain.model.embedding.config import PatchEmbeddingConfig as PatchEmbeddingConfig
from txtrain.model.embedding.config import TokenEmbeddingConfig as TokenEmbeddingConfig
from txtrain.model.ffn.dense_config import FFNBase as FFNBase
from txtrain.model.ffn.dense_config import GatedConfig as GatedConfig
from txtrain.model.ffn.dense_config import MLPConfig as MLPConfig
from txtrain.model.ffn.moe_config import MoEConfig as MoEConfig
from txtrain.model.head.config import ClassHeadConfig as ClassHeadConfig
from txtrain.model.head.config import LMHeadConfig as LMHeadConfig
from txtrain.model.head.config import MLMHeadConfig as MLMHeadConfig
from txtrain.model.head.config import NoHeadConfig as NoHeadConfig
from txtrain.model.norm.config import LayerNormConfig as LayerNormConfig
from txtrain.model.norm.config import NoNormConfig as NoNormConfig
from txtrain.model.norm.config import NormBase as NormBase
from txtrain.model.norm.config import NormPositionConfig as NormPositionConfig
from txtrain.model.norm.config import RMSNormConfig as RMSNormConfig
from txtrain.model.norm.config import SandwichConfig as SandwichConfig
from txtrain.model.position.config import AlibiConfig as AlibiConfig
from txtrain.model.position.config import DynamicScaling as DynamicScaling
from txtrain.model.position.config import LearnedConfig as LearnedConfig
from txtrain.model.position.config import LinearScaling as LinearScaling
from txtrain.model.position.config import Llama3Scaling as Llama3Scaling
from txtrain.model.position.config import NTKScaling as NTKScaling
from txtrain.model.position.config import PositionBase as PositionBase
from txtrain.model.position.config import PositionConfig as PositionConfig
from txtrain.model.position.config import RelativeConfig as RelativeConfig
from txtrain.model.position.config import RoPEConfig as RoPEConfig
from txtrain.model.position.config import RoPEScalingConfig as RoPEScalingConfig
from txtrain.model.position.config import SinusoidalConfig as SinusoidalConfig
from txtrain.model.position.config import YaRNScaling as YaRNScaling
