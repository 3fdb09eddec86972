"""From a ModelConfig to a Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from txtrain.ground.convert import checked
from txtrain.model.block import Block, CrossBlock
from txtrain.model.config import ModelConfig
from txtrain.model.construct import construct, make_norm
from txtrain.model.init import init_weights
from txtrain.model.mtp import MTPModule
from txtrain.model.shapes_only import shapes_only, with_storage
from txtrain.model.stack import Stack
from txtrain.model.transformer import Transformer


def build_model(config: ModelConfig, pairs: type[Transformer] = Transformer) -> Transformer:
    """As `txtrain.build_model`. pairs: the class of a model with a next-sentence head."""
    checked(config, ModelConfig, "config", "model")
    device = torch.get_default_device()
    with shapes_only():
        model = transformer(config, pairs)
    if device.type == "meta":
        return model
    init_weights(with_storage(model, device))
    return model


def transformer(config: ModelConfig, pairs: type[Transformer] = Transformer) -> Transformer:
    """The model on torch's default device, uninitialised."""
    norm, two_stacks = make_norm(config), config.topology == "encoder_decoder"
    return (pairs if config.head.next_sentence else Transformer)(
        config,
        embedding=make_embedding(config),
        position=construct("position", config.position, config, causal=config.topology != "encoder"),
        blocks=[make_block(config, layer, crossed=two_stacks) for layer in range(config.n_layers)],
        final_norm=norm(config.dim) if config.has_final_norm else None,
        head=construct("head", config.head, config),
        encoder=make_encoder(config) if two_stacks else None,
        encoder_embedding=make_embedding(config) if two_stacks and not config.share_embeddings else None,
        mtp=[make_mtp(config, config.n_layers + i) for i in range(config.mtp_depth)],
    )


def make_encoder(config: ModelConfig) -> Stack:
    position = construct("position", config.position, config, causal=False)
    blocks = [make_block(config, layer) for layer in range(config.encoder_layers)]
    final_norm = make_norm(config)(config.dim) if config.has_final_norm else None
    return Stack(position, blocks, final_norm, causal=False, output_dropout=config.output_dropout)


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
    across = construct("attention", config.attention, config, layer, window=None)  # windows are within one sequence
    across_residual = construct("norm_position", config.residual, config, layer)
    return CrossBlock(cross_attention=across, cross_attention_residual=across_residual, **parts)


def make_mtp(config: ModelConfig, layer: int) -> MTPModule:
    norm = make_norm(config)
    return MTPModule(config.dim, norm, make_block(config, layer), norm(config.dim) if config.has_final_norm else None)
