"""DeepseekV3ForCausalLM (2412.19437; R1: 2501.12948) = Llama 2 + latent attention, experts after the first layers.

Three layouts differ. A rotated part holds the two numbers of a pair side by side there, in two halves here. Keys and values of a head
follow one another there, here those of all heads do. Each expert's matrices are tensors of their own there, stacked here.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from txtrain.errors import ConfigError
from txtrain.hf.families.llama2 import ACTIVATIONS, EMBEDDING, ENDS, LLAMA2
from txtrain.hf.fields import Choice, Field, Fields, TokenIds, Values, boolean, integer, number, optional
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import EXPERT, Row, linear
from txtrain.hf.rope_fields import Rope
from txtrain.model.config import ModelConfig

# --------------------------------------------------------------------------------------------------------------------- fields


@dc.dataclass(frozen=True)
class AsManyKeyValueHeads:
    """The class has a number of key-value heads that is read by some of its kernels; latent attention has no such number."""

    names: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")

    def read(self, fields: Fields) -> Values:
        n, kv = (optional(integer)(name, fields[name]) for name in self.names)
        if kv not in (None, n):
            raise ConfigError(f"`num_key_value_heads` must be num_attention_heads ({n}), but is {kv} instead.")
        return {"n_heads": integer("num_attention_heads", n)}

    def write(self, model: Values) -> Fields:
        return dict.fromkeys(self.names, model["n_heads"])


@dc.dataclass(frozen=True)
class DenseWidth:
    """The width of the first layers. Where there are none it is never read, but the class wants one."""

    names: tuple[str, ...] = ("intermediate_size",)

    def read(self, fields: Fields) -> Values:
        width = integer("intermediate_size", fields["intermediate_size"])
        return {"ffn.dense_hidden_dim": width if fields["first_k_dense_replace"] else None}

    def write(self, model: Values) -> Fields:
        widths = model["ffn.dense_hidden_dim"]
        found = [w for w in (widths if isinstance(widths, tuple) else (widths,)) if w is not None]
        return {"intermediate_size": found[0] if found else model["ffn.hidden_dim"]}


def norm_eps(name: str, value: Any) -> float:
    """The norms of the latents have this number whatever is given."""
    eps = number(name, value)
    if eps != 1e-6:
        raise ConfigError(f"`{name}` must be 1e-06, but is {eps} instead: the class norms its latents with 1e-06, and here all norms have one.")
    return eps


# -------------------------------------------------------------------------------------------------------------------- layouts


def interleaved(size: int) -> list[int]:
    """Halves to pairs: 0, size / 2, 1, size / 2 + 1, ..."""
    return [i + half for i in range(size // 2) for half in (0, size // 2)]


def query_order(model: ModelConfig) -> list[int]:
    s = model.attention.sizes(model)
    head = [*range(s.nope_dim), *(s.nope_dim + i for i in interleaved(s.rope_dim))]
    return [n * s.qk_dim + i for n in range(model.n_heads) for i in head]


def latent_order(model: ModelConfig) -> list[int]:
    s = model.attention.sizes(model)
    return [*range(s.kv_rank), *(s.kv_rank + i for i in interleaved(s.rope_dim))]


def key_value_order(model: ModelConfig) -> list[int]:
    s, n_heads = model.attention.sizes(model), model.n_heads
    values = n_heads * s.nope_dim
    heads = ((range(n * s.nope_dim, (n + 1) * s.nope_dim), range(values + n * s.v_dim, values + (n + 1) * s.v_dim)) for n in range(n_heads))
    return [i for keys_and_values in heads for part in keys_and_values for i in part]


def _compressed(model: ModelConfig) -> bool:
    return model.attention.q_rank is not None


def _uncompressed(model: ModelConfig) -> bool:
    return model.attention.q_rank is None


_LAYER, _ATTENTION, _FFN = "model.layers.{}", "model.layers.{}.self_attn", "model.layers.{}.mlp"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

ROWS = (
    EMBEDDING,
    linear(f"{_LAYER}.input_layernorm", "blocks.{}.attention_residual.norm"),
    linear(f"{_LAYER}.post_attention_layernorm", "blocks.{}.ffn_residual.norm"),
    Row(f"{_ATTENTION}.q_proj", ("blocks.{}.attention.q_proj",), order=query_order, when=_uncompressed),
    linear(f"{_ATTENTION}.q_a_proj", "blocks.{}.attention.q_down_proj"),
    linear(f"{_ATTENTION}.q_a_layernorm", "blocks.{}.attention.q_norm"),
    Row(f"{_ATTENTION}.q_b_proj", ("blocks.{}.attention.q_proj",), order=query_order, when=_compressed),
    Row(f"{_ATTENTION}.kv_a_proj_with_mqa", ("blocks.{}.attention.kv_down_proj", "blocks.{}.attention.k_rope_proj"), order=latent_order),
    linear(f"{_ATTENTION}.kv_a_layernorm", "blocks.{}.attention.kv_norm"),
    Row(f"{_ATTENTION}.kv_b_proj", ("blocks.{}.attention.k_proj", "blocks.{}.attention.v_proj"), order=key_value_order),
    linear(f"{_ATTENTION}.o_proj", "blocks.{}.attention.o_proj"),
    *(linear(f"{_FFN}.{name}", f"blocks.{{}}.ffn.{name}") for name in _PROJECTIONS),  # of the first layers
    linear(f"{_FFN}.gate", "blocks.{}.ffn.router"),
    linear(f"{_FFN}.gate.e_score_correction_bias", "blocks.{}.ffn.balance_bias"),
    *(linear(f"{_FFN}.experts.{EXPERT}.{name}.weight", f"blocks.{{}}.ffn.experts.{name}") for name in _PROJECTIONS),
    *(linear(f"{_FFN}.shared_experts.{name}", f"blocks.{{}}.ffn.shared.{name}") for name in _PROJECTIONS),
    *ENDS,
)

# ---------------------------------------------------------------------------------------------------------------------- class

DEEPSEEK_R1 = HFClass(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    family="deepseek_r1",
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "dim"),
        Field("num_hidden_layers", "n_layers"),
        Field("max_position_embeddings", "max_seq_len"),
        AsManyKeyValueHeads(),
        Field("q_lora_rank", "attention.q_rank", optional(integer)),
        Field("kv_lora_rank", "attention.kv_rank"),
        Field("qk_nope_head_dim", "attention.nope_dim"),
        Field("qk_rope_head_dim", "attention.rope_dim"),
        Field("v_head_dim", "attention.v_dim"),
        Field("attention_bias", "attention.bias", boolean),
        Field("attention_dropout", "attention.dropout", lambda name, value: optional(number)(name, value) or 0.0),
        DenseWidth(),
        Field("first_k_dense_replace", "ffn.dense_layers"),
        Field("moe_intermediate_size", "ffn.hidden_dim"),
        Field("n_routed_experts", "ffn.n_experts"),
        Field("num_experts_per_tok", "ffn.top_k"),
        Field("n_shared_experts", "ffn.n_shared"),
        Field("n_group", "ffn.n_groups"),
        Field("topk_group", "ffn.top_k_groups"),
        Field("norm_topk_prob", "ffn.normalise", boolean),
        Field("routed_scaling_factor", "ffn.routed_scale", number),
        Choice("hidden_act", "ffn.activation", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm.eps", norm_eps),
        Rope(),
        Field("initializer_range", "init.std", number),
        Field("tie_word_embeddings", "tie_word_embeddings", boolean),
        TokenIds(freezes_pad=True),
    ),
    defaults={name: LLAMA2.defaults[name] for name in ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")}
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    },
    fixed={
        "norm_position": "pre",
        "final_norm": True,
        "attention.type": "mla",
        "ffn.type": "moe",
        "ffn.gate": "sigmoid",
        "position.type": "rope",
        "norm.type": "rms",
        "embedding.type": "token",
        "head.type": "lm",
    },
    rows=ROWS,
    base="model.",
    must_be={
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    },
    # The first three follow from other fields, and the next say how it was trained. Weights of further tokens are not read.
    harmless=frozenset("head_dim qk_head_dim num_nextn_predict_layers aux_loss_alpha seq_aux ep_size output_router_logits".split()),
    buffers=r"model\.layers\.({n_layers}\..*|\d+\.self_attn\.rotary_emb\.inv_freq)",
    demands=lambda model: None if model["ffn.bias_update_rate"] else "ffn.bias_update_rate is 0.0: the class has a bias on the choice of experts",
)
