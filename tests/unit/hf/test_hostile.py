import json
import os
import pickle
import struct
import time
from collections import OrderedDict

import pytest
import torch

from tests.unit.hf.folders import config_of, edit_config, llama, rewrite, tensors
from txtrain.checkpoint.base import Base
from txtrain.checkpoint.described import describe, of_peft
from txtrain.checkpoint.load import open_base
from txtrain.errors import ConfigError
from txtrain.hf.digest import sha256_of
from txtrain.hf.load import load_pretrained
from txtrain.hf.tensor_file import DTYPES, NUMBERS, PickleFile

QUICKLY = 2.0  # seconds


@pytest.fixture
def folder(tmp_path):
    return llama(tmp_path / "model")


def refused(folder, match):
    """With a ConfigError in one or two lines, before anything is built."""
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=match) as e:
        load_pretrained(folder)
    assert time.perf_counter() - begin < QUICKLY
    assert all(len(problem) < 600 for problem in e.value.problems)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/txtrain-was-run",)


@pytest.mark.parametrize("payload", [Bomb(), {"model.norm.weight": Bomb()}, {"model.norm.weight": "x"}, [torch.ones(1)], {1: torch.ones(1)}])
def test_a_pickle_is_not_run(folder, payload):
    (folder / "model.safetensors").unlink()
    for protocol in (pickle.dumps(payload), None):
        if protocol is None:
            torch.save(payload, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(protocol)
        refused(folder, r"pytorch_model\.bin must hold")
        assert not os.path.exists("/tmp/txtrain-was-run")


def test_a_pickle_makes_tensors_alone(folder, monkeypatch):
    """bytearray(2**34) is on torch's list of what is no code; memory would be taken before the result is looked at."""
    (folder / "model.safetensors").unlink()
    payload = {"model.norm.weight": bytearray(b"xyz")}
    for older in (True, False):
        torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not older)
        monkeypatch.setattr(torch, "load", lambda *given, **how: pytest.fail("it was read"))
        refused(folder, r"pytorch_model\.bin must hold tensors and nothing else")
        monkeypatch.undo()


@pytest.mark.parametrize("older", [True, False])
def test_a_pickle_of_tensors_of_all_dtypes_is_read(older, tmp_path):
    """Also parameters that their model has marked, as Mamba's."""
    kinds = [*(DTYPES | NUMBERS).values(), torch.bool, *([] if older else [torch.float8_e4m3fn, torch.uint16])]
    held = {str(kind): torch.zeros(3, dtype=kind) for kind in kinds} | {"p": torch.nn.Parameter(torch.ones(2, 2))}
    held["marked"] = torch.nn.Parameter(torch.ones(2))
    held["marked"]._no_weight_decay = True
    torch.save(OrderedDict(held), tmp_path / "a.bin", _use_new_zipfile_serialization=not older)
    assert PickleFile(tmp_path / "a.bin").entries.keys() == held.keys()


def test_a_tensor_that_claims_more_than_its_storage_is_refused(folder):
    weights = tensors(folder)
    weights["model.embed_tokens.weight"] = torch.ones(1).expand(61, 32)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, "plain tensors")


def test_code_is_not_run(folder):
    (folder / "modeling_llama.py").write_text("raise SystemExit('was run')")
    (folder / "tokenizer.py").write_text("raise SystemExit('was run')")
    load_pretrained(folder)
    refused(edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Mine"}), "auto_map")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 10**9}, "parameters"),
        ({"hidden_size": 2**31 - 4, "head_dim": 2, "intermediate_size": 2**31 - 1}, "parameters"),
        ({"head_dim": 10**9}, "parameters"),
        ({"vocab_size": 10**400}, "vocab_size"),
        ({"num_hidden_layers": 3}, "parameters"),
        ({"num_hidden_layers": 1}, "must hold only tensors of"),
        ({"intermediate_size": 80}, "must be"),
    ],
)
def test_a_config_that_claims_too_much_is_refused_before_memory_is_taken(folder, changes, match):
    refused(edit_config(folder, **changes), match)


VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 4, "patch_size": 2}
CLASS = {"type": "class", "n_classes": 10**12}


@pytest.mark.parametrize(
    ("changes", "model", "match"),
    [
        ({"num_labels": 2**31 - 1, **VIT}, None, "head.n_classes"),
        ({"num_labels": 2**31 - 1}, None, "head.n_classes"),
        ({"problem_type": []}, None, "problem_type"),
        ({"num_hidden_layers": 2**31 - 1}, None, "at most 100,000 layers"),
        ({}, {"n_layers": 10**12}, "1,000,000,000,000"),
        ({}, {"topology": "encoder_decoder", "n_encoder_layers": 10**12}, "1,000,000,000,001"),
        ({}, {"head": CLASS}, "head.n_classes"),
        ({"id2label": None}, {"head": CLASS}, "head.n_classes"),
    ],
)
def test_classes_and_layers_that_config_json_alone_claims_are_not_counted_through(tmp_path, folder, changes, model, match):
    """By a class of transformers with a head of classes, and by our own."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 4}
    known = sizes | {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    if model is not None:
        ours = load_pretrained(folder).config.to_dict() | {"n_layers": 1} | model
        known = {"model_type": "txtrain", "txtrain": {"model": ours}}
    made = {**({} if "model_type" in changes else known), **changes}
    (tmp_path / "config.json").write_text(json.dumps(made))
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=match):
        describe(tmp_path)
    assert time.perf_counter() - begin < QUICKLY


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"model_type": "llama"', "[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "\xff\xfe", '{"vocab_size": ' + "9" * 5000 + "}"],
)
def test_broken_json_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, r"config\.json")


def test_a_folder_that_is_none_is_refused(tmp_path, folder):
    refused(tmp_path / "nothing", "not there")
    refused(folder / "config.json", "a file")
    refused(tmp_path, r"config\.json")
    (folder / "model.safetensors").unlink()
    refused(folder, r"one of model\.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, r"config\.json")


# ------------------------------------------------------------------------------------------------------------------ sharded


def sharded(folder, place=lambda name: name):
    """The folder's weights in two files, each under the name that `place` gives it in the index."""
    from safetensors.torch import save_file

    weights = tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for file, part in (("a.safetensors", names[:4]), ("b.safetensors", names[4:])):
        save_file({name: weights[name] for name in part}, folder / file)
        places |= {name: place(file) for name in part}
    return places


def index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_a_sound_index_is_read(folder):
    before = load_pretrained(folder).state_dict()
    after = load_pretrained(index(folder, sharded(folder))).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lead", ["../", "/etc/", "./", "sub/../", "..\\"])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, lead):
    refused(index(folder, sharded(folder, lambda name: lead + name)), "leads out")


def test_a_link_out_of_the_folder_is_refused_but_for_the_hubs_cache(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(folder, "link")
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1234").mkdir(parents=True)
    (tmp_path / "elsewhere").rename(cache / "blobs" / "abc")
    (folder / "config.json").rename(cache / "blobs" / "def")
    for name, blob in (("model.safetensors", "abc"), ("config.json", "def")):
        (cache / "snapshots" / "1234" / name).symlink_to(f"../../blobs/{blob}")
    load_pretrained(cache / "snapshots" / "1234")


def test_an_index_that_is_not_true_is_refused(folder):
    places = sharded(folder)
    refused(index(folder, {**places, "ghost": "a.safetensors"}), "ghost")
    refused(index(folder, {**places, "model.norm.weight": "c.safetensors"}), r"c\.safetensors must be in the folder")
    refused(index(folder, {name: file for name, file in places.items() if name != "model.norm.weight"}), "must name all tensors")
    refused(index(folder, {}), "weight_map")
    refused(index(folder, {"model.norm.weight": 3}), "weight_map")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    refused(index(folder, dict.fromkeys(places, "a.safetensors") | {next(iter(places)): "b.safetensors"}), "must be in")


# ------------------------------------------------------------------------------------------------------------------ tensors


def test_missing_and_extra_tensors_are_named(folder):
    weights = tensors(folder)
    rewrite(folder, {name: t for name, t in weights.items() if name != "model.norm.weight"} | {"pad": torch.zeros(1000)})
    refused(folder, r"must hold model\.norm\.weight, but does not")
    rewrite(folder, weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    refused(folder, r"must hold only tensors of LlamaForCausalLM, but holds model\.layers\.0\.self_attn\.q_norm\.weight")


def test_buffers_of_old_folders_are_let_through(folder):
    before = load_pretrained(folder)
    rewrite(folder, tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert load_pretrained(folder).config == before.config


def test_wrong_shapes_and_dtypes_are_named(folder):
    weights = tensors(folder)
    rewrite(folder, weights | {"model.norm.weight": torch.ones(64)})
    refused(folder, r"model\.norm\.weight must be \[32\], but is \[64\]")
    rewrite(folder, weights | {"model.norm.weight": torch.ones(32, dtype=torch.int64)})
    refused(folder, r"model\.norm\.weight must be one of F64, F32, F16, BF16, but is I64")


def test_a_tied_head_must_be_the_embedding(folder):
    weights = tensors(folder)
    assert config_of(folder)["tie_word_embeddings"]
    load_pretrained(rewrite(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    refused(rewrite(folder, weights | {"lm_head.weight": torch.ones(61, 32)}), "tie_word_embeddings")


@pytest.mark.parametrize("cut", [1, 7, 100, 5000])
def test_a_truncated_file_is_refused(folder, cut):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-cut])
    refused(folder, r"model\.safetensors must be a whole safetensors file")
    (folder / "model.safetensors").write_bytes(whole[:cut])
    refused(folder, r"model\.safetensors")


def with_header(folder, change):
    """The same bytes under another header."""
    whole = (folder / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    text = change(json.loads(whole[8 : 8 + n]))
    text = (text if isinstance(text, str) else json.dumps(text)).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + n :])
    return folder


def changed(**what):
    return lambda header: {**header, "model.norm.weight": {**header["model.norm.weight"], **what}}


@pytest.mark.parametrize(
    "change",
    [
        changed(data_offsets=[0, 10**15]),
        changed(data_offsets=[-4, 124]),
        changed(data_offsets=[0, 128]),  # overlaps another
        changed(data_offsets=[0]),
        changed(data_offsets=None),
        changed(data_offsets=[1e400, 2]),
        changed(shape=[10**18, 10**18]),
        changed(shape=[-32]),
        changed(shape=[10**39] * 300_000),
        changed(shape=[1] * 65),
        changed(shape=["32"]),
        changed(shape=[True] * 5),
        changed(shape=None),
        changed(dtype="F4096"),
        changed(dtype=["F32"]),
        lambda header: {**header, "model.norm.weight": 7},
        lambda header: {name: entry for name, entry in header.items() if name != "model.norm.weight"},  # a hole
        lambda header: json.dumps(header)[:-1] + ', "model.norm.weight": {}}',  # a name twice
        lambda header: "{",
        lambda header: "[]",
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(folder, change):
    refused(with_header(folder, change), "header|whole safetensors file")


@pytest.mark.parametrize("metadata", [1, "x", ["txtrain"]])
def test_metadata_that_are_no_mapping_are_refused_by_all_who_read_them(folder, metadata):
    with_header(folder, lambda header: {**header, "__metadata__": metadata})
    refused(folder, r"The header of .*`__metadata__` must be")
    for read in (sha256_of, lambda path: of_peft(path, load_pretrained(llama(folder / "base")).config)):
        (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ConfigError, match=r"The header of .*`__metadata__` must be"):
            read(folder)


def test_an_endless_header_is_refused(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(folder, "whole safetensors file")


def test_a_generation_config_that_was_lost_is_not_passed_over(folder):
    """It may hold the tokens at which a text ends."""
    (folder / "generation_config.json").write_bytes(b"")
    refused(folder, r"generation_config\.json must be a JSON object, but is empty")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("../../blobs/0")
    refused(folder, r"generation_config\.json must be a file, but is a link to none")


def test_a_pipe_is_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="must be a regular file"):
        sha256_of(tmp_path)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, r"one of model\.safetensors")


@pytest.mark.parametrize("base", ["~nobody-of-that-name/x", "x" * 100_000, "a\0b", "\ud800", "", "/etc/passwd", "https://example.org/x", "."])
def test_an_adapter_whose_base_is_no_folder_is_refused_in_a_line(tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    with pytest.raises(ConfigError) as e:
        describe(tmp_path, "init_from")
    assert len(str(e.value)) < 1000


def test_a_checkpoint_whose_base_is_no_path_is_refused_in_a_line():
    with pytest.raises(ConfigError, match="is not there") as e:
        open_base(Base("x" * 100_000, "0" * 64), "resume")
    assert len(str(e.value)) < 1000
