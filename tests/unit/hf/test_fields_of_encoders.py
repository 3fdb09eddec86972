"""BERT, ViT, T5 and Marian: fields that would change the numbers, and models that no class equals. Without transformers."""

import json
import time

import pytest
import torch

from tests.models import replace, seeded, shake, tiny
from tests.unit.hf.folders import config_of, edit_config, rewrite, tensors
from txtrain.errors import ConfigError
from txtrain.hf.load import load_pretrained
from txtrain.hf.registry import class_of, read_config
from txtrain.hf.save import save_pretrained
from txtrain.model import options

MHA, MLP = options.AttentionConfig(type="mha", bias=True), options.MLPConfig(type="mlp", activation="relu")
LAYER, LEARNED = options.LayerNormConfig(type="layer"), options.LearnedConfig(type="learned")
BERT = tiny(
    topology="encoder",
    norm_position="post",
    attention=MHA,
    ffn=MLP,
    position=LEARNED,
    norm=LAYER,
    embedding=options.TokenEmbeddingConfig(type="token", norm=True, n_types=2),
    head=options.MLMHeadConfig(type="mlm", activation="relu"),
)
VIT = replace(
    BERT,
    norm_position="pre",
    vocab_size=0,
    max_seq_len=17,
    embedding=options.PatchEmbeddingConfig(type="patch", image_size=8, patch_size=2),
    head=options.ClassHeadConfig(type="class", n_classes=3),
    tie_word_embeddings=False,
)
T5 = tiny(
    topology="encoder_decoder",
    n_encoder_layers=1,
    attention=options.AttentionConfig(type="mha", scale=1.0),
    ffn=options.MLPConfig(type="mlp", activation="relu", bias=False),
    position=options.RelativeConfig(type="relative"),
    head=options.LMHeadConfig(type="lm", scale=True),
    pad_token_id=0,
)
T5_V1_1 = replace(T5, ffn=options.GatedConfig(type="geglu", activation="gelu_tanh"), head=options.LMHeadConfig(type="lm"), tie_word_embeddings=False)
MARIAN = tiny(
    family="transformer",
    topology="encoder_decoder",
    norm_position="post",
    attention=MHA,
    ffn=MLP,
    position=options.SinusoidalConfig(type="sinusoidal", layout="halves"),
    norm=LAYER,
    head=options.LMHeadConfig(type="lm", bias=True),
    pad_token_id=0,
)
MODELS = {"bert": BERT, "vit": VIT, "t5": T5, "t5_v1_1": T5_V1_1, "marian": MARIAN}


@pytest.fixture
def folder(tmp_path):
    def made(name):
        save_pretrained(shake(seeded(MODELS[name])), tmp_path)
        return tmp_path

    return made


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("bert", {"num_attention_heads": 3}, "n_heads"),
        ("bert", {"type_vocab_size": "2"}, "type_vocab_size"),
        ("bert", {"embedding_size": 16}, "embedding_size"),
        ("bert", {"pad_token_id": 61}, "padding_idx"),
        ("vit", {"qkv_bias": False}, "qkv_bias"),
        ("vit", {"image_size": [8, 12]}, "image_size"),
        ("vit", {"patch_size": 0}, "patch_size"),
        ("vit", {"patch_size": 3}, "image_size"),
        ("vit", {"id2label": ["a", "b", "c"]}, "id2label"),
        ("vit", {"num_labels": 4}, "num_labels"),
        ("vit", {"use_mask_token": True}, "use_mask_token"),
        ("t5", {"feed_forward_proj": "swiglu"}, "feed_forward_proj"),
        ("t5", {"feed_forward_proj": "gated-quick_gelu", "is_gated_act": True}, "feed_forward_proj"),
        ("t5", {"feed_forward_proj": ["relu"]}, "feed_forward_proj"),
        ("t5", {"dense_act_fn": "quick_gelu"}, "dense_act_fn"),
        ("t5", {"is_gated_act": True}, "is_gated_act"),
        ("t5", {"relative_attention_num_buckets": 7}, "n_buckets"),
        ("t5", {"relative_attention_max_distance": 16}, "max_distance"),
        ("t5", {"relative_attention_bidirectional": False}, "relative_attention_bidirectional"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder"),
        ("t5", {"scale_decoder_outputs": 1}, "scale_decoder_outputs"),
        ("marian", {"decoder_attention_heads": 2}, "decoder_attention_heads"),
        ("marian", {"decoder_ffn_dim": 7}, "decoder_ffn_dim"),
        ("marian", {"decoder_vocab_size": 60}, "decoder_vocab_size"),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings"),
        ("marian", {"normalize_before": True}, "normalize_before"),
        ("marian", {"normalize_embedding": True}, "normalize_embedding"),
        ("marian", {"decoder_layerdrop": 0.1}, "decoder_layerdrop"),
        ("marian", {"num_decoder_layers": 3}, "num_decoder_layers"),
    ],
)
def test_a_field_that_would_change_the_numbers_is_refused_by_name(name, changes, said, folder):
    with pytest.raises(ConfigError, match=f"{said}`") as e:
        load_pretrained(edit_config(folder(name), **changes))
    assert "config.json" in str(e.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {"classifier_dropout": 0.1}),
        ("bert", {"position_embedding_type": "absolute"}),
        ("vit", {"encoder_stride": 8, "pooler_act": "relu"}),
        ("vit", {"image_size": [8, 8]}),
        ("t5", {"classifier_dropout": 0.2, "task_specific_params": {"a": 1}}),
        ("t5", {"dense_act_fn": ..., "is_gated_act": ...}),
        ("t5_v1_1", {"dense_act_fn": ..., "is_gated_act": ...}),
        ("marian", {"num_hidden_layers": 6, "bad_words_ids": [[1]], "normalize_before": False}),
    ],
)
def test_other_fields_are_let_through(name, changes, folder):
    assert load_pretrained(edit_config(folder(name), **changes)).config == replace(load_pretrained(folder(name)).config)


def test_what_t5_keeps_beside_the_word_counts(folder):
    """The class reads dense_act_fn, which another release may have written."""
    assert load_pretrained(edit_config(folder("t5_v1_1"), dense_act_fn="silu")).config.ffn.activation == "silu"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("bert", field) for field in ("num_hidden_layers", "vocab_size", "max_position_embeddings", "type_vocab_size")),
        *(("vit", field) for field in ("num_hidden_layers", "image_size", "num_channels", "intermediate_size")),
        *(("t5", field) for field in ("num_layers", "num_decoder_layers", "vocab_size", "d_kv", "relative_attention_num_buckets")),
        *(("marian", field) for field in ("encoder_layers", "decoder_layers", "d_model")),
    ],
)
def test_a_config_that_claims_any_size_is_refused_before_memory_is_taken(name, field, folder):
    path = folder(name)
    assert field in config_of(path)
    begin = time.perf_counter()
    with pytest.raises(ConfigError):
        load_pretrained(edit_config(path, **{field: 2_000_000_000}))
    assert time.perf_counter() - begin < 2.0


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_an_extra_and_a_bent_tensor_are_named(name, folder):
    path = folder(name)
    weights = tensors(path)
    some = sorted(weights)[3]
    without = {("another" if name == some else name): tensor for name, tensor in weights.items()}
    for changed in (without, weights | {some: weights[some][..., None].clone()}):
        with pytest.raises(ConfigError, match=some.replace(".", r"\.")):
            load_pretrained(rewrite(path, changed))
    with pytest.raises(ConfigError, match="something"):
        load_pretrained(rewrite(path, weights | {"something.weight": torch.ones(1)}))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_told_without_torch_is_what_is_loaded(name, folder):
    assert read_config(folder(name))[1] == load_pretrained(folder(name)).config


def test_a_pickle_of_both_spellings_of_a_tensor_is_refused(folder):
    path = folder("vit")
    weights = tensors(path)
    weights["vit.layers.0.mlp.fc1.bias"] = weights["vit.encoder.layer.0.intermediate.dense.bias"].clone()
    with pytest.raises(ConfigError, match=r"vit\.layers\.0\.mlp\.fc1\.bias"):
        load_pretrained(rewrite(path, weights))


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        (BERT, {"norm_position": "pre"}, "norm_position"),
        (BERT, {"embedding": options.TokenEmbeddingConfig(type="token", norm=True)}, "n_types is 0"),
        (BERT, {"head": options.MLMHeadConfig(type="mlm", activation="gelu")}, "head.activation"),
        (BERT, {"attention": options.AttentionConfig(type="mha", bias=True, window=4)}, "attention.window"),
        (VIT, {"head": options.ClassHeadConfig(type="class", n_classes=3, pooling="mean")}, "head.pooling"),
        (VIT, {"embedding": options.PatchEmbeddingConfig(type="patch", image_size=8, patch_size=2, class_token=False), "max_seq_len": 16}, "class_token"),
        (T5, {"attention": MHA}, "attention"),
        (T5, {"share_embeddings": False}, "share_embeddings"),
        (MARIAN, {"position": options.SinusoidalConfig(type="sinusoidal")}, "position.layout is interleaved"),
        (MARIAN, {"n_encoder_layers": 4, "attention": options.AttentionConfig(type="mha", bias=True, window=(None, None, None, 5))}, "attention.window"),
        (MARIAN, {"norm": options.RMSNormConfig(type="rms")}, "norm is rms"),
    ],
)
def test_a_model_that_no_class_equals_is_refused_with_the_reason(model, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        class_of(replace(model, **changes))


def test_dropouts_that_t5_has_no_place_for_are_told(tmp_path):
    model = seeded(replace(T5, dropout=0.1, output_dropout=0.1))
    with pytest.warns(UserWarning, match=r"ffn\.dropout"):
        save_pretrained(model, tmp_path)


def test_a_model_that_answers_knows_what_its_answer_begins_with(tmp_path):
    save_pretrained(seeded(MARIAN), tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["decoder_start_token_id"] == 0
