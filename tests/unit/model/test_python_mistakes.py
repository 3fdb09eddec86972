"""Whatever is wrong with an argument of the Python API is a ConfigError that names it, and nothing is done then."""

import dataclasses as dc
import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import txtrain
from tests.models import ids, seeded, tiny
from txtrain.model import options
from txtrain.model.beam_search import beam_search
from txtrain.model.shape import InitConfig

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
TOKENS = ids(batch=2, length=6)
IMAGES = tiny(
    topology="encoder",
    embedding=options.PatchEmbeddingConfig(type="patch", image_size=8, patch_size=2, n_channels=3),
    head=options.ClassHeadConfig(type="class", n_classes=5),
    vocab_size=0,
    max_seq_len=17,
    tie_word_embeddings=False,
)
MODELS = {
    "decoder": tiny(position=options.LearnedConfig(type="learned")),
    "two stacks": tiny(topology="encoder_decoder", pad_token_id=0),
    "encoder": tiny(
        topology="encoder",
        head=options.MLMHeadConfig(type="mlm"),
        embedding=options.TokenEmbeddingConfig(type="token", n_types=2),
    ),
    "classes": tiny(head=options.ClassHeadConfig(type="class", n_classes=5, pooling="last")),
    "images": IMAGES,
}


@functools.cache
def model(name: str) -> Any:
    return seeded(MODELS[name]).eval()


def refused(call: Any, *args: Any, names: str, **given: Any) -> str:
    with pytest.raises(txtrain.ConfigError) as e:
        call(*args, **given)
    assert f"`{names}" in str(e.value), str(e.value)
    return str(e.value)


# ------------------------------------------------------------------------------------------------------ generate

WRONG = {
    "max_new_tokens": st.one_of(st.integers(max_value=0), st.sampled_from(["3", None, 2.0, True])),
    "temperature": st.one_of(st.floats(max_value=-1e-9), st.sampled_from(["hot", None, float("nan"), True])),
    "top_k": st.one_of(st.integers(max_value=0), st.sampled_from(["3", 1.5, False])),
    "top_p": st.one_of(st.floats(max_value=0), st.floats(min_value=1.001), st.sampled_from(["x"])),
    "min_p": st.one_of(st.floats(max_value=0), st.floats(min_value=1.001), st.sampled_from(["x"])),
    "seed": st.one_of(st.integers(min_value=2**64), st.sampled_from(["x", 1.5])),
    "eos_token_id": st.one_of(st.integers(max_value=-1), st.sampled_from(["x", 1.5, ("a",), (None,)])),
    "pad_token_id": st.one_of(st.integers(max_value=-1), st.sampled_from(["x", 1.5])),
    "on_token": st.just(3),
    "input_ids": st.sampled_from(
        [
            *(None, [[1, 2]], TOKENS[0], TOKENS[None], TOKENS[:, :0], TOKENS[:0]),
            *(TOKENS.float(), TOKENS + 61, TOKENS - 61),
        ]
    ),
    "attention_mask": st.sampled_from(
        [
            *([[1] * 6] * 2, torch.ones(2, 5), torch.ones(2, 7), torch.ones(6)),
            torch.zeros(2, 6),  # nothing but padding
        ]
    ),
    "model": st.sampled_from([None, "gpt2", nn.Linear(2, 2)]),
}


@QUICK
@given(st.sampled_from(sorted(WRONG)).flatmap(lambda name: st.tuples(st.just(name), WRONG[name])))
def test_generate_names_the_argument_that_is_wrong(mistake):
    name, value = mistake
    sound = {"model": model("decoder"), "input_ids": TOKENS, "max_new_tokens": 2, "temperature": 1.0}
    refused(txtrain.generate, names=name, **sound | {name: value})
    if name in ("input_ids", "attention_mask", "max_new_tokens", "model"):
        del sound["temperature"]
        refused(beam_search, names=name, **sound | {"eos_token_id": 3, name: value})


sound_sampling = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 3), "temperature": st.floats(0, 3)},
    optional={
        "top_k": st.integers(1, 100) | st.none(),
        "top_p": st.floats(0.01, 1) | st.none(),
        "min_p": st.floats(0.01, 1) | st.none(),
        "seed": st.integers(-5, 2**63) | st.none(),
        "eos_token_id": st.sampled_from([None, 3, (3, 4), [3], "config", 50_256]),
    },
)


@QUICK
@given(sound_sampling, st.sampled_from(["decoder", "two stacks"]), st.sampled_from([torch.int64, torch.int32]))
def test_generate_takes_all_that_is_sound(how, name, dtype):
    out = txtrain.generate(model(name), TOKENS.to(dtype), torch.ones(2, 6), **how)
    assert len(out) == 2
    assert int(out.min()) >= 0
    assert int(out.max()) < 61


def test_what_fills_ended_rows_is_read_again_and_must_be_a_token():
    wrong = {"eos_token_id": 3, "pad_token_id": 61}
    refused(txtrain.generate, model("decoder"), TOKENS, **wrong, names="pad_token_id` must be from 0 to 60")


@pytest.mark.parametrize("name", ["encoder", "classes", "images"])
def test_a_model_that_writes_nothing_does_not_generate(name):
    refused(txtrain.generate, model(name), TOKENS, names="model")


# ------------------------------------------------------------------------------------------------------- forward

PIXELS = torch.zeros(2, 3, 8, 8)
SOUND: dict[str, dict[str, Any]] = {
    "decoder": {"input_ids": TOKENS, "attention_mask": torch.ones(2, 6), "labels": TOKENS},
    "two stacks": {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4], "labels": TOKENS[:, :4]},
    "encoder": {"input_ids": TOKENS, "token_type_ids": TOKENS % 2, "labels": TOKENS},
    "classes": {"input_ids": TOKENS, "labels": TOKENS[:, 0] % 5},
    "images": {"pixel_values": PIXELS, "labels": TOKENS[:, 0] % 5},
}
BAD_ROWS = [[[1, 2]], TOKENS[0], TOKENS[:, :3], TOKENS[:1].expand(3, -1), TOKENS.float()]  # beside 2 rows of 6
BAD: dict[str, dict[str, list[Any]]] = {
    "decoder": {
        "input_ids": [None, "x", [[1, 2]], TOKENS[0], TOKENS[:, :0], TOKENS.float(), TOKENS + 61, TOKENS - 61],
        "attention_mask": [TOKENS[0], TOKENS[:, :5], torch.ones(2, 1, 6, 6), torch.ones(1, 6)],
        "position_ids": [*BAD_ROWS, TOKENS + 61],
        "document_ids": BAD_ROWS,
        "token_type_ids": [*BAD_ROWS[:3], TOKENS],
        "prefix_mask": BAD_ROWS[:4],
        "labels": [*BAD_ROWS, TOKENS + 61],
        "inputs_embeds": [torch.zeros(2, 6, 32)],  # beside ids
        "pixel_values": [PIXELS],
        "decoder_input_ids": [TOKENS],
        "decoder_attention_mask": [TOKENS],
        "past_key_values": [((1, 2),), "x"],
        "logits_to_keep": [-1, 2, "x", torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)],
    },
    "two stacks": {
        "input_ids": [None, TOKENS[0], TOKENS[:1], TOKENS + 61],
        "decoder_input_ids": [TOKENS[0], TOKENS[:1, :4], TOKENS[:, :4].float(), TOKENS[:, :4] + 61],
        "decoder_attention_mask": [torch.ones(2, 6), torch.ones(1, 4)],
        "decoder_position_ids": [TOKENS],
        "decoder_document_ids": [TOKENS],
        "labels": [TOKENS, TOKENS[0]],
    },
    "encoder": {
        "token_type_ids": [TOKENS % 2 + 1, *BAD_ROWS],
        "labels": BAD_ROWS,
        "next_sentence_label": [TOKENS, TOKENS[:1, 0], [0, 1]],
    },
    "classes": {"labels": [TOKENS, TOKENS[0], TOKENS[:, 0] % 5 + 5], "logits_to_keep": [1]},
    "images": {
        "pixel_values": [None, PIXELS[0], PIXELS[:, :1], PIXELS[..., :7], [1]],
        "labels": [TOKENS, TOKENS[0]],
        "input_ids": [TOKENS],
    },
}
# What an error may be about beside the wrong input: the one that it contradicts, or that takes its place.
RELATED = {
    ("input_ids", "decoder"): ("attention_mask", "labels", "inputs_embeds"),
    ("input_ids", "two stacks"): ("decoder_input_ids",),
    ("decoder_input_ids", "two stacks"): ("labels",),
}


@pytest.mark.parametrize("name", MODELS)
def test_sound_inputs_are_taken(name):
    for return_logits in (True, False):
        assert model(name)(**SOUND[name], return_logits=return_logits).loss.isfinite()


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, bad in BAD.items() for given in bad])
def test_forward_names_the_input_that_is_wrong(name, given):
    for value in BAD[name][given]:
        for return_logits in (True, False):
            with pytest.raises(txtrain.ConfigError) as e:
                model(name)(**{**SOUND[name], given: value, "return_logits": return_logits})
            related = RELATED.get((given, name), ())
            said = str(e.value)
            assert any(word in said for word in (given, *related)), f"{given}={value}: {said}"


def test_labels_alone_must_be_of_the_vocabulary_too():
    """-1 is no label that is ignored: it was read as token 0 where logits are made by chunks."""
    for return_logits in (True, False):
        labels = TOKENS.clone()
        labels[0, 2] = -1
        wrong = {**SOUND["decoder"], "labels": labels, "return_logits": return_logits}
        refused(model("decoder"), **wrong, names="labels` must be from 0 to 60, but holds -1 instead")


def test_a_cache_of_other_rows_or_of_another_model_is_refused():
    past = model("decoder")(TOKENS, use_cache=True).past_key_values
    refused(model("decoder"), TOKENS[:1, :1], past_key_values=past, names="past_key_values` must hold 1 rows")
    refused(seeded(tiny(n_layers=1)), TOKENS, past_key_values=past, names="past_key_values")


@pytest.mark.slow
def test_a_compiled_model_checks_nothing_that_breaks_its_graph():
    compiled = torch.compile(model("decoder"), fullgraph=True, backend="eager")
    whole = model("decoder")(TOKENS, labels=TOKENS, return_logits=False).loss
    torch.testing.assert_close(compiled(input_ids=TOKENS, labels=TOKENS, return_logits=False).loss, whole)


# ------------------------------------------------------------------------------------------------------- configs


@functools.cache
def config() -> Any:
    run = ["data=text", "data.path=x", "trainer.accelerator=cpu", "trainer.max_steps=3"]
    return txtrain.compose(["model=llama2", *run])


CHANGED = {  # of a ModelConfig: what is wrong, and what the error names
    "dim": [0, -3, "x", None, 1.5],
    "n_heads": [0, 3, "x"],
    "topology": ["sideways", None],
    "norm_position": ["around", None, 3],
    "attention": [
        *(None, 3, options.AttentionConfig(type="gqa", n_kv_heads=3)),
        *(options.GatedConfig(type="swiglu"), options.AttentionConfig(type="nope")),
    ],
    "ffn": [options.GatedConfig(type="swiglu", hidden_dim=0), {}],
    "head": [options.MLMHeadConfig(type="mlm")],
    "dropout": [1.0, "x"],
    "init": [None, {}, InitConfig(std="0.1")],
    "n_layers": [True, 2.0],
    "eos_token_id": [-1, "x"],
}
changes = st.sampled_from([(name, value) for name, values in CHANGED.items() for value in values])


@settings(QUICK, max_examples=40)
@given(changes, st.sampled_from(["build_model", "plan", "LitModule", "DataModule", "train"]))
def test_a_model_changed_into_something_illegal_is_refused(change, door):
    name, value = change
    changed = dc.replace(config().model, **{name: value})
    given = changed if door == "build_model" else dc.replace(config(), model=changed)
    with pytest.raises(txtrain.ConfigError, match=r"model\."):
        getattr(txtrain, door)(given)


@pytest.mark.parametrize("door", ["build_model", "plan", "LitModule", "DataModule", "train"])
def test_what_is_no_config_is_refused(door):
    for value in (None, {}, "model=gpt2", 3, config().model if door != "build_model" else config()):
        refused(getattr(txtrain, door), value, names="cfg" if door == "train" else "config")


@pytest.mark.parametrize("door", ["plan", "LitModule", "DataModule", "train"])
def test_a_run_of_an_illegal_combination_is_refused(door):
    data = dc.replace(config().data, micro_batch_size=3)
    trainer = dc.replace(config().trainer, max_steps=None)
    for wrong, says in (
        ({"data": data}, "data.micro_batch_size"),
        ({"trainer": trainer}, "trainer.max_steps"),
        ({"save": None}, "save"),
    ):
        refused(getattr(txtrain, door), dc.replace(config(), **wrong), names=says)


def test_train_takes_a_model_data_and_callbacks_that_go_with_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = txtrain.compose(["model=bert", "data=text", "data.path=x"])
    small = seeded(dc.replace(config().model, vocab_size=11, n_layers=1))
    for beside, names in (
        ({"model": seeded(tiny(topology="encoder"))}, "model.topology"),
        ({"model": small}, "model` must have a vocabulary"),
        ({"model": "gpt2"}, "model"),
        ({"data": []}, "data"),
        ({"data": txtrain.DataModule(encoder)}, "data"),
        ({"callbacks": [3]}, "callbacks"),
        ({"callbacks": pl.Callback()}, "callbacks"),
    ):
        refused(txtrain.train, config(), **beside, names=names)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- folders, overrides

PATHS = [None, 3, "", b"x", ["x"], "a\0b", "~nobody-of-that-name/x"]


def test_a_place_that_is_no_path_is_refused(tmp_path):
    for where in PATHS:
        refused(txtrain.load_pretrained, where, names="where")
        refused(txtrain.save_pretrained, model("decoder"), where, names="folder")
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file", tmp_path / "none", tmp_path):
        with pytest.raises(txtrain.ConfigError):
            txtrain.load_pretrained(where)
    refused(txtrain.load_pretrained, tmp_path, dtype="bf16", names="dtype")
    refused(txtrain.load_pretrained, tmp_path, dtype=torch.int64, names="dtype")
    refused(txtrain.load_pretrained, tmp_path, weights="best", names="weights")
    for wrong in (None, nn.Linear(2, 2), config()):
        refused(txtrain.save_pretrained, wrong, tmp_path / "out", names="model")
    refused(txtrain.save_pretrained, model("decoder"), tmp_path / "out", tokenizer=3, names="tokenizer")
    refused(txtrain.save_pretrained, model("decoder"), tmp_path / "out", max_shard_bytes=0, names="max_shard_bytes")
    assert not (tmp_path / "out").exists()


def test_compose_takes_strings():
    for overrides in ("model=gpt2", None, 3, ["model=gpt2", 3], {"model": "gpt2"}, [None], [b"model=gpt2"]):
        refused(txtrain.compose, overrides, names="overrides")
    for verb in (None, 3, "trian", ["train"]):
        refused(txtrain.compose, [], verb=verb, names="verb")
    for where in PATHS[1:]:
        refused(txtrain.compose, [], config_dir=where, names="config_dir")
