"""The Transformer of 2017 is torch.nn.Transformer, which has neither embedding nor head."""

import pytest
import torch
from torch import nn

from tests.models import seeded, shake, tiny
from txtrain.model import options

PARTS = {  # a module of a layer -> ours
    "self_attn.out_proj": "attention.o_proj",
    "multihead_attn.out_proj": "cross_attention.o_proj",
    "linear1": "ffn.up_proj",
    "linear2": "ffn.down_proj",
}


def theirs_of(model, activation):
    """With the weights of ours. The paper has no norm after the last layer."""
    c = model.config
    of_layer = {"dim_feedforward": c.ffn.width(c), "dropout": 0.0, "activation": activation, "norm_first": c.norm_position == "pre", "batch_first": True}
    norms = [nn.LayerNorm(c.dim) if c.has_final_norm else None for _ in range(2)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(c.dim, c.n_heads, **of_layer), c.encoder_layers, norms[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(c.dim, c.n_heads, **of_layer), c.n_layers, norms[1])
    theirs = nn.Transformer(c.dim, c.n_heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    theirs.load_state_dict({name: value for stack, blocks in (("encoder", model.encoder), ("decoder", model)) for name, value in renamed(stack, blocks)})
    return theirs.eval()


def renamed(stack, ours):
    sublayers = ["attention", "ffn"] if stack == "encoder" else ["attention", "cross_attention", "ffn"]
    for i, block in enumerate(ours.blocks):
        parts = {**PARTS, **{f"norm{k}": f"{name}_residual.norm" for k, name in enumerate(sublayers, 1)}}
        for there, here in parts.items():
            if here.split(".")[0].removesuffix("_residual") in sublayers:
                for kind in ("weight", "bias"):
                    yield f"{stack}.layers.{i}.{there}.{kind}", block.get_parameter(f"{here}.{kind}")
        for there, here in (("self_attn", "attention"), ("multihead_attn", "cross_attention")):
            if here in sublayers:
                for kind in ("weight", "bias"):
                    joined = torch.cat([block.get_parameter(f"{here}.{name}_proj.{kind}") for name in "qkv"])
                    yield f"{stack}.layers.{i}.{there}.in_proj_{kind}", joined
    if ours.final_norm is not None:
        for kind in ("weight", "bias"):
            yield f"{stack}.norm.{kind}", ours.final_norm.get_parameter(kind)


@torch.no_grad()
@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("source_is_padded", [False, True])
def test_transformer_equals_torch_nn_transformer(norm_position, activation, source_is_padded):
    model = shake(
        seeded(
            tiny(
                topology="encoder_decoder",
                n_layers=2,
                n_encoder_layers=3,
                norm_position=norm_position,
                attention=options.AttentionConfig(type="mha", bias=True),
                ffn=options.MLPConfig(type="mlp", activation=activation, hidden_dim=50),
                position=options.SinusoidalConfig(type="sinusoidal"),
                norm=options.LayerNormConfig(type="layer"),
                embedding=options.TokenEmbeddingConfig(type="token", scale=True),
            )
        )
    ).eval()
    theirs = theirs_of(model, activation)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(0, 61, (2, n), generator=generator) for n in (11, 7))
    valid = torch.ones(2, 11, dtype=torch.bool)
    if source_is_padded:
        valid[1, 6:] = False

    def entering(ids):
        return model.position.add(model.embedding(ids), torch.arange(ids.shape[1])[None])

    mask = nn.Transformer.generate_square_subsequent_mask(7)
    hidden = theirs(entering(source), entering(target), tgt_mask=mask, src_key_padding_mask=~valid, memory_key_padding_mask=~valid, tgt_is_causal=True)
    logits = hidden @ model.embedding.token.weight.T
    ours = model(source, attention_mask=valid, decoder_input_ids=target).logits
    assert (ours - logits).abs().max() / logits.abs().max() < 1e-5
