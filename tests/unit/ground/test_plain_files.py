"""A folder from a stranger is data: attacks one by one, and folders damaged at random. Only a ConfigError may come out."""

import contextlib
import dataclasses as dc
import json
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training import tiny
from tests.unit.hf.folders import llama
from txtrain.checkpoint import described, load, restore, run_folder
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint.base import resolve
from txtrain.cli.jobs import compose, compose_job
from txtrain.config.loader import make_loader
from txtrain.config.overrides import expand
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.ground import plain_files
from txtrain.ground.plain_files import parse_json, read_json, read_yaml
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained
from txtrain.monitor import metrics_csv
from txtrain.training.run import train

QUICKLY = 5.0  # seconds; most take milliseconds
DEEP = 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two checkpoints, its configuration, and a Hugging Face folder with a tokenizer."""
    home = tmp_path_factory.mktemp("made")
    small = ("model.dim=8", "model.n_layers=1", "trainer.max_steps=4", "save.every_n_steps=2")
    config = tiny(home, f"run_dir={home / 'run'}", *small)
    train(config)
    byte_tokenizer().save(llama(home / "hf", vocab_size=257))
    return home, config


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[0] / "run", tmp_path / "run"))


@pytest.fixture
def hf(made, tmp_path):
    return Path(shutil.copytree(made[0] / "hf", tmp_path / "hf"))


def refused(do, *names: str) -> None:
    """By a ConfigError that has these words, in little time of the processor."""
    begin = time.process_time()
    with pytest.raises(ConfigError) as e:
        do()
    assert time.process_time() - begin < QUICKLY
    for name in names:
        assert name in str(e.value)
    assert max(map(len, e.value.problems)) < 2100


# -------------------------------------------------------------------------------------------------------------- the readers

JSON = {
    "nothing": b"",
    "cut off": b'{"a": [1, 2',
    "no object": b"[1]",
    "null": b"null",
    "deep": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep, but not for Python": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    "deep in objects": b'{"a":' * DEEP,
    "a number of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "a number of a million digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "beyond floats": b'{"a": {"b": 1e999}}',
    "NaN": b'{"a": NaN}',
    "a name twice": b'{"a": 1, "b": 2, "a": 3}',
    "a name twice among many": b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"7":1}',
    "half a character": b'{"a": "\\ud800"}',
    "half a character in a name": b'{"\\udfff": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL": b'{"a": "\0"}',
    "zeros": b"\0" * 4096,
    "too large": b'{"a": "' + b"x" * plain_files.LIMIT + b'"}',
}
YAML = {
    "nothing": b"",
    "cut off": b"a: [1, 2",
    "no mapping": b"- 1\n- 2\n",
    "a tag": b"a: !!python/object/apply:os.system ['echo was run']\n",
    "a tag of one's own": b"%TAG ! tag:example.org,2000:\n---\na: !b 1\n",
    "a set": b"a: !!set {b}\n",
    "laughs": b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
    "an anchor alone": b"a: &a 1\n",
    "a merge": b"<<: {a: 1}\nb: 2\n",
    "deep": b"a: " + b"[" * DEEP + b"]" * DEEP,
    "deep by indents": b"a:\n" + b"\n".join(b" " * i + b"a:" for i in range(1, 1000)),
    "a key twice": b"a: 1\na: 2\n",
    "a key twice by another spelling": b'a: 1\n"a": 2\n',
    "a key that is a list": b"? [1, 2]\n: 3\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a date": b"a: 2026-11-27\n",
    "no date": b"a: 2026-99-99\n",
    "no number": b"a: 0x_\n",
    "not UTF-8": b"a: \xff\n",
    "NUL": b"a: \0\n",
    "tabs": b"a:\n\t- b\n",
    "very many values": b"a: [" + b"1," * 300_000 + b"1]\n",
    "too large": b"a: " + b"x" * plain_files.YAML_LIMIT + b"\n",
}


@pytest.mark.parametrize("attack", JSON)
def test_json_that_is_not_plain_is_refused_by_name(attack, tmp_path):
    (tmp_path / "some.json").write_bytes(JSON[attack])
    refused(lambda: read_json(tmp_path / "some.json"), "some.json")


@pytest.mark.parametrize("attack", YAML)
def test_yaml_that_is_not_plain_is_refused_by_name(attack, tmp_path):
    (tmp_path / "some.yaml").write_bytes(YAML[attack])
    refused(lambda: read_yaml(tmp_path / "some.yaml"), "some.yaml")


def test_a_message_does_not_hold_what_a_terminal_obeys(tmp_path):
    (tmp_path / "some.json").write_text('{"\\u001b]0;mine\\u0007": 1, "\\u001b]0;mine\\u0007": 2}')
    with pytest.raises(ConfigError, match=r"x1b]0;mine\\x07") as e:
        read_json(tmp_path / "some.json")
    refused(lambda: checkpoint.locate("\x1b[2J"), "x1b[2J")
    assert "\x1b" not in str(e.value)


def test_an_integer_of_10_000_digits_in_yaml_is_no_integer(tmp_path):
    (tmp_path / "some.yaml").write_text(f"a: {'9' * 10_000}\n")
    assert read_yaml(tmp_path / "some.yaml") == {"a": float("inf")}


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc.", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text("xyz", min_size=1), plain_values, max_size=5))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("plain") / "some"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert read_json(path) == values
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", newline="")
    assert read_yaml(path) == values


def test_only_regular_files_that_stay_in_their_folder_are_read(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.json").write_text('{"a": 1}')
    (home / "there.json").write_text('{"a": 1}')
    (home / "inside.json").symlink_to("there.json")
    assert read_json(home / "inside.json") == {"a": 1}
    (home / "link.json").symlink_to(tmp_path / "secret.json")
    refused(lambda: read_json(home / "link.json"), "link.json", "secret.json")
    (home / "loop.json").symlink_to("loop.json")
    refused(lambda: read_json(home / "loop.json"), "loop.json")
    os.mkfifo(home / "pipe.json")
    refused(lambda: read_json(home / "pipe.json"), "pipe.json", "regular")
    (home / "folder.json").mkdir()
    refused(lambda: read_json(home / "folder.json"), "folder.json", "a folder")
    (tmp_path / "other").symlink_to(home)
    assert read_json(tmp_path / "other" / "inside.json") == {"a": 1}, "the user's own link to the whole folder is fine"


# ------------------------------------------------------------------------------------------------------------------ a run


def edited(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def newest(run: Path) -> Path:
    return checkpoint.complete(run)[-1]


def header_of(path: Path, change) -> None:
    """The same tensors under another safetensors header."""
    whole = path.read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    text = json.dumps(change(json.loads(whole[8 : 8 + n]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + n :])


def shard(run: Path) -> Path:
    return next(newest(run).glob("*.safetensors"))


def parts(header, **changes):
    """The header with other places of its shards in their tensors."""
    known = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(
        {name: {**said, **changes} for name, said in known.items()}
    )
    return header


def with_model(run: Path, **changes) -> None:
    file = newest(run) / "config.yaml"
    raw = yaml.safe_load(file.read_text())
    with_config(run, yaml.safe_dump({**raw, "model": {**raw["model"], **changes}}).encode())


def with_config(run: Path, raw: bytes) -> None:
    (newest(run) / "config.yaml").write_bytes(raw)
    sealed(newest(run))


def linked(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def elsewhere(name: str) -> str:
    return json.dumps({name: [os.stat(name).st_size if name[0] == "/" else 0, "00"]})


def piped(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    marker = json.loads((folder / "complete").read_text())
    (folder / "complete").write_text(json.dumps({name: [0, "00"], **marker}))


OF_A_RUN = {
    "config.yaml with a tag": (lambda run: (newest(run) / "config.yaml").write_bytes(YAML["a tag"]), "config.yaml"),
    "config.yaml deep": (lambda run: (newest(run) / "config.yaml").write_bytes(YAML["deep"]), "config.yaml"),
    "config.yaml cut": (lambda run: (newest(run) / "config.yaml").write_bytes(b"model: {"), "config.yaml"),
    "config.yaml without model": (lambda run: with_config(run, b"seed: 1"), "`model`"),
    "config.yaml with a list as model": (lambda run: with_config(run, b"model: [1]"), "`model`"),
    "config.yaml with a tag, sealed": (lambda run: with_config(run, YAML["a tag"]), "a tag"),
    "config.yaml gone": (lambda run: (newest(run) / "config.yaml").unlink(), "config.yaml"),
    "config.yaml of 1e9 layers": (lambda run: with_model(run, n_layers=10**9), "1,000,000,000 layers"),
    "config.yaml of a wide model": (lambda run: with_model(run, dim=2**30), "parameters"),
    "config.yaml of 1e30 layers": (lambda run: with_model(run, n_layers=10**30), "layers"),
    "config.yaml of a family that is a path": (lambda run: with_model(run, family="../../../m/evil"), "model.family"),
    "config.yaml of a family that is a reference": (lambda run: with_model(run, family="${oc.env:HOME}"), "model.family"),
    "config.yaml of many keys": (lambda run: with_model(run, **{f"n_layer{i}": 1 for i in range(20_000)}), "n_layer"),
    "config.yaml of a long key": (lambda run: with_model(run, **{"n_layers" * 50_000: 1}), "n_layers"),
    "state.json deep": (lambda run: (newest(run) / "state.json").write_bytes(JSON["deep"]), "state.json"),
    "state.json no object": (lambda run: (newest(run) / "state.json").write_bytes(b"[]"), "state.json"),
    "state.json without step": (lambda run: (newest(run) / "state.json").write_bytes(b'{"metrics": {}}'), "`step`"),
    "state.json of another step": (lambda run: edited(newest(run) / "state.json", step=10**9), "`step`"),
    "state.json with text as step": (lambda run: edited(newest(run) / "state.json", step="4"), "`step`"),
    "state.json with a list as metrics": (lambda run: edited(newest(run) / "state.json", metrics=[1]), "`metrics`"),
    "state.json with text as loss": (
        lambda run: edited(newest(run) / "state.json", metrics={"val_loss": "x"}),
        "`metrics`",
    ),
    "state.json with other losses": (
        lambda run: edited(newest(run) / "state.json", losses={"window": ["x"]}),
        "`window`",
    ),
    "state.json skipped": (lambda run: edited(newest(run) / "state.json", skipped=[1]), "skipped"),
    "state.json with a place before the stream": (
        lambda run: edited(newest(run) / "state.json", stream_position=[-1, 0, 0]),
        "stream_position",
    ),
    "complete empty": (lambda run: (newest(run) / "complete").write_bytes(b""), "complete"),
    "complete a list": (lambda run: (newest(run) / "complete").write_bytes(b"[1]"), "complete"),
    "complete leads out": (lambda run: (newest(run) / "complete").write_text('{"../../../../x": 1}'), "x"),
    "complete names a file elsewhere": (lambda run: (newest(run) / "complete").write_text(elsewhere("/etc/passwd")), "leads out"),
    "complete names a file above": (lambda run: (newest(run) / "complete").write_text(elsewhere("../../run.json")), "leads out"),
    "complete names a pipe": (lambda run: piped(newest(run), "tokenizer/x.safetensors"), "x.safetensors must be a regular file"),
    "complete with NUL": (lambda run: (newest(run) / "complete").write_text('{"a\\u0000b": 1}'), "step_00000004"),
    "complete a link": (lambda run: linked(newest(run) / "complete", "/proc/self/status"), "/proc/"),
    "a shard a link": (lambda run: linked(shard(run), "/etc/passwd"), "/etc/passwd"),
    "a checkpoint a link": (
        lambda run: linked(run / "checkpoints/step_00000009", str(shutil.copytree(newest(run), run.parent / "x"))),
        "step_00000009",
    ),
    "a tokenizer a link": (lambda run: linked(newest(run) / "tokenizer/tokenizer.json", "/etc/passwd"), "/etc/passwd"),
    "a shard cut": (lambda run: shard(run).write_bytes(shard(run).read_bytes()[:-9]), "step_00000004"),
    "a shard of zeros": (lambda run: shard(run).write_bytes(bytes(shard(run).stat().st_size)), "safetensors"),
    "an endless header": (
        lambda run: shard(run).write_bytes(struct.pack("<Q", 2**60) + shard(run).read_bytes()[8:]),
        "safetensors",
    ),
}


@pytest.mark.parametrize("attack", OF_A_RUN)
def test_an_attack_by_a_checkpoint_is_refused_with_its_name(attack, run):
    do, word = OF_A_RUN[attack]
    do(run)
    refused(lambda: load.load(run), word)


@pytest.mark.parametrize(
    ("changes", "given", "word"),
    [
        ({"data": None}, (), "`data` must be given"),
        ({"data": [1]}, (), "`data` must be a mapping"),
        ({"data": {"type": "text", "seq_len": "x"}}, ("data=text", "data.path=x"), "`seq_len` must be an integer"),
        ({"data": {"type": "arithmetic"}, "reward": None}, (), "`reward` must be a mapping"),
        ({"data": {"type": "arithmetic"}, "reward": {"use": ["os.system"]}}, (), "os.system"),
        ({"model": {"head": {"type": "os:system"}}}, (), "config.yaml: `model.head.type`"),
    ],
)
def test_what_evaluate_takes_from_a_run_is_checked(changes, given, word, run):
    raw = yaml.safe_load((newest(run) / "config.yaml").read_text())
    with_config(run, yaml.safe_dump(raw | changes).encode())
    refused(lambda: compose([f"checkpoint={run}", *given], "evaluate"), word)


@pytest.mark.parametrize("named", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/", "http://127.0.0.1:1/x", "hf://a/b", "~root", "${oc.env:HOME}", "a" * 5000, "../../../etc/passwd", ""])
@pytest.mark.parametrize("key", ["init_from", "objective.teacher"])
def test_a_folder_that_a_stranger_names_is_a_path_and_nothing_more(key: str, named: str) -> None:
    refused(lambda: resolve(named, key), f"`{key}` must be a")


def sealed(folder: Path) -> None:
    """As an attacker leaves it: sizes and checksums are those of what he wrote."""
    (folder / "complete").write_text(json.dumps(checkpoint.marker_of(folder)))


OF_SHARDS = {
    "overlapping": lambda h: {
        n: {**said, "data_offsets": [0, 4]} if n != "__metadata__" else said for n, said in h.items()
    },
    "unknown dtype": lambda h: {n: {**said, "dtype": "X9"} if n != "__metadata__" else said for n, said in h.items()},
    "places beyond": lambda h: parts(h, saved_offsets=[2**40, 2**40]),
    "places before": lambda h: parts(h, saved_offsets=[-1, 0]),
    "places of no number": lambda h: parts(h, saved_offsets="xy"),
    "no places": lambda h: {**h, "__metadata__": {"DCP_SHARDING_INFO": "{}"}},
    "places deep": lambda h: {**h, "__metadata__": {"DCP_SHARDING_INFO": "[" * DEEP}},
    "metadata a number": lambda h: {**h, "__metadata__": 3},
}


@pytest.mark.parametrize("attack", OF_SHARDS)
def test_shards_that_are_not_all_of_their_tensors_are_refused(attack, run):
    header_of(shard(run), OF_SHARDS[attack])
    sealed(newest(run))
    refused(lambda: load.load(run), "step_00000004")


OF_RUN_JSON = {
    "deep": JSON["deep"],
    "cut": b'{"status": ',
    "a number as status": b'{"status": 3}',
    "text as starts": b'{"starts": "many"}',
    "text as slurm": b'{"slurm": "x"}',
    "no time": b'{"status": "complete", "ended": "yesterday"}',
}


@pytest.mark.parametrize("attack", OF_RUN_JSON)
def test_a_run_json_that_is_none_is_refused(attack, run):
    (run / "run.json").write_bytes(OF_RUN_JSON[attack])
    refused(lambda: run_folder.RunFolder(run).facts, "run.json")


DEEPER = ["profile/steps_4_5_rank0.txt", "tensorboard/hparams.yaml", "a/wandb/x", "checkpoints/step_00000002/x"]


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "run.json.tmp", "loss_spikes.jsonl", "samples.txt", *DEEPER])
def test_a_link_out_of_a_run_is_refused_before_it_is_written_through(name, made, run, tmp_path):
    target = tmp_path / "mine"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    linked(run / name, str(target))
    refused(lambda: continued(made, run), name, str(target))
    assert not target.exists()


def test_the_links_of_wandb_are_no_reason_against_a_run(made, run):
    """To its own log, and to what the user has it save."""
    for name, target in (("logs/debug-core.log", "/elsewhere/wandb/logs/core-debug-1.log"), ("files/x.txt", "/x.txt")):
        path = run / "wandb" / "run-1" / name
        path.parent.mkdir(parents=True)
        path.symlink_to(target)
    (run / "wandb" / "debug.log").symlink_to("run-1/logs/debug.log")
    (run / "wandb" / "latest-run").symlink_to("run-1")
    assert continued(made, run).checkpoint is not None


@pytest.mark.parametrize("name", ["samples.txt", "metrics.csv", "evaluations.jsonl", "profile/steps_4_5_rank0.txt"])
def test_a_pipe_in_a_run_is_not_waited_for(name, made, run):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    refused(lambda: continued(made, run), name, "regular file")


def test_the_folder_of_checkpoints_may_be_a_link_of_the_users(made, run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    (tmp_path / "short").symlink_to(run)
    assert continued(made, tmp_path / "short").checkpoint is not None
    load.load(tmp_path / "short")
    (tmp_path / "large" / "step_00000002" / "x").symlink_to(tmp_path / "mine")
    refused(lambda: continued(made, tmp_path / "short"), "step_00000002/x", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    "text", ["step,loss\n1,x\n", "a,b\n1,2\n", "step\nx\n", 'step\n"' + "1" * 200_000 + '"\n', "step\n\xff\n"]
)
def test_metrics_that_are_none_are_refused(text, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(text.encode("latin-1"))
    refused(lambda: metrics_csv.read(tmp_path / "metrics.csv"), "metrics.csv")


def continued(made, run):
    return run_folder.choose(dc.replace(made[1], run_dir=str(run)))


# ------------------------------------------------------------------------------------------------------ Hugging Face folders
# Most is in tests/unit/hf/test_hostile.py; here what `describe`, tokenizers and files beside the weights add.

TOKENIZERS = {
    "tokenizer.json": {
        "deep": b'{"model":' + b"[" * DEEP,
        "empty": b"{}",
        "garbage": bytes(range(256)) * 9,
        "null": b"null",
        "no vocabulary": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        "an empty decoder": b'{"model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": [["a", "b"]]}}',
        "a broken table": b'{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "model": {"type": "BPE"}}',
    },
    "tokenizer_config.json": {
        "deep": JSON["deep"],
        "a list": b"[]",
        "a list as token": b'{"eos_token": [1]}',
        "a token without content": b'{"eos_token": {"content": 3}}',
        "digits": JSON["a number of 10,000 digits"],
    },
    "special_tokens_map.json": {"cut": b'{"eos_token": ', "a number as token": b'{"pad_token": 3}'},
}


@pytest.mark.parametrize(
    ("name", "attack"), [(name, attack) for name, attacks in TOKENIZERS.items() for attack in attacks]
)
def test_a_tokenizer_that_is_none_is_refused(name, attack, hf):
    (hf / name).write_bytes(TOKENIZERS[name][attack])
    refused(lambda: load.load(hf), "tokenizer")


SENTENCEPIECE = {
    "empty": b"",
    "garbage": bytes(range(256)) * 9,
    "an endless number": b"\x80" * 3_000_000,
    "one piece, none unknown": b"\x0a\x05\x0a\x03abc",
    "a number as text": b"\x0a\x02\x08\x05",
    "a size of 2**60": b"\x0a" + b"\x80" * 8 + b"\x10",
    "a long piece": b"\x0a\x84\x10\x0a\x80\x10" + b"x" * 2048 + b"\x18\x02",
    "a broken table": b"\x0a\x09\x0a\x05<unk>\x18\x02\x1a\x05\x12\x03\xff\xff\xff",
    "a number as table": b"\x0a\x09\x0a\x05<unk>\x18\x02\x1a\x02\x10\x05",
    "no text in UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
}


@pytest.mark.parametrize("attack", SENTENCEPIECE)
def test_a_sentencepiece_model_that_is_none_is_refused(attack, hf):
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.model").write_bytes(SENTENCEPIECE[attack])
    refused(lambda: load.load(hf), "tokenizer")


@pytest.mark.parametrize("vocab", [b"{}", b"[1]", b'{"a": -1}', b'{"a": "x"}', JSON["deep"], b"\xff"])
def test_a_pair_of_vocabulary_and_merges_that_is_none_is_refused(vocab, hf):
    (hf / "tokenizer.json").unlink()
    (hf / "vocab.json").write_bytes(vocab)
    (hf / "merges.txt").write_bytes(b"a b\n\xff\n")
    refused(lambda: load.load(hf), "tokenizer")


def test_code_in_a_folder_is_never_imported(hf, monkeypatch):
    monkeypatch.syspath_prepend(str(hf))
    for name in ("modeling_llama.py", "tokenization_llama.py", "config.py", "sitecustomize.py"):
        (hf / name).write_text("raise SystemExit('was run')")
    load.load(hf)
    edited(hf / "config.json", auto_map={"AutoConfig": "config.Mine"})
    refused(lambda: load.load(hf), "auto_map", "config.json")


def test_layers_are_counted_before_anything_goes_through_them(hf):
    edited(hf / "config.json", num_hidden_layers=10**9)
    refused(lambda: described.describe(hf), "1,000,000,000 layers")


@pytest.mark.parametrize("types", [["full_attention"] * 400_000, ["full_attention"] * 399_999 + ["sliding_attention"]])
def test_a_pattern_of_layers_is_found_in_linear_time(types):
    from txtrain.hf.fields import pattern

    begin = time.process_time()
    found = pattern([None if t == "full_attention" else 4 for t in types])
    assert time.process_time() - begin < QUICKLY
    assert found is None if types[-1] == types[0] else len(found) == 400_000


def test_a_packed_pickle_is_refused_before_it_is_unpacked(hf):
    """torch writes its zip files without compression, so that one that has any is a bomb or damaged."""
    (hf / "model.safetensors").unlink()
    with zipfile.ZipFile(hf / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 50_000_000 + b"N.")
        archive.writestr("archive/version", b"3")
    refused(lambda: load.load(hf), "pytorch_model.bin", "safetensors")
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(os.system))
    refused(lambda: load.load(hf), "pytorch_model.bin", "model.safetensors")


# ------------------------------------------------------------------------------------------------------------------- arrays


def npy(path: Path, header: str, data: bytes = b"", version: int = 1) -> Path:
    text = header.encode("latin-1")
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + text + data)
    return path


NPY = {
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n",
    "a pickle behind it": "{'descr': '|O', 'fortran_order': False, 'shape': ()}\n",
    "larger than the file": "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n",
    "a product beyond 64 bits": "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}\n",
    "below zero": "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}\n",
    "very many of nothing": "{'descr': '|S0', 'fortran_order': False, 'shape': (4611686018427387904,)}\n",
    "a calculation": "{'descr': '<f8', 'fortran_order': False, 'shape': (9**9**9,)}\n",
    "code": "__import__('os').system('echo was run')\n",
    "brackets": "(" * 9000,
    "signs": "-" * 9000 + "1",
    "fields": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}\n",
    "nothing": "",
}


@pytest.mark.parametrize("attack", NPY)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_npy_file_is_numbers_and_as_large_as_it_says(attack, version, tmp_path):
    data = pickle.dumps(os.system) if "pickle" in attack else b"\0" * 64
    refused(lambda: plain_files.map_npy(npy(tmp_path / "a.npy", NPY[attack], data, version)), "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "x.npy")
    refused(lambda: plain_files.read_npz(tmp_path / "a.npz", "x", "FILE a.npz", 200.0), "a.npz", "x")


@pytest.mark.parametrize("cut", [0, 3, 8, 20, 100])
def test_a_cut_npy_or_npz_file_is_refused(cut, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    np.savez(tmp_path / "a.npz", x=np.arange(100))
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:cut])
    refused(lambda: plain_files.map_npy(tmp_path / "a.npy"), "a.npy")
    refused(lambda: plain_files.npz_names(tmp_path / "a.npz", "FILE a.npz"), "a.npz")


# ---------------------------------------------------------------------------------------------------- folders damaged at random

VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    "",
    "x" * 3000,
    "../../x",
    [],
    {},
    [[[[1]]]],
    {"a": {"b": 1}},
    2**63,
    "\0",
    "é",
]


class Damage:
    """One to three changes of files: a bit, an end, a line, a value, a file."""

    def __init__(self, draw: random.Random) -> None:
        self.random = draw

    def __call__(self, home: Path) -> None:
        files = sorted(p for p in home.rglob("*") if p.is_file())
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            self.change(self.random.choice(files), files)

    def change(self, path: Path, files: list[Path]) -> None:
        if not path.exists():
            return
        raw = bytearray(path.read_bytes())
        kind = self.random.choice(["flip", "cut", "grow", "delete", "swap", "value", "value", "value", "link", "line"])
        if kind == "value" and (path.suffix in (".json", ".yaml") or path.name == "complete"):
            with contextlib.suppress(ValueError, yaml.YAMLError):
                return self.value(path)
        if kind == "flip" and raw:
            for _ in range(self.random.choice([1, 8])):
                raw[self.random.randrange(min(len(raw), self.random.choice([64, 10**9])))] = self.random.randrange(256)
        elif kind == "cut":
            del raw[self.random.randrange(len(raw) + 1) :]
        elif kind == "grow":
            raw += self.random.choice([b"\0", b"}", b"\n- !!x", b"x" * 5000])
        elif kind == "line" and raw:
            lines = bytes(raw).split(b"\n")
            raw = bytearray(b"\n".join([*lines, self.random.choice(lines)]))
        elif kind in ("delete", "link"):
            path.unlink()
            if kind == "link":
                path.symlink_to(self.random.choice(["/etc/passwd", path.name, "nowhere", "../" + path.name]))
            return
        elif kind == "swap":
            raw = bytearray(self.random.choice([p for p in files if p.exists()]).read_bytes())
        path.write_bytes(raw)

    def value(self, path: Path) -> None:
        """Another value or name somewhere in a file of JSON or YAML."""
        tree = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
        if not isinstance(tree, (dict, list)) or not tree:
            return
        places = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
        for node, key in places:
            inner = node[key]
            if isinstance(inner, (dict, list)):
                places += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
        node, key = self.random.choice(places)
        kind = self.random.choice(["set", "set", "set", "drop", "nest", "rename"])
        if kind == "drop":
            del node[key]
        elif kind == "nest":
            for _ in range(self.random.choice([1, 70])):
                node[key] = [node[key]]
        elif kind == "rename" and isinstance(node, dict):
            node[self.random.choice(["a", "type", "é", str(key) + "s"])] = node.pop(key)
        else:
            node[key] = self.random.choice(VALUES)
        path.write_text(yaml.safe_dump(tree) if path.suffix == ".yaml" else json.dumps(tree))


class Uses:
    """What commands make of a run's folder; each by itself. None where the folder is refused, or that was not asked."""

    N = 5

    def __init__(self, made) -> None:
        self.config, self.loader = made[1], make_loader()

    def __call__(self, run: Path, asked=range(N)) -> list:
        uses = (
            lambda: described.describe(run).model,
            lambda: self.loaded(run),
            lambda: self.continued(run),
            lambda: self.resumed(run),
            lambda: run_folder.choose(dc.replace(self.config, run_dir=str(run.parent / "new"), fork=str(run))).first_step,
        )
        return [self.attempt(use) if n in asked else None for n, use in enumerate(uses)]

    @staticmethod
    def attempt(use):
        try:
            return use()
        except ConfigError:
            return None

    def loaded(self, run: Path):
        found = load.load(run)
        return {n: t.numpy().tobytes() for n, t in found.model.state_dict().items()}, (found.tokenizer and found.tokenizer.encode("some text 1"))

    def continued(self, run: Path):
        """All that a run which goes on takes from its folder."""
        place = run_folder.choose(dc.replace(self.config, run_dir=str(run)))
        if place.checkpoint is None:
            return "begins anew"
        gone = metrics_csv.check_rows(place)
        rows = metrics_csv.read(run / "metrics.csv", place.state.rows)
        tensors = {name: torch.zeros(shape) for name, shape in checkpoint.shapes(place.checkpoint).items()}
        restore.load_tensors(place.checkpoint, tensors)
        numbers = {name: t.numpy().tobytes() for name, t in tensors.items()}
        return place.state, numbers, gone or [{n: v for n, v in row.items() if v} for row in rows]

    def resumed(self, run: Path):
        """The configuration of `resume=RUN`, and what is said of it."""
        job = compose_job("train", expand([f"resume={run}"], False, self.loader)[0], self.loader)[0]
        return (dc.replace(job.config, resume="", run_dir=""), [n for n in job.notes if "run_dir" not in n])

    def reasons(self, run: Path, before: list, found: list) -> list[str]:
        """Of what is another than before, and of which nobody was told."""
        told = [found[2] is not None and isinstance(found[2][2], str), bool(found[3] and found[3][1])]
        silent = [n for n, (old, new) in enumerate(zip(before, found, strict=True)) if new is not None and new != old]
        return [str(n) for n in silent if not (n == 2 and told[0] and found[2][:2] == before[2][:2]) and not (n == 3 and told[1])]


def use_hf(hf: Path) -> None:
    with contextlib.suppress(ConfigError):
        described.describe(hf)
    with contextlib.suppress(ConfigError):
        loaded = load.load(hf)
        if loaded.tokenizer is not None:
            loaded.tokenizer.decode(loaded.tokenizer.encode("some text 1"))
    with contextlib.suppress(ConfigError):
        save_pretrained(load_pretrained(hf), hf.parent / "out")


@contextlib.contextmanager
def damaged(made, home: Path, name: str, draw: random.Random):
    """A copy of the folder with changes in it; what is done with it raises nothing but ConfigErrors, in little time."""
    one = home / "one"
    shutil.rmtree(one, ignore_errors=True)
    shutil.copytree(made[0] / name, one / name)
    Damage(draw)(one / name)
    begin = time.process_time()
    yield one / name
    assert time.process_time() - begin < 4 * QUICKLY


QUIETLY = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
FEW, MANY = (settings(max_examples=n, deadline=None, database=None, derandomize=n < 1000, suppress_health_check=QUIETLY) for n in (100, 5000))


def runs_are_refused_or_what_they_were(made, home: Path, cases: settings) -> None:
    """By accident: what is accepted is what was written, or it is said. By an attacker, who seals what he wrote: refused or accepted."""
    uses = Uses(made)
    shutil.copytree(made[0] / "run", home / "one/run")
    before = uses(home / "one/run")
    assert None not in before

    @cases
    @given(st.randoms(use_true_random=False), st.booleans(), st.sets(st.integers(0, Uses.N - 1), min_size=1, max_size=2))
    def one(draw, by_accident, asked):
        with damaged(made, home, "run", draw) as run:
            for marker in () if by_accident else run.glob("checkpoints/*/complete"):
                with contextlib.suppress(ConfigError, OSError):
                    sealed(marker.parent)
            found = uses(run, asked)
            assert not by_accident or not uses.reasons(run, before, found)

    one()


def hugging_face_folders_are_refused_or_read(made, home: Path, cases: settings) -> None:
    @cases
    @given(st.randoms(use_true_random=False))
    def one(draw):
        with damaged(made, home, "hf", draw) as hf:
            use_hf(hf)

    one()


def test_a_damaged_run_is_refused_or_what_it_was(made, tmp_path):
    runs_are_refused_or_what_they_were(made, tmp_path, FEW)


def test_a_damaged_hugging_face_folder_is_refused_or_read(made, tmp_path):
    hugging_face_folders_are_refused_or_read(made, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("check", [runs_are_refused_or_what_they_were, hugging_face_folders_are_refused_or_read])
def test_thousands_of_damaged_folders(check, made, tmp_path):
    check(made, tmp_path, MANY)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(raw)
    for read in (read_json, read_yaml, plain_files.map_npy, lambda p: plain_files.npz_names(p, "x"), metrics_csv.read):
        with contextlib.suppress(ConfigError):
            read(path)
    with contextlib.suppress(ConfigError):
        parse_json(raw, "some bytes")
