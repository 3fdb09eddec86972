"""From a ModelConfig to a Transformer: the one place that calls constructors.

A component's constructor gets its own knobs, resolved (`config.arguments`), and whatever of the model's values it names:
dim, n_heads, n_layers, vocab_size, max_seq_len, dropout, layer (its index), causal, norm (a function of a size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from txtrain.config.convert import checked
from txtrain.model.block import Block, CrossBlock
from txtrain.model.config import ModelConfig
from txtrain.model.init import init_weights
from txtrain.model.mtp import FurtherToken
from txtrain.model.options import Component
from txtrain.model.stack import Stack
from txtrain.model.transformer import SentencePairTransformer, Transformer
from txtrain.registry import BASES, call, resolve


def build_model(config: ModelConfig) -> Transformer:
    """The model that the config describes, initialised by the family's rule from torch's generator.

    Under `torch.device("meta")` it is only described: no memory, no values (`to_empty` and `init_weights` give them later).

    Raises:
        ConfigError: the config is none, or illegal.
    """
    checked(config, ModelConfig, "config", "model")
    if torch.get_default_device().type == "meta":
        return transformer(config)
    with torch.device("meta"):
        model = transformer(config)
    model.to_empty(device=torch.get_default_device())
    init_weights(model)
    return model


def transformer(config: ModelConfig) -> Transformer:
    """The model on torch's default device, without initial values."""
    norm, two_stacks = make_norm(config), config.topology == "encoder_decoder"
    cls = SentencePairTransformer if config.head.next_sentence else Transformer
    return cls(
        config,
        embedding=make_embedding(config),
        position=construct("position", config.position, config, causal=config.topology != "encoder"),
        blocks=[make_block(config, layer, crossed=two_stacks) for layer in range(config.n_layers)],
        final_norm=norm(config.dim) if config.has_final_norm else None,
        head=construct("head", config.head, config),
        encoder=make_encoder(config) if two_stacks else None,
        encoder_embedding=make_embedding(config) if two_stacks and not config.share_embeddings else None,
        mtp=[make_further_token(config, config.n_layers + i) for i in range(config.mtp_depth)],
    )


def make_encoder(config: ModelConfig) -> Stack:
    """The stack that reads the source, beside a decoder."""
    return Stack(
        construct("position", config.position, config, causal=False),
        [make_block(config, layer) for layer in range(config.encoder_layers)],
        make_norm(config)(config.dim) if config.has_final_norm else None,
        causal=False,
        output_dropout=config.output_dropout,
    )


def make_embedding(config: ModelConfig) -> Any:
    norm = make_norm(config)(config.dim) if config.embedding.norm else None
    return construct("embedding", config.embedding, config, norm=norm)


def make_block(config: ModelConfig, layer: int, crossed: bool = False) -> Block:
    parts: dict[str, nn.Module] = {
        "attention": construct("attention", config.attention, config, layer),
        "attention_residual": construct("norm_position", config.residual, config, layer),
        "ffn": construct("ffn", config.ffn, config, layer),
        "ffn_residual": construct("norm_position", config.residual, config, layer),
    }
    if not crossed:
        return Block(**parts)
    # A window is of positions in one sequence: what crosses to the other sees all of it.
    across = construct("attention", config.attention, config, layer, window=None)
    return CrossBlock(cross_attention=across, cross_attention_residual=construct("norm_position", config.residual, config, layer), **parts)


def make_further_token(config: ModelConfig, layer: int) -> FurtherToken:
    """One module of multi-token prediction, its block as if it were that layer."""
    norm = make_norm(config)
    return FurtherToken(config.dim, norm, make_block(config, layer), norm(config.dim) if config.has_final_norm else None)


def make_norm(config: ModelConfig) -> Callable[[int], nn.Module]:
    return lambda size: construct("norm", config.norm, config, dim=size)


def construct(axis: str, component: Component, model: ModelConfig, layer: int = 0, **override: Any) -> Any:
    """The module of one option."""
    shared: dict[str, Any] = {
        "dim": model.dim,
        "n_heads": model.n_heads,
        "n_layers": model.n_layers,
        "vocab_size": model.vocab_size,
        "max_seq_len": model.max_seq_len,
        "dropout": model.dropout,
        "layer": layer,
        "causal": model.topology != "encoder",
    }
    if axis != "norm":
        shared["norm"] = make_norm(model)
    knobs = component.arguments(model, layer)
    return call(axis, component, shared | knobs | override, knobs)


_counted: dict[tuple[Any, str], int] = {}


def count_parameters(component: Component, model: ModelConfig, layer: int = 0, **override: Any) -> int:
    """Parameters of an option without a closed form, built on the meta device once for each model and layer."""
    axis = next(axis for axis, base in BASES.items() if isinstance(component, base))
    key = (resolve(axis, component.type), repr((component, model, layer, override)))
    if key not in _counted:
        with torch.device("meta"):
            module = construct(axis, component, model, layer, **override)
        _counted[key] = sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
    return _counted[key]
