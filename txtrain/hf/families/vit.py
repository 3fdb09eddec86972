"""ViTForImageClassification (2010.11929): patches of an image through an encoder, norms before the sublayers, a score a class."""

from __future__ import annotations

import dataclasses as dc

from txtrain.errors import ConfigError
from txtrain.hf.families.bert import RATES, SIZES
from txtrain.hf.families.llama2 import ACTIVATIONS
from txtrain.hf.fields import Choice, Fields, Values, integer
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Row, linear


@dc.dataclass(frozen=True)
class Patches:
    """Sizes in pixels, of which the number of positions follows."""

    names: tuple[str, ...] = ("image_size", "patch_size", "num_channels")

    def read(self, fields: Fields) -> Values:
        image, patch = (_side(name, fields[name]) for name in ("image_size", "patch_size"))
        made = {"image_size": image, "patch_size": patch, "n_channels": integer("num_channels", fields["num_channels"])}
        return {"max_seq_len": (image // patch) ** 2 + 1, **{f"embedding.{name}": value for name, value in made.items()}}

    def write(self, model: Values) -> Fields:
        return dict(zip(self.names, (model[f"embedding.{name}"] for name in ("image_size", "patch_size", "n_channels")), strict=True))


def _side(name: str, value: object) -> int:
    """A side of a square, or both of them."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    side = integer(name, value)
    if side < 1:
        raise ConfigError(f"`{name}` must be at least 1, but is {side} instead.")
    return side


@dc.dataclass(frozen=True)
class Classes:
    """The number of classes: of their names, of which only the number is kept. Silent: two."""

    names: tuple[str, ...] = ("id2label", "num_labels")

    def read(self, fields: Fields) -> Values:
        labels, n = fields["id2label"], fields["num_labels"]
        if labels is not None and not isinstance(labels, dict):
            raise ConfigError(f"`id2label` must be a name for each class, but is {str(labels)[:40]} instead.")
        named = 2 if labels is None else len(labels)
        if None not in (labels, n) and n != named:
            raise ConfigError(f"`num_labels` must be the number of names in id2label ({named}), but is {n} instead.")
        return {"head.n_classes": named if n is None else integer("num_labels", n)}

    def write(self, model: Values) -> Fields:
        names = {str(i): f"LABEL_{i}" for i in range(model["head.n_classes"])}
        return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


_LAYER = "vit.encoder.layer.{}"

VIT = HFClass(
    architecture="ViTForImageClassification",
    model_type="vit",
    family="vit",
    parts=(
        *SIZES,
        Choice("hidden_act", "ffn.activation", words=ACTIVATIONS),
        *RATES,
        Patches(),
        Classes(),
    ),
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "id2label": None,
        "num_labels": None,
    },
    fixed={
        "topology": "encoder",
        "vocab_size": 0,
        "norm_position": "pre",
        "final_norm": True,
        "attention.bias": True,
        "ffn.type": "mlp",
        "ffn.bias": True,
        "position.type": "learned",
        "norm.type": "layer",
        "embedding.type": "patch",
        "embedding.class_token": True,
        "head.type": "class",
        "head.pooling": "first",
        "tie_word_embeddings": False,
    },
    rows=(
        linear("vit.embeddings.cls_token", "embedding.class_token"),
        Row("vit.embeddings.position_embeddings", ("position.embedding.weight",), leading=True),
        linear("vit.embeddings.patch_embeddings.projection", "embedding.patch"),
        linear(f"{_LAYER}.attention.attention.query", "blocks.{}.attention.q_proj"),
        linear(f"{_LAYER}.attention.attention.key", "blocks.{}.attention.k_proj"),
        linear(f"{_LAYER}.attention.attention.value", "blocks.{}.attention.v_proj"),
        linear(f"{_LAYER}.attention.output.dense", "blocks.{}.attention.o_proj"),
        linear(f"{_LAYER}.layernorm_before", "blocks.{}.attention_residual.norm"),
        linear(f"{_LAYER}.intermediate.dense", "blocks.{}.ffn.up_proj"),
        linear(f"{_LAYER}.output.dense", "blocks.{}.ffn.down_proj"),
        linear(f"{_LAYER}.layernorm_after", "blocks.{}.ffn_residual.norm"),
        linear("vit.layernorm", "final_norm"),
        linear("classifier", "head.classifier"),
    ),
    base="",
    must_be={"qkv_bias": (True, None), "is_decoder": (False, None)},
    harmless=frozenset(
        "label2id pooler_output_size pooler_act encoder_stride tie_word_embeddings bos_token_id eos_token_id pad_token_id classifier_dropout".split()
    ),
    buffers=r"vit\.pooler\..*",
    # Files have the names above in every version; the modules of version 5 have these, and so has a pickled state_dict of one.
    renamed=(
        (r"^vit\.layers\.(\d+)\.attention\.q_proj\.", r"vit.encoder.layer.\1.attention.attention.query."),
        (r"^vit\.layers\.(\d+)\.attention\.k_proj\.", r"vit.encoder.layer.\1.attention.attention.key."),
        (r"^vit\.layers\.(\d+)\.attention\.v_proj\.", r"vit.encoder.layer.\1.attention.attention.value."),
        (r"^vit\.layers\.(\d+)\.attention\.o_proj\.", r"vit.encoder.layer.\1.attention.output.dense."),
        (r"^vit\.layers\.(\d+)\.mlp\.fc1\.", r"vit.encoder.layer.\1.intermediate.dense."),
        (r"^vit\.layers\.(\d+)\.mlp\.fc2\.", r"vit.encoder.layer.\1.output.dense."),
        (r"^vit\.layers\.(\d+)\.layernorm_(before|after)\.", r"vit.encoder.layer.\1.layernorm_\2."),
    ),
)
