"""Closed forms equal the built model: parameters, matrix products, what a cache holds."""

import dataclasses as dc
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.draws import legal_models
from tests.models import ids, seeded, tiny
from txtrain.model import flops, options, stack
from txtrain.model.config import ModelConfig
from txtrain.model.ffn import moe
from txtrain.model.transformer import Transformer

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
MORE = settings(max_examples=2000, deadline=None)
BATCH = 3
MOE = options.MoEConfig(type="moe", n_experts=4, top_k=2, n_shared=1, dense_layers=1)
MLA = options.MLAConfig(type="mla", q_rank=10, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5)


def inputs(config: ModelConfig, seq_len: int, target_len: int) -> dict[str, torch.Tensor]:
    if config.embedding.type == "patch":
        side = config.embedding.image_size
        return {"pixel_values": torch.ones(BATCH, config.embedding.n_channels, side, side)}
    target = {"decoder_input_ids": ids(BATCH, target_len)} if config.topology == "encoder_decoder" else {}
    return {"input_ids": ids(BATCH, seq_len), **target}


def counted(model: Transformer, given_inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Forward, and forward and backward, as torch counts them: attention by the plain formula, experts by the loop."""
    with (
        mock.patch.object(stack, "choose_kernel", return_value="plain"),
        mock.patch.object(moe, "_grouped_mm_takes", return_value=False),
        FlopCounterMode(display=False) as counter,
    ):
        out = model(**given_inputs)
        forward = counter.get_total_flops()
        made = [out.logits, out.nsp_logits, *(out.mtp_logits or ())]
        sum(x.sum() for x in made if x is not None).backward()
    return forward, counter.get_total_flops()


def closed_forms_equal_the_built_model(config: ModelConfig, seq_len: int = 12, target_len: int = 7) -> None:
    seq_len = config.max_seq_len if config.embedding.type == "patch" else seq_len
    model = seeded(config)
    built = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(built.values()) == config.n_params
    assert built.get("mtp", 0) == config.n_params_by_part()["mtp"]
    forward, both = counted(model, inputs(config, seq_len, target_len))
    assert forward == config.forward_flops(BATCH, seq_len, target_len)
    parts = flops.forward_by_part(config, seq_len, target_len, dense=True, training=True)
    assert both == round(BATCH * flops.training_flops(parts))


lengths = st.integers(1, 20)


@QUICK
@given(legal_models, lengths, lengths)
def test_closed_forms_equal_the_built_model(config, seq_len, target_len):
    closed_forms_equal_the_built_model(config, seq_len, target_len)


@pytest.mark.slow
@MORE
@given(legal_models, lengths, lengths)
def test_closed_forms_equal_the_built_model_many_draws(config, seq_len, target_len):
    closed_forms_equal_the_built_model(config, seq_len, target_len)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": MLA},
        {"attention": MLA, "topology": "encoder_decoder", "n_encoder_layers": 1, "share_embeddings": False},
        {"attention": options.MLAConfig(type="mla"), "topology": "encoder"},
        {"ffn": MOE},
        {"ffn": MOE, "topology": "encoder_decoder"},
        {"ffn": dc.replace(MOE, type="moe_softmax", gate="softmax", n_shared=0, dense_layers=0), "mtp_depth": 2},
        {"ffn": MOE, "attention": MLA, "mtp_depth": 3},
    ],
)
def test_latents_experts_and_further_tokens_are_counted(changes):
    closed_forms_equal_the_built_model(tiny(**changes))


def test_of_a_sequence_shorter_than_the_further_tokens_nothing_is_counted_twice():
    closed_forms_equal_the_built_model(tiny(mtp_depth=3), seq_len=2)


@pytest.mark.parametrize(("head", "n_targets"), [("mlm", 3), ("mlm", 12), ("lm", 3)])
def test_of_masked_lm_the_operations_that_a_training_step_does_are_counted(head, n_targets):
    """BERT's head skips what is no target; a plain one does not."""
    heads = {"mlm": options.MLMHeadConfig(type="mlm", next_sentence=True), "lm": options.LMHeadConfig(type="lm")}
    config = tiny(topology="encoder", head=heads[head], position=options.LearnedConfig(type="learned"))
    model = seeded(config)
    labels = torch.full((BATCH, 12), -100)
    labels[:, :n_targets] = 5
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch counts only the one that makes a new tensor
    with mock.patch.object(stack, "choose_kernel", return_value="plain"), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        out = model(ids(BATCH, 12), labels=labels, return_logits=False)
        (out.loss + (0 if out.nsp_logits is None else out.nsp_logits.sum())).backward()
    assert counter.get_total_flops() == round(BATCH * config.flops_per_sample(12, target_share=n_targets / 12))


# ---------------------------------------------------------------------------------------------------------------- conventions


def useful(config: ModelConfig, seq_len: int) -> float:
    return sum(flops.forward_by_part(config, seq_len, dense=False).values())


@pytest.mark.parametrize(("topology", "width"), [("decoder", 4), ("encoder", 7)])
def test_a_window_counts_as_the_positions_within_reach(topology, width):
    """To one side of a causal stack, to both sides of an encoder."""
    whole = tiny(topology=topology)
    windowed = tiny(topology=topology, attention=options.AttentionConfig(type="mha", window=4))
    hidden = whole.n_layers * 20 * (20 - width) * 4 * whole.dim
    assert useful(whole, 20) - useful(windowed, 20) == hidden
    assert windowed.forward_flops(1, 20) == whole.forward_flops(1, 20), "the plain formula computes what the mask hides"
    assert useful(windowed, 3) == useful(whole, 3), "nothing is hidden yet"


def test_a_decoder_without_windows_costs_what_the_palm_paper_says():
    """6 N + 12 L H Q T a token, N without the embedding that is only looked up (2204.02311, appendix B)."""
    config = tiny(tie_word_embeddings=False, norm=options.NoNormConfig(type="none"))
    n = config.n_params - config.vocab_size * config.dim
    assert config.flops_per_token(24) == 6 * n + 12 * config.n_layers * config.dim * 24


def test_pixels_need_no_gradient():
    config = tiny(
        topology="encoder",
        embedding=options.PatchEmbeddingConfig(type="patch", image_size=8, patch_size=2, n_channels=3),
        head=options.ClassHeadConfig(type="class", n_classes=5),
        vocab_size=0,
        max_seq_len=17,
        tie_word_embeddings=False,
    )
    forward = flops.forward_by_part(config, 17, dense=False)
    assert forward["embedding"] == 16 * 2 * config.dim * 3 * 4
    assert config.flops_per_token(17) * 17 == pytest.approx(3 * sum(forward.values()) - forward["embedding"], rel=1e-12)


def test_a_users_attention_without_closed_forms_is_counted_from_the_module():
    class Mean(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.proj = nn.Linear(dim, dim, bias=False)

        def forward(self, x, context):
            return self.proj(x)

    from txtrain.registry import TABLE, register

    register("attention", "mean", Mean, options.AttentionBase)
    try:
        config = tiny(attention=options.AttentionBase(type="mean"))
        assert config.attention.flops(config, 10) == 2 * config.dim**2
        assert flops.cache_values(config, 5) == 2 * 5 * 2 * config.dim
    finally:
        del TABLE["attention"]["mean"]


# ---------------------------------------------------------------------------------------------------------------------- cache

CACHED = [
    {},
    {"attention": options.AttentionConfig(type="gqa", n_kv_heads=2, head_dim=6)},
    {"attention": options.AttentionConfig(type="mqa", n_kv_heads=1, window=(4, None))},
    {"attention": options.AttentionConfig(type="mha", window=1)},
    {"attention": MLA},
    {"topology": "encoder_decoder", "attention": options.AttentionConfig(type="gqa", n_kv_heads=2, window=4)},
    {"topology": "encoder_decoder", "attention": MLA},
]


@pytest.mark.parametrize("changes", CACHED)
@pytest.mark.parametrize("length", [2, 9])
def test_a_cache_holds_what_the_closed_form_says(changes, length):
    config = tiny(**changes)
    model, source_len = seeded(config).eval(), 0
    with torch.no_grad():
        if config.topology == "encoder_decoder":
            source_len = 6
            cache = model(ids(1, source_len), decoder_input_ids=ids(1, length), use_cache=True).past_key_values
        else:
            cache = model(ids(1, length), use_cache=True).past_key_values
    held = sum(layer.n_held * b.shape[1] * b.shape[3] for layer in cache.layers for b in layer.buffers)
    held += sum(x.numel() for cross in cache.cross for x in cross.buffers)
    assert held == flops.cache_values(config, length, source_len)
    assert config.cache_bytes(length, source_len, bytes_per_value=4) == 4 * held


def test_a_token_adds_the_same_until_windows_are_full():
    config = tiny(attention=options.AttentionConfig(type="mha", window=(4, None)))
    added = [flops.cache_values(config, n + 1) - flops.cache_values(config, n) for n in range(5)]
    assert added == [2 * 2 * 32] * 3 + [2 * 32] * 2
    assert flops.cache_values_per_token(config) == added[0]


def test_an_encoder_keeps_nothing():
    config = tiny(topology="encoder")
    assert (config.cache_bytes(10), flops.cache_values_per_token(config)) == (0, 0)
