"""GPT2LMHeadModel (Radford et al. 2019) = GPT-1 + norms before the sublayers, a final norm, its own width and scale."""

from __future__ import annotations

import dataclasses as dc

from txtrain.hf.class_fields import of_last_token
from txtrain.hf.families.gpt1 import GPT1
from txtrain.hf.fields import Choice, Field, Fields, Values, boolean, integer, optional
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linear

# theirs -> ours; of several for one of ours, the first is written. gelu_new is the tanh approximation written out.
ACTIVATIONS = (
    ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu"),
    ("relu2", "relu2"), ("silu", "silu"), ("swish", "silu"), ("tanh", "tanh"),
)


class InnerWidth(Field):
    """null: four times dim."""

    def write(self, model: Values) -> Fields:
        width = model[self.path]
        return {self.name: None if width == 4 * model["dim"] else width}


def unscaled(name: str, value: object) -> float | None:
    """attention.scale: 1 where scores are not divided by sqrt(head_dim)."""
    return None if boolean(name, value) else 1.0


_NAMES = {"transformer.tokens_embed": "transformer.wte", "transformer.positions_embed": "transformer.wpe"}
_BASE = GPT1.without("afn")

GPT2: HFClass = dc.replace(
    _BASE,
    architecture="GPT2LMHeadModel", model_type="gpt2", family="gpt2",
    parts=(
        *_BASE.parts, InnerWidth("n_inner", "ffn.hidden_dim", optional(integer)),
        Choice("activation_function", "ffn.activation", words=ACTIVATIONS),
        Field("scale_attn_weights", "attention.scale", unscaled, back=lambda scale: scale != 1.0),
    ),
    defaults={
        **_BASE.defaults, "n_inner": None, "activation_function": "gelu_new", "scale_attn_weights": True,
        "bos_token_id": 50256, "eos_token_id": 50256,
    },
    fixed={**GPT1.fixed, "norm_position": "pre", "final_norm": True, "init.scale_residual": True},
    rows=(
        *(row._replace(theirs=_NAMES.get(row.theirs, row.theirs)) for row in GPT1.rows[:-1]),
        linear("transformer.ln_f", "final_norm"), GPT1.rows[-1],
    ),
    must_be={"scale_attn_by_inverse_layer_idx": (False, None), "reorder_and_upcast_attn": (False, None)},
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)

GPT2_CLASSES = of_last_token(GPT2, "GPT2ForSequenceClassification")
