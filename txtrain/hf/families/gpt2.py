"""GPT2LMHeadModel (Radford et al. 2019) = GPT-1 + norms before the sublayers, a final norm, a width and a scale of its own."""

from __future__ import annotations

import dataclasses as dc

from txtrain.hf.families.gpt1 import GPT1
from txtrain.hf.fields import Choice, Field, Fields, UnitScale, Values, integer, optional
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linear

# theirs -> ours; gelu_new is the tanh approximation written out.
ACTIVATIONS = (
    ("gelu_new", "gelu_tanh"),
    ("gelu_pytorch_tanh", "gelu_tanh"),
    ("gelu", "gelu"),
    ("relu", "relu"),
    ("relu2", "relu2"),
    ("silu", "silu"),
    ("swish", "silu"),
    ("tanh", "tanh"),
)


class InnerWidth(Field):
    """null: four times dim, and so written."""

    def write(self, model: Values) -> Fields:
        width = model[self.path]
        return {self.name: None if width == 4 * model["dim"] else width}


_RENAMED = {"tokens_embed": "wte", "positions_embed": "wpe"}


def _gpt2_name(name: str) -> str:
    prefix, _, last = name.rpartition(".")
    return f"{prefix}.{_RENAMED[last]}" if last in _RENAMED else name


GPT2: HFClass = dc.replace(
    GPT1,
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    family="gpt2",
    parts=(
        *(part for part in GPT1.parts if part.names != ("afn",)),
        InnerWidth("n_inner", "ffn.hidden_dim", optional(integer)),
        Choice("activation_function", "ffn.activation", words=ACTIVATIONS),
        UnitScale(),
    ),
    defaults={name: value for name, value in GPT1.defaults.items() if name != "afn"}
    | {"n_inner": None, "activation_function": "gelu_new", "scale_attn_weights": True, "bos_token_id": 50256, "eos_token_id": 50256},
    fixed={**GPT1.fixed, "norm_position": "pre", "final_norm": True, "init.scale_residual": True},
    rows=(
        *(row._replace(theirs=_gpt2_name(row.theirs)) for row in GPT1.rows[:-1]),
        linear("transformer.ln_f", "final_norm"),
        GPT1.rows[-1],
    ),
    must_be={"scale_attn_by_inverse_layer_idx": (False, None), "reorder_and_upcast_attn": (False, None)},
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
