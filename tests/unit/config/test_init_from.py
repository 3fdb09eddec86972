"""init_from=, export, load_pretrained: weights, architecture and tokenizer come in and go out."""

import errno
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import txtrain
from tests.training import tiny, weights
from txtrain import compose
from txtrain.checkpoint.base import resolve
from txtrain.checkpoint.format import LoadError
from txtrain.checkpoint.load import open_weights
from txtrain.cli import export
from txtrain.cli.main import main
from txtrain.data.sources.hub import why_unreachable
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.hf.registry import class_of
from txtrain.parallel.one_process import OneProcess
from txtrain.training import initial_weights
from txtrain.training.data_module import DataModule
from txtrain.training.run import train

ENDS_AFTER_A_STEP = ("trainer.max_steps=1", "optimizer.lr=0.0", "optimizer.weight_decay=0.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("initial")


@pytest.fixture(scope="module")
def run(folder):
    """A run of two steps, its architecture unlike any default."""
    config = tiny(folder, f"run_dir={folder / 'first'}", "trainer.max_steps=2", "model/attention=gqa", "model.attention.n_kv_heads=1")
    return train(config).run_dir


@pytest.fixture(scope="module")
def exported(run, folder):
    assert main(["export", f"checkpoint={run}", f"out={folder / 'exported'}"]) == 0
    return folder / "exported"


def starting(folder, where, name, *overrides):
    """A run that starts from `where`: neither model nor tokenizer are named."""
    lines = [f"init_from={where}", "data=text", f"data.path={folder / 'text.txt'}", "data.seq_len=32", f"data.cache_dir={folder / 'cache'}"]
    lines += ["trainer.accelerator=cpu", "sample.n=0", "scheduler.warmup_steps=0", f"run_dir={folder / name}", *overrides]
    return compose(lines)


def of_model(run_dir):
    return {name: value for name, value in weights(run_dir).items() if name.startswith("model.")}


@pytest.mark.parametrize("source", ["run", "checkpoint", "exported"])
def test_a_run_starts_from_the_weights_with_their_architecture_and_tokenizer(folder, run, source, request):
    where = run / "checkpoints/step_00000002" if source == "checkpoint" else request.getfixturevalue(source)
    config = starting(folder, where, f"from_{source}", *ENDS_AFTER_A_STEP)
    assert (config.model.dim, config.model.attention.n_kv_heads, config.model.vocab_size) == (32, 1, 257)
    assert train(config).run_dir is not None
    assert of_model(folder / f"from_{source}") == of_model(run), "a step at rate 0 changes nothing"
    said = json.loads((folder / f"from_{source}" / "run.json").read_text())["init_from"]
    is_run = source != "exported"
    path = where / "checkpoints/step_00000002" if source == "run" else where
    (file,) = path.glob("*.safetensors")
    read = file.read_bytes()
    header = read[: 8 + int.from_bytes(read[:8], "little")]  # a checkpoint's has the checksums of the tensors
    assert said["given"] == str(where)
    assert said["path"] == str(path)
    assert (said["checkpoint"], said["step"]) == (("step_00000002", 2) if is_run else (None, None))
    assert said["sha256"] == hashlib.sha256(header if is_run else read).hexdigest()
    assert {f"model.{name}" for name in said["loaded"]} == of_model(run).keys()
    assert said["skipped"] == said["initialised"] == []
    assert said["resized"] == {}


def test_a_run_that_started_from_weights_continues_from_its_own(folder, run):
    whole = starting(folder, run, "whole", "trainer.max_steps=6", "save.every_n_steps=3")
    train(whole)
    train(starting(folder, run, "halves", "trainer.max_steps=3", "scheduler=constant"))
    train(starting(folder, run, "halves", "trainer.max_steps=6", "scheduler=constant"))
    train(starting(folder, run, "constant", "trainer.max_steps=6", "scheduler=constant"))
    assert weights(folder / "halves") == weights(folder / "constant")


def test_a_source_may_remove_the_checkpoint_before_it_is_opened_and_before_it_is_read(folder, run, tmp_path, monkeypatch):
    """Its files stay open from the check to the reading, which comes after the data; the tokenizer is its newest."""
    source = shutil.copytree(run, tmp_path / "source")
    begun, first, prepared = source / "checkpoints", [source / "checkpoints/step_00000001"], DataModule.prepare

    def prepare(self):
        if (begun / "step_00000002").exists():
            (begun / "step_00000002").rename(begun / "step_00000009")
        prepared(self)

    monkeypatch.setattr(DataModule, "prepare", prepare)
    monkeypatch.setattr(initial_weights, "resolve", lambda *where: first.pop() if first else resolve(*where))
    train(starting(folder, source, "rotated", *ENDS_AFTER_A_STEP, f"run_dir={tmp_path / 'rotated'}"))
    assert json.loads((tmp_path / "rotated/run.json").read_text())["init_from"]["checkpoint"] == "step_00000002"
    assert of_model(tmp_path / "rotated") == of_model(run)


def test_files_that_cannot_be_read_any_more_end_the_start_with_nothing_written(folder, run, tmp_path, monkeypatch):
    """As on a network file system, whose files another machine has removed."""

    def gone(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(OneProcess, "fill", gone)
    with pytest.raises(LoadError, match=r"`init_from`: .*step_00000002 cannot be read any more: .*Stale.* start again"):
        train(starting(folder, run, "x", *ENDS_AFTER_A_STEP, f"run_dir={tmp_path / 'stale'}"))
    assert not (tmp_path / "stale").exists()


def test_a_larger_tokenizer_brings_new_tokens(folder, run, tmp_path):
    """New ones behind the old, whose vectors stay; one that has moved is refused."""
    tokenizer = load_tokenizer(run)
    larger = tokenizer.with_specials(["<tool>", "<think>"])
    larger.save(tmp_path / "larger")
    config = starting(folder, run, "tools", f"data.tokenizer={tmp_path / 'larger'}", *ENDS_AFTER_A_STEP)
    assert config.model.vocab_size == 259
    train(config)
    said = json.loads((folder / "tools/run.json").read_text())["init_from"]
    assert said["resized"] == {name: [[257, 32], [259, 32]] for name in ("embedding.token.weight", "head.weight")}
    old, new = (txtrain.load_pretrained(where).state_dict()["head.weight"] for where in (run, folder / "tools"))
    assert torch.equal(new[:257], old)
    assert torch.equal(new[258], old.double().mean(0).float())
    other = json.loads((tmp_path / "larger/tokenizer.json").read_text())
    ids = other["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "moved").mkdir()
    for file in (tmp_path / "larger").iterdir():
        shutil.copy(file, tmp_path / "moved")
    (tmp_path / "moved/tokenizer.json").write_text(json.dumps(other))
    moved = f"data.tokenizer={tmp_path / 'moved'}"
    with pytest.raises(ConfigError, match=r"`data.tokenizer` must keep the tokens of init_from=.*, whose 'a' is \d+, but is .*/moved instead"):
        starting(folder, run, "x", moved)
    assert starting(folder, run, "x", moved, "init_allow_missing=[embedding.token]").model.vocab_size == 259


def test_dropout_may_be_another(folder, run):
    config = starting(folder, run, "dropped", "model.dropout=0.3", "model.attention.dropout=0.1", *ENDS_AFTER_A_STEP)
    assert (config.model.dropout, config.model.attention.dropout) == (0.3, 0.1)
    train(config)
    assert of_model(folder / "dropped") == of_model(run)


def test_a_model_named_beside_it_must_agree(folder, run):
    with pytest.raises(ConfigError, match=r"`model.dim` must be 32, as in init_from=.*, but is 256 instead"):
        starting(folder, run, "x", "model=llama2")
    same = ("model=llama2", "model.n_layers=2", "model.dim=32", "model.n_heads=2", "model.vocab_size=257", "model.max_seq_len=32")
    assert starting(folder, run, "x", *same, "model/attention=gqa", "model.attention.n_kv_heads=1").model.dim == 32
    with pytest.raises(ConfigError, match=r"blocks\.2\.attention\.q_proj\.weight is absent there, \(32, 32\) here"):
        train(starting(folder, run, "x", "model.n_layers=3", "trainer.max_steps=1"))
    assert not (folder / "x").exists()


@pytest.mark.parametrize("family", ["{up}/proc/self/cwd/m/evil", "/x", "..", "${{oc.env:HOME}}", "llama2@_global_", "", "a\nb", "x" * 61])
def test_a_family_that_a_stranger_names_is_neither_a_file_nor_a_reference(family, folder, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, tmp_path / "m")
    (tmp_path / "m" / "evil.yaml").write_text("# @package _global_\nname: ${oc.env:HOME}\n")
    known = json.loads((exported / "config.json").read_text())
    ours = txtrain.load_pretrained(exported).config.to_dict() | {"family": family.format(up="../" * 20)}
    write = {**known, "model_type": "txtrain", "txtrain": {"model": ours}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(write))
    with pytest.raises(ConfigError, match=r"`model\.family` must be a word"):
        starting(folder, tmp_path / "m", "x")
    assert main(["export", "checkpoint=m", "format=gguf", "out=out"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_family_of_the_name_that_init_from_has_for_itself_is_no_parent_of_itself(folder, exported, tmp_path):
    known = json.loads((exported / "config.json").read_text())
    model = txtrain.load_pretrained(exported)
    shutil.copytree(exported, tmp_path / "m")
    ours = {"model": model.config.to_dict() | {"family": "init_from"}}
    ids = {"architectures": ["TxtrainForCausalLM"], "vocab_size": known["vocab_size"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps({**ids, "model_type": "txtrain", "txtrain": ours}))
    for _ in range(2):
        assert starting(folder, tmp_path / "m", "x", "objective=causal_lm").model.dim == 32


def test_what_is_not_there_is_named(folder, run):
    with pytest.raises(ConfigError, match="`init_from` must be a run's folder"):
        starting(folder, folder / "nowhere", "x")
    empty = folder / "no_tokenizer"
    txtrain.save_pretrained(txtrain.load_pretrained(run), empty)
    with pytest.raises(ConfigError, match=r"`data\.tokenizer` must be given"):
        starting(folder, empty, "x")
    assert starting(folder, empty, "x", "data.tokenizer=bytes").data.tokenizer == "bytes"


def test_a_name_on_the_hub_is_a_folder_in_its_cache(folder, exported, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--small/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(exported, snapshot)
    (tmp_path / "models--someone--small/refs").mkdir()
    (tmp_path / "models--someone--small/refs/main").write_text(snapshot.name)
    listed = {name: {"size": 1, "blob_id": "0" * 40} for name in (".gitattributes", *os.listdir(snapshot))}  # which is not downloaded
    (tmp_path / "models--someone--small/trees").mkdir()
    (tmp_path / f"models--someone--small/trees/{snapshot.name}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    why_unreachable.cache_clear()
    config = starting(folder, "someone/small", "x")
    assert (config.init_from, config.model.dim, config.data.tokenizer) == ("someone/small", 32, str(snapshot))
    assert open_weights("someone/small").path == snapshot
    with pytest.raises(ConfigError, match=r"`init_from` must be .*'someone/large' does not exist, is not in the hub's cache, and HF_HUB_OFFLINE"):
        starting(folder, "someone/large", "x")
    why_unreachable.cache_clear()


def folder_from_config(family, where, tokenizer, *given):
    """A folder with a config.json and a tokenizer, which is all that a composition reads."""
    shutil.copytree(tokenizer, where, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = compose([f"model={family}", "data.path=x", *given]).model
    (where / "config.json").write_text(json.dumps(class_of(model).write(model)))
    return where


def test_a_folder_brings_its_familys_objective_and_needs_its_data_alone(exported, tmp_path):
    for family, objective, data, *given in (
        ("llama2", "causal_lm", "text"), ("bert", "masked_lm", "text"), ("t5", "span_corruption", "text"),
        ("transformer", "seq2seq", "translation", "model.position.layout=halves"), ("vit", "image_classification", "images"),
    ):
        where = folder_from_config(family, tmp_path / family, exported, f"data={data}", *given)
        made = compose([f"init_from={where}", f"data={data}", "data.path=x"])
        assert (made.objective.type, made.model.family) == (objective, family)


@pytest.fixture
def several(run, tmp_path, monkeypatch):
    """runs/try with three runs, the newest of which has no checkpoint yet; the last but one is called `b`."""
    monkeypatch.chdir(tmp_path)
    for name, start in (("b", 300.0), ("a", 200.0), ("c", 400.0)):
        shutil.copytree(run, tmp_path / "runs/try" / name)
        told = json.loads((run / "run.json").read_text())
        (tmp_path / "runs/try" / name / "run.json").write_text(json.dumps(told | {"first_start": start}))
    shutil.rmtree(tmp_path / "runs/try/c/checkpoints")
    return "runs/try"


SAYS = "{}=runs/try: runs/try/b (the newest of 2 runs with a checkpoint), step 2\n"


@pytest.mark.parametrize("key", ["init_from", "fork"])
def test_a_folder_of_runs_is_the_newest_with_a_checkpoint_and_says_which(key, several, run, folder, capsys):
    lines = (f"{key}={several}", "data=text", f"data.path={folder / 'text.txt'}", "scheduler=constant")
    assert getattr(compose(lines), key) == "runs/try/b"
    assert capsys.readouterr().err == SAYS.format(key)


def test_a_run_keeps_the_one_that_it_was_begun_with_where_a_newer_one_has_come(several, folder):
    first = starting(folder, several, "unused", "run_dir=tuned", *ENDS_AFTER_A_STEP)
    train(first)
    newer = shutil.copytree("runs/try/a", "runs/try/d")
    Path(newer, "run.json").write_text('{"first_start": 500.0}')
    assert starting(folder, several, "unused", "run_dir=tuned", *ENDS_AFTER_A_STEP).init_from == "runs/try/b"
    assert starting(folder, several, "unused", "run_dir=another").init_from == "runs/try/d"


def test_every_verb_takes_a_folder_of_runs(several, run, folder, capsys):
    assert main(["generate", f"checkpoint={several}", "prompt=The ", "max_new_tokens=1"]) == 0
    assert SAYS.format("checkpoint") in capsys.readouterr().err
    assert main(["export", f"checkpoint={several}", "out=exported"]) == 0
    assert SAYS.format("checkpoint") in capsys.readouterr().err
    assert main([f"resume={several}", "trainer.max_steps=3"]) == 0
    assert SAYS.format("resume") in capsys.readouterr().err
    assert json.loads(Path("runs/try/b/run.json").read_text())["step"] == 3
    assert txtrain.load_pretrained(several).config.dim == 32
    shutil.rmtree("runs/try/a")
    shutil.rmtree("runs/try/b")
    assert main(["generate", f"checkpoint={several}", "prompt=The "]) == 2
    assert "'runs/try' is none of them, or has no complete checkpoint yet" in capsys.readouterr().err


def test_an_exported_model_is_the_same_in_transformers(run, exported):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ours = txtrain.load_pretrained(run)
    ids = torch.tensor([tokenizer("The 3th line says").input_ids])
    assert type(theirs).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    again = txtrain.load_pretrained(exported)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))
    assert ours.config.eos_token_id == again.config.eos_token_id == theirs.config.eos_token_id == 256


def test_export_refuses_a_full_folder(exported, run, capsys):
    assert main(["export", f"checkpoint={run}", f"out={exported}"]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing_and_a_killed_one_is_done_again(exported, run, tmp_path, monkeypatch, capsys):
    def full(opened, config, out):
        (out / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_model", full)
    (tmp_path / "empty").mkdir()
    for out in ("new", "empty"):
        assert main(["export", f"checkpoint={run}", f"out={tmp_path / out}"]) == 2
        assert f"`out` must be a folder, or a new one in a folder, that can be written to, but is '{tmp_path / out}'" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]
    monkeypatch.undo()
    (tmp_path / "killed" / ".export.00000000.tmp").mkdir(parents=True)  # while it moved its files
    (tmp_path / "killed" / ".export.00000000.tmp" / files.LOCK).touch()
    (tmp_path / "killed" / "model.safetensors").write_text("half")
    assert main(["export", f"checkpoint={run}", f"out={tmp_path / 'killed'}"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()} == {p.name: p.read_bytes() for p in exported.iterdir()}


def test_a_prompt_that_is_not_utf_8_is_refused(exported, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The \xff"), encoding="utf-8"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"The \xff")
    attempts = {
        "prompt=The \udcff": "`prompt` must be text in UTF-8, but is 'The \\udcff'",
        "prompt=-": "`prompt` must be text in UTF-8, but standard input is not",
        f"prompt_file={tmp_path / 'latin'}": "it is not UTF-8 text",
        f"prompt_file={tmp_path / 'pipe'}": "is a pipe",
    }
    for given, said in attempts.items():
        assert main(["generate", f"checkpoint={exported}", given]) == 2
        assert said in capsys.readouterr().err
    assert main(["generate", f"checkpoint={exported}", "prompt=The ", "temperature=1e-45", "max_new_tokens=2"]) == 0


def test_tokens_that_config_json_alone_forbids_are_forbidden_in_the_checkpoints_of_a_run(exported, folder, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(exported, start)
    (start / "generation_config.json").unlink()
    said = json.loads((start / "config.json").read_text()) | {"bad_words_ids": [[3], [4, 5]]}
    (start / "config.json").write_text(json.dumps(said))
    run = train(starting(folder, start, "forbidden", "trainer.max_steps=1"))
    assert txtrain.load_pretrained(run.run_dir).banned_tokens == (3,)


def test_generate_speaks_from_an_exported_folder(exported, capsys):
    assert main(["generate", f"checkpoint={exported}", "prompt=The 3", "max_new_tokens=4", "temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("The 3")


def test_tokenizer_and_generation_config_travel_byte_for_byte_and_every_end_token_ends(exported, folder, tmp_path, monkeypatch):
    """From a folder through a run, a resume and a checkpoint to an export."""
    start = tmp_path / "start"
    shutil.copytree(exported, start)
    given = {
        "generation_config.json": b'{"eos_token_id":[256,65],  "top_p":0.9, "bad_words_ids":[[3],[4,5]]}',
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer_config.json": b'{"padding_side":"left","eos_token":"<|endoftext|>"}',
        "special_tokens_map.json": b"{ }",
        "tokenizer.json": (start / "tokenizer.json").read_bytes() + b" ",
    }
    for name, content in given.items():
        (start / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    config = starting(folder, start, "travel", *ENDS_AFTER_A_STEP, "sample.prompts=[The]", "sample.max_new_tokens=3")
    ends = []
    generate = txtrain.generate

    def spied(model, *args, **how):
        ends.append((how["eos_token_id"], model.banned_tokens))
        return generate(model, *args, **how)

    monkeypatch.setattr("txtrain.model.generation.generate", spied)
    first = train(config).run_dir
    assert ends[0] == ((256, 65), (3,))
    again = train(compose([f"resume={first}", "trainer.max_steps=2"])).run_dir
    newest = max((again / "checkpoints").glob("step_*"))
    assert newest.name == "step_00000002"
    assert main(["export", f"checkpoint={newest}", f"out={tmp_path / 'out'}"]) == 0
    for name, content in given.items():
        beside = newest / name if name == "generation_config.json" else newest / "tokenizer" / name
        assert (beside.read_bytes(), (tmp_path / "out" / name).read_bytes()) == (content, content), name
    assert txtrain.load_pretrained(newest).config.eos_token_id == (256, 65)
    assert {said for _, said in ends} == {txtrain.load_pretrained(newest).banned_tokens} == {(3,)}
    (newest / "generation_config.json").write_bytes(given["generation_config.json"].replace(b"65", b"66"))
    with pytest.raises(ConfigError, match=r"generation_config\.json has changed since it was written"):
        txtrain.load_pretrained(newest)
