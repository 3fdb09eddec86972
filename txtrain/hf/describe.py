"""A model as one flat dictionary, every null resolved: two configs with equal ones give equal logits."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from txtrain.ground.convert import among, marked
from txtrain.model.config import ModelConfig
from txtrain.registry import TABLE

_PLAIN = (
    "topology", "n_layers", "dim", "n_heads", "vocab_size", "max_seq_len", "dropout", "output_dropout", "norm_position",
    "share_embeddings", "tie_word_embeddings", "logit_softcap", "bos_token_id", "eos_token_id", "pad_token_id",
)


def describe(model: ModelConfig) -> dict[str, Any]:
    """Dotted names -> values. `attention`, `ffn`, ... are the modules' classes; their knobs are the constructors'
    arguments, tuples over the layers if these differ."""
    found: dict[str, Any] = {name: getattr(model, name) for name in _PLAIN}
    found |= {"n_encoder_layers": model.encoder_layers, "final_norm": model.has_final_norm, "init.std": model.init.std}
    start = model.decoder_start_token_id
    by_padding = start is None and model.topology == "encoder_decoder"
    found["decoder_start_token_id"] = (model.pad_token_id or 0) if by_padding else start  # as `shifted_right`
    for axis in (f.name for f in dc.fields(model) if "axis" in f.metadata):
        component = getattr(model, axis)
        found[axis] = TABLE[axis][component.type].target
        found |= {f"{axis}.{f.name}": getattr(component, f.name) for f in dc.fields(component) if f.name != "type"}
        layers = [component.arguments(model, i) for i in range(max(model.n_layers, model.encoder_layers))]
        for name in layers[0]:
            values = tuple(layer[name] for layer in layers)
            same = all(v == values[0] for v in values)
            found[f"{axis}.{name.removeprefix(axis + '_')}"] = values[0] if same else values
    return found


def differences(a: dict[str, Any], b: dict[str, Any], *, training: bool = False) -> list[str]:
    """The names, of those that change logits (training: of dropouts), whose values differ."""
    affects = marked(ModelConfig, "affects")
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return [name for name in names if (affects.get(name) == "dropout" if training else not among(name, affects))]
