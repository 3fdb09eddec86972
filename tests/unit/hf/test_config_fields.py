import json

import pytest

from tests.models import tiny
from tests.unit.hf.folders import config_of, edit_config, llama
from txtrain.errors import ConfigError
from txtrain.hf.fields import pattern
from txtrain.hf.load import load_pretrained
from txtrain.hf.registry import CLASSES, class_of
from txtrain.model import options

GEMMA2 = {
    "family": "gemma2",
    "attention": options.AttentionConfig(type="gqa", n_kv_heads=2, window=(4, None), softcap=20.0),
    "ffn": options.GatedConfig(type="geglu", activation="gelu_tanh"),
    "norm": options.RMSNormConfig(type="rms", unit_offset=True),
    "embedding": options.TokenEmbeddingConfig(type="token", scale=True),
    "norm_position": "sandwich",
    "logit_softcap": 9.0,
}
GPT2 = {
    "family": "gpt2",
    "attention": options.AttentionConfig(type="mha", bias=True),
    "ffn": options.MLPConfig(type="mlp"),
    "norm": options.LayerNormConfig(type="layer"),
    "position": options.LearnedConfig(type="learned"),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"attention_multiplier": 0.2}, "attention_multiplier"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_attention_heads": 0}, "n_heads"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"vocab_size": -61}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"pad_token_id": 61}, "padding_idx"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "lama"}, "Did you mean llama"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_theta": 5.0}, "rope_theta"),  # rope_parameters says 10000
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}, "rope_parameters": ...}, "'proportional'"),
        ({"rope_scaling": {"type": "mrope"}, "rope_parameters": ...}, "'mrope'"),
        ({"rope_scaling": {"rope_type": "dynamic"}, "rope_parameters": ...}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1], "short_factor": [1]}, "rope_parameters": ...}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}, "rope_parameters": ...}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}, "rope_parameters": ...}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}, "rope_parameters": ...}, "`beta`"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),  # contradicts rope_parameters
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}, "rope_parameters": ...}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}, "rope_parameters": ...}, "`original_max_position_embeddings` must be at least 1"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "x"}, "rope_parameters": ...}, "`original_max_position_embeddings` must be an integer"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": ..., "max_position_embeddings": None}, "`max_position_embeddings` must be an integer"),
    ],
)
def test_a_field_that_would_change_the_numbers_is_refused_by_name(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as e:
        load_pretrained(edit_config(llama(tmp_path), **changes))
    assert str(tmp_path / "config.json") in str(e.value)


@pytest.mark.parametrize("changes", [{"use_cache": False}, {"torch_dtype": "float16"}, {"temperature": 0.6}, {"id2label": {"0": "x"}}, {"pretraining_tp": 2}])
def test_fields_that_change_no_numbers_are_let_through(changes, tmp_path):
    before = load_pretrained(llama(tmp_path)).config
    assert load_pretrained(edit_config(tmp_path, **changes)).config == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"embd_pdrop": 0.3}, "`embd_pdrop` must be resid_pdrop"),
    ],
)
def test_fields_of_gpt2_that_would_change_the_numbers_are_refused(changes, said, tmp_path):
    llama(tmp_path, **GPT2)
    assert config_of(tmp_path)["model_type"] == "gpt2"
    with pytest.raises(ConfigError, match=said):
        load_pretrained(edit_config(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"layer_types": ["full_attention"]}, {"layer_types": ["chunked_attention"] * 2}, {"query_pre_attn_scalar": 0}])
def test_fields_of_gemma2_are_checked(changes, tmp_path):
    llama(tmp_path, **GEMMA2)
    assert config_of(tmp_path)["model_type"] == "gemma2"
    with pytest.raises(ConfigError, match=next(iter(changes))):
        load_pretrained(edit_config(tmp_path, **changes))


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as e:
        load_pretrained(edit_config(llama(tmp_path), quantization_config={}, vocab_size=..., wat=1))
    assert len(e.value.problems) == 3


def test_gpt2_ids_beyond_a_small_vocabulary_are_kept(tmp_path):
    """GPT2Config has 50256 whatever the vocabulary is."""
    llama(tmp_path, **GPT2)
    assert load_pretrained(edit_config(tmp_path, bos_token_id=..., eos_token_id=...)).config.eos_token_id == 50256


def test_a_mapping_of_every_class_is_its_own_inverse():
    for c in CLASSES:
        ours = [getattr(part, "path", part.names) for part in c.parts]
        assert len(set(ours)) == len(ours), c.architecture
        names = [name for part in c.parts for name in part.names]
        assert len(set(names)) == len(names), c.architecture
        assert set(c.defaults) <= set(names), c.architecture


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"family": "gpt2"}, "LlamaForCausalLM"),  # by structure
        ({"family": "mistral"}, "MistralForCausalLM"),  # both are equal: then the label may say
        ({"attention": options.AttentionConfig(type="mqa", n_kv_heads=1, window=5)}, "MistralForCausalLM"),
        ({"n_heads": 5, "attention": options.AttentionConfig(type="mha", head_dim=8)}, "MistralForCausalLM"),  # Llama wants 5 to divide dim
        (GPT2, "GPT2LMHeadModel"),
        ({**GPT2, "norm_position": "post"}, "OpenAIGPTLMHeadModel"),
        ({**GPT2, "position": options.RoPEConfig(type="rope")}, None),
        (GEMMA2, "Gemma2ForCausalLM"),
        ({**GEMMA2, "norm_position": "pre", "logit_softcap": None, "attention": options.AttentionConfig(type="mha")}, "GemmaForCausalLM"),
        ({"norm_position": "sandwich"}, None),
        ({"attention": options.AttentionConfig(type="mha", qk_norm=True)}, None),
        ({"attention": options.AttentionConfig(type="mha", scale=0.1)}, None),
        ({"position": options.RoPEConfig(type="rope", scaling=options.NTKScaling(rope_type="ntk", factor=2.0))}, "LlamaForCausalLM"),
        ({**GEMMA2, "attention": options.AttentionConfig(type="mha", window=(4, 8))}, None),
    ],
)
def test_the_class_is_found_by_structure(changes, architecture):
    config = tiny(**changes)
    if architecture is None:
        with pytest.raises(ConfigError, match="Nearest: "):
            class_of(config)
    else:
        assert class_of(config).architecture == architecture
        assert not list(config.check())


def test_the_refusal_says_what_differs():
    with pytest.raises(ConfigError, match=r"Nearest: LlamaForCausalLM, but attention\.qk_norm is True, not False"):
        class_of(tiny(attention=options.AttentionConfig(type="mha", qk_norm=True)))


def test_a_dropout_that_the_class_has_no_field_for_is_told(tmp_path):
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no place for dropout = 0.1"):
        llama(tmp_path, dropout=0.1)


@pytest.mark.parametrize(
    ("windows", "expected"), [([4, None, 4, None], (4, None)), ([4, 4, 4], 4), ([None, None], None), ([4, None, 4], (4, None)), ([4, 4, None], (4, 4, None))]
)
def test_windows_are_written_as_the_shortest_pattern(windows, expected):
    assert pattern(windows) == expected


def test_both_spellings_of_rotary_positions_are_written(tmp_path):
    scaling = options.LinearScaling(rope_type="linear", factor=2.0)
    config = config_of(llama(tmp_path, position=options.RoPEConfig(type="rope", theta=500.0, scaling=scaling)))
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] is None
