"""DeepseekV3ForCausalLM (2412.19437; R1: 2501.12948) = Llama 2 + latent attention, experts after the first layers.

Three layouts differ. There: the two numbers of a rotated pair are adjacent, keys and values alternate by head, and each
expert has its own matrices. Here: pairs are in two halves, all keys precede all values, and experts are stacked.
"""

from __future__ import annotations

from typing import Any

from txtrain.errors import ConfigError
from txtrain.hf.class_fields import of_last_token
from txtrain.hf.families.llama2 import ACTIVATIONS, EMBEDDING, ENDS, NORMS
from txtrain.hf.fields import Choice, Field, Fields, Same, TokenIds, Values, boolean, integer, number, optional, rate
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import EXPERT, Row, linear, linears
from txtrain.hf.rope_fields import Rope
from txtrain.model.config import ModelConfig


class DenseWidth(Field):
    """The width of the first layers; the class wants one even without such layers."""

    def read(self, fields: Fields) -> Values:
        (width,) = super().read(fields).values()
        return {self.path: width if fields["first_k_dense_replace"] else None}

    def write(self, model: Values) -> Fields:
        widths = model[self.path]
        found = [w for w in (widths if isinstance(widths, tuple) else (widths,)) if w is not None]
        return {self.name: found[0] if found else model["ffn.hidden_dim"]}


def norm_eps(name: str, value: Any) -> float:
    """1e-6, which the class's norms of the latents always have."""
    eps = number(name, value)
    if eps != 1e-6:
        why = "the class norms its latents with 1e-06, and here all norms share one eps"
        raise ConfigError(f"`{name}` must be 1e-06, but is {eps} instead: {why}.")
    return eps


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
    s = model.attention.sizes(model)
    values, order = model.n_heads * s.nope_dim, list[int]()
    for n in range(model.n_heads):
        order += range(n * s.nope_dim, (n + 1) * s.nope_dim)
        order += range(values + n * s.v_dim, values + (n + 1) * s.v_dim)
    return order


def _has_q_latent(model: ModelConfig) -> bool:
    return model.attention.q_rank is not None


_ATTENTION, _FFN, _OURS = "model.layers.{}.self_attn.", "model.layers.{}.mlp.", "blocks.{}.attention."
_FFN_PROJECTIONS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_LATENTS, _KEYS_VALUES = (f"{_OURS}kv_down_proj", f"{_OURS}k_rope_proj"), (f"{_OURS}k_proj", f"{_OURS}v_proj")

ROWS = (
    EMBEDDING,
    *linears("model.layers.{}.", "blocks.{}.", NORMS),
    Row(f"{_ATTENTION}q_proj", (f"{_OURS}q_proj",), order=query_order, when=lambda model: not _has_q_latent(model)),
    *linears(_ATTENTION, _OURS, {"q_a_proj": "q_down_proj", "q_a_layernorm": "q_norm"}),
    Row(f"{_ATTENTION}q_b_proj", (f"{_OURS}q_proj",), order=query_order, when=_has_q_latent),
    Row(f"{_ATTENTION}kv_a_proj_with_mqa", _LATENTS, order=latent_order),
    linear(f"{_ATTENTION}kv_a_layernorm", f"{_OURS}kv_norm"),
    Row(f"{_ATTENTION}kv_b_proj", _KEYS_VALUES, order=key_value_order),
    linear(f"{_ATTENTION}o_proj", f"{_OURS}o_proj"),
    *linears(_FFN, "blocks.{}.ffn.", _FFN_PROJECTIONS),  # of the first layers
    *linears(_FFN, "blocks.{}.ffn.", {"gate": "router", "gate.e_score_correction_bias": "balance_bias"}),
    *(linear(f"{_FFN}experts.{EXPERT}.{name}.weight", f"blocks.{{}}.ffn.experts.{name}") for name in _FFN_PROJECTIONS),
    *linears(f"{_FFN}shared_experts.", "blocks.{}.ffn.shared.", _FFN_PROJECTIONS),
    *ENDS,
)


def _needs_balance_bias(model: Values) -> str | None:
    has_one = model["ffn.bias_update_rate"]
    return None if has_one else "ffn.bias_update_rate is 0.0: the class has a bias on the choice of experts"


DEEPSEEK_R1 = HFClass(
    architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", family="deepseek_r1",
    parts=(
        Field("vocab_size", "vocab_size"), Field("hidden_size", "dim"), Field("num_hidden_layers", "n_layers"),
        Field("max_position_embeddings", "max_seq_len"),
        Same(("num_attention_heads", "num_key_value_heads"), "n_heads"),
        Field("q_lora_rank", "attention.q_rank", optional(integer)), Field("kv_lora_rank", "attention.kv_rank"),
        Field("qk_nope_head_dim", "attention.nope_dim"), Field("qk_rope_head_dim", "attention.rope_dim"),
        Field("v_head_dim", "attention.v_dim"), Field("attention_bias", "attention.bias", boolean),
        Field("attention_dropout", "attention.dropout", rate), DenseWidth("intermediate_size", "ffn.dense_hidden_dim"),
        Field("first_k_dense_replace", "ffn.dense_layers"),
        Field("moe_intermediate_size", "ffn.hidden_dim"), Field("n_routed_experts", "ffn.n_experts"),
        Field("num_experts_per_tok", "ffn.top_k"), Field("n_shared_experts", "ffn.n_shared"),
        Field("n_group", "ffn.n_groups"), Field("topk_group", "ffn.top_k_groups"),
        Field("norm_topk_prob", "ffn.normalise", boolean), Field("routed_scaling_factor", "ffn.routed_scale", number),
        Choice("hidden_act", "ffn.activation", words=ACTIVATIONS), Field("rms_norm_eps", "norm.eps", norm_eps), Rope(),
        Field("initializer_range", "init.std", number), Field("tie_word_embeddings", "tie_word_embeddings", boolean),
        TokenIds(freezes_pad=True),
    ),
    defaults={
        **dict.fromkeys(Rope.names), "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "hidden_act": "silu",
        "max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    },
    fixed={
        "norm_position": "pre", "final_norm": True, "attention.type": "mla", "ffn.type": "moe", "ffn.gate": "sigmoid",
        "position.type": "rope", "norm.type": "rms", "embedding.type": "token", "head.type": "lm",
    },
    rows=ROWS,
    base="model.",
    must_be={
        "rope_interleave": (True,), "scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    },
    # The first two follow from other fields; the weights of MTP are not read; the others are of training.
    harmless="head_dim qk_head_dim num_nextn_predict_layers aux_loss_alpha seq_aux ep_size output_router_logits",
    stacks=(
        Row(f"{_FFN}experts.gate_up_proj", ("blocks.{}.ffn.experts.gate_proj", "blocks.{}.ffn.experts.up_proj")),
        linear(f"{_FFN}experts.down_proj", "blocks.{}.ffn.experts.down_proj"),
    ),
    buffers=r"model\.layers\.({n_layers}\..*|\d+\.self_attn\.rotary_emb\.inv_freq)",
    demands=_needs_balance_bias,
)

DEEPSEEK_R1_CLASSES = of_last_token(DEEPSEEK_R1, "DeepseekV3ForSequenceClassification")
