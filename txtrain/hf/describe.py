"""A model in one flat dictionary with nothing left open: what two configs must agree in to give equal logits."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from txtrain.ground.convert import among, marked
from txtrain.model.config import ModelConfig
from txtrain.registry import TABLE

_PLAIN = (
    *("topology", "n_layers", "dim", "n_heads", "vocab_size", "max_seq_len", "dropout", "output_dropout", "norm_position"),
    *("share_embeddings", "tie_word_embeddings", "logit_softcap"),
)


def describe(model: ModelConfig) -> dict[str, Any]:
    """Dotted names -> values. `attention`, `ffn`, ... are the classes built; their knobs are the constructors' arguments,
    a tuple over the layers where these differ."""
    found: dict[str, Any] = {name: getattr(model, name) for name in _PLAIN}
    found["n_encoder_layers"] = model.encoder_layers
    found["final_norm"] = model.has_final_norm
    found["init.std"] = model.init.std
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found[name] = getattr(model, name)
    start = model.decoder_start_token_id
    found["decoder_start_token_id"] = model.pad_token_id if start is None and model.topology == "encoder_decoder" else start
    for axis in (f.name for f in dc.fields(model) if "axis" in f.metadata):
        component = getattr(model, axis)
        found[axis] = TABLE[axis][component.type].target
        found |= {f"{axis}.{f.name}": getattr(component, f.name) for f in dc.fields(component) if f.name != "type"}
        layers = [component.arguments(model, i) for i in range(max(model.n_layers, model.encoder_layers))]  # these are resolved
        for name in layers[0]:
            values = tuple(layer[name] for layer in layers)
            found[f"{axis}.{name.removeprefix(axis + '_')}"] = values[0] if all(v == values[0] for v in values) else values
    return found


def differences(a: dict[str, Any], b: dict[str, Any], *, training: bool = False) -> list[str]:
    """The names in which two descriptions differ, of those that change logits; training: of dropouts instead."""
    affects = marked(ModelConfig, "affects")
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return [name for name in names if (affects.get(name) == "dropout" if training else not among(name, affects))]
