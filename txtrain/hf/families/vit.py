"""ViTForImageClassification (2010.11929): patches of an image, a pre-norm encoder, a score per class; ViTModel."""

from __future__ import annotations

import dataclasses as dc

from txtrain.errors import ConfigError
from txtrain.hf.class_fields import CLASS_DEFAULTS, Classes
from txtrain.hf.families.bert import RATES, SIZES, headless
from txtrain.hf.families.llama2 import ACTIVATIONS
from txtrain.hf.fields import Choice, Fields, Values, integer
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Row, linear, linears

_OURS = ("embedding.image_size", "embedding.patch_size", "embedding.n_channels")


@dc.dataclass(frozen=True)
class Patches:
    """Sizes in pixels, which give the number of positions."""

    names: tuple[str, ...] = ("image_size", "patch_size", "num_channels")

    def read(self, fields: Fields) -> Values:
        image, patch = (_side(name, fields[name]) for name in ("image_size", "patch_size"))
        sizes = image, patch, integer("num_channels", fields["num_channels"])
        return {"max_seq_len": (image // patch) ** 2 + 1, **dict(zip(_OURS, sizes, strict=True))}

    def write(self, model: Values) -> Fields:
        return dict(zip(self.names, (model[name] for name in _OURS), strict=True))


def _side(name: str, value: object) -> int:
    """A side of a square, perhaps given twice."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    side = integer(name, value)
    if side < 1:
        raise ConfigError(f"`{name}` must be at least 1, but is {side} instead.")
    return side


_MODULES = {  # names in transformers 5, and in files
    "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}

VIT = HFClass(
    architecture="ViTForImageClassification", model_type="vit", family="vit",
    parts=(
        *SIZES, Choice("hidden_act", "ffn.activation", words=ACTIVATIONS), *RATES, Patches(), Classes(),
    ),
    defaults={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02, "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
        **CLASS_DEFAULTS,
    },
    fixed={
        "topology": "encoder", "vocab_size": 0, "norm_position": "pre", "final_norm": True, "attention.bias": True,
        "ffn.type": "mlp", "ffn.bias": True, "position.type": "learned", "norm.type": "layer",
        "embedding.type": "patch", "embedding.class_token": True, "head.type": "class", "head.pooling": "first",
        "head.pooler": False, "head.bias": True, "head.dropout": 0.0, "tie_word_embeddings": False,
    },
    rows=(
        linear("vit.embeddings.cls_token", "embedding.class_token"),
        Row("vit.embeddings.position_embeddings", ("position.embedding.weight",), leading=True),
        linear("vit.embeddings.patch_embeddings.projection", "embedding.patch"),
        *linears("vit.encoder.layer.{}.", "blocks.{}.", {
            "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
            "layernorm_before": "attention_residual.norm", "intermediate.dense": "ffn.up_proj",
            "output.dense": "ffn.down_proj", "layernorm_after": "ffn_residual.norm",
        }),
        linear("vit.layernorm", "final_norm"),
        linear("classifier", "head.classifier"),
    ),
    base="",
    must_be={"qkv_bias": (True, None), "is_decoder": (False, None)},
    harmless="label2id pooler_output_size pooler_act encoder_stride tie_word_embeddings bos_token_id eos_token_id "
    "pad_token_id classifier_dropout",
    buffers=r"vit\.pooler\..*",
    # Names of the modules of transformers 5, and of their pickled state_dict; its files have the names above.
    renamed=(
        *((rf"^vit\.layers\.(\d+)\.{new}\.", rf"vit.encoder.layer.\1.{old}.") for new, old in _MODULES.items()),
        (r"^vit\.layers\.(\d+)\.layernorm_(before|after)\.", r"vit.encoder.layer.\1.layernorm_\2."),
    ),
    modules=tuple((rf"^vit\.encoder\.layer\.(\d+)\.{old}$", rf"vit.layers.\1.{new}") for new, old in _MODULES.items()),
)

_BODY = VIT.without("id2label")
# Its pooler is no part of VIT, which ignores it.
_POOLED = dc.replace(_BODY, must_be={**VIT.must_be, "pooler_act": ("tanh", None)})
VIT_BODY: HFClass = headless(_POOLED, "vit.", "ViTModel", "pooler.dense.weight", pooler=True)
VIT_BODY_UNPOOLED: HFClass = headless(_BODY, "vit.", "ViTModel", "embeddings.cls_token", pooler=False)
