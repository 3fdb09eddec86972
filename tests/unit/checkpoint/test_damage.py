"""What was written is what is read: damage of every file of a run, and what each verb says of it."""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tests.training import rows, tiny, weights
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import restore, run_folder
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.load import load
from txtrain.checkpoint.planned import PlannedReader
from txtrain.checkpoint.reader import Reader
from txtrain.checkpoint.state import RunState
from txtrain.cli.main import main
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.monitor import metrics_csv
from txtrain.run_config import SaveConfig
from txtrain.training.run import train

SMALL = ("model.dim=8", "model.n_layers=1", "trainer.max_steps=4", "save.every_n_steps=2", "save.keep_last=5")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of two runs of the same configuration, each with checkpoints at steps 2 and 4."""
    home = tmp_path_factory.mktemp("made")
    for name in ("run", "other"):
        train(tiny(home, f"run_dir={home / name}", *SMALL))
    return home


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def step(run, n):
    return checkpoint.path_of(run, n)


def shard(folder):
    return next(folder.glob("*.safetensors"))


def flip(path, at=-5):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def first_weight(path):
    """Where the numbers begin."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def replaced(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def continued(made, run, *more):
    """The same run with more steps."""
    return train(tiny(made, f"run_dir={run}", *SMALL, "trainer.max_steps=6", *more))


NEWEST = {
    "marker gone": (lambda p, made: (p / "complete").unlink(), "complete"),
    "a byte of a tensor": (lambda p, made: flip(shard(p), first_weight(shard(p))), "is not what was written"),
    "an older shard": (lambda p, made: shutil.copy(shard(step(p.parent.parent, 2)), shard(p)), "of another checkpoint: its id is .*, step 2"),
    "a foreign shard": (lambda p, made: shutil.copy(shard(step(made / "other", 4)), shard(p)), "of another checkpoint: its id is .*, step 4"),
    "a number in config.yaml": (lambda p, made: replaced(p / "config.yaml", "lr: 0.01", "lr: 0.02"), "config.yaml has changed"),
    "tokens in state.json": (lambda p, made: replaced(p / "state.json", '"tokens": 10', '"tokens": 20'), "state.json has changed"),
    "a key of state.json": (lambda p, made: replaced(p / "state.json", '"step":', '"stop":'), r"state.json: `step` must be an integer"),
    "another step": (lambda p, made: replaced(p / "state.json", '"step": 4', '"step": 3'), "`step` must be 4, but is 3"),
    "a tokenizer's file": (lambda p, made: flip(next((p / "tokenizer").iterdir())), "tokenizer/.* has changed"),
    "a further shard": (lambda p, made: shutil.copy(shard(p), p / "shard-00002.safetensors"), "shard-00002.safetensors is not among"),
}
VERBS = {
    "resume": lambda run: [f"resume={run}", "trainer.max_steps=6"],
    "fork": lambda run: [f"fork={run}", "run_dir=new"],
    "init_from": lambda run: [f"init_from={run}", "run_dir=new"],
    "generate": lambda run: ["generate", f"checkpoint={run}", "prompt=a", "max_new_tokens=2"],
    "export": lambda run: ["export", f"checkpoint={run}", "out=new"],
}


@pytest.mark.parametrize("damage", NEWEST)
def test_damage_of_the_newest_checkpoint_is_refused_by_name(damage, made, run):
    do, word = NEWEST[damage]
    do(step(run, 4), made)
    with pytest.raises(ConfigError, match=f"step_00000004 cannot be read: .*({word}).* The newest intact one: checkpoint={step(run, 2)}$"):
        load(run)
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(ConfigError, match=f"cannot be read: .*({word}).* step_00000002. .* mv {step(run, 4)} {step(run, 4)}.damaged$"):
        continued(made, run)
    assert (run / "metrics.csv").read_bytes() == before
    step(run, 4).rename(f"{step(run, 4)}.damaged")  # what it says
    load(run)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("damage", ["marker gone", "a byte of a tensor"])
def test_no_verb_passes_over_a_damaged_newest_checkpoint(verb, damage, made, run, capsys):
    do, word = NEWEST[damage]
    do(step(run, 4), made)
    text = ("data=text", f"data.path={made / 'text.txt'}", f"data.cache_dir={made / 'cache'}", "data.seq_len=32")
    line = VERBS[verb](run)
    line += [*text, "trainer.accelerator=cpu", "data.tokenizer=bytes", "trainer.max_steps=6"] if verb == "init_from" else []
    line += [o for o in _line_of(made) if not o.startswith("run_dir")] if verb == "fork" else []
    assert main(line) == 2
    said = capsys.readouterr().err
    key = {"generate": "checkpoint", "export": "checkpoint"}.get(verb, verb)
    wayout = f"mv {step(run, 4)} {step(run, 4)}.damaged" if verb == "resume" else f"{key}={step(run, 2)}"
    assert word in said
    assert said.strip().endswith(wayout)
    assert "Traceback" not in said
    assert not Path("new").exists()


def _line_of(made):
    from tests.training import TINY

    return [*TINY, f"data.path={made / 'text.txt'}", f"data.cache_dir={made / 'cache'}", *SMALL]


def test_a_checkpoint_is_told_by_its_id_and_checksums_can_be_left_out(made, run):
    ids = [checkpoint.read_state(step(made / name, n)).id for name in ("run", "other") for n in (2, 4)]
    assert len({*ids}) == 4
    flip(shard(step(run, 4)), -5)  # of the optimizer's state
    load(run)
    with pytest.raises(ConfigError, match=r"optimizer\..* is not what was written"):
        continued(made, run)
    continued(made, run, "save.verify=false")


def test_weights_that_are_not_finite_are_named_and_used_only_where_that_is_said(made, run, tmp_path, capsys):
    """In resume, fork, init_from, export and generate."""
    source = step(run, 4)
    state = checkpoint.read_state(source)
    tensors = {name: torch.zeros(shape) for name, shape in checkpoint.shapes(source).items()}
    restore.load_tensors(source, tensors)
    tensors["model.blocks.0.ffn.up_proj.weight"][0, 3] = float("nan")
    tensors["model.head.weight"][0, 0] = -float("inf")

    def beside(folder):
        shutil.copy(source / "config.yaml", folder)
        shutil.copytree(source / "tokenizer", folder / "tokenizer")

    saving.save(source, tensors, state, beside)
    says = r"must be finite numbers, but .*model\.blocks\.0\.ffn\.up_proj\.weight.* hold NaN or infinity.*allow_nonfinite=true"
    with pytest.raises(ConfigError, match=f"`resume`: .*{says}"):
        continued(made, run)
    for verb in ("generate", "export"):
        assert main(VERBS[verb](run)) == 2
        assert "up_proj.weight, model.head.weight hold NaN" in capsys.readouterr().err
    assert main([*VERBS["export"](run), "allow_nonfinite=true"]) == 0
    capsys.readouterr()
    assert main([*VERBS["export"]("new")[:-1], "out=again"]) == 2, "of a Hugging Face folder too"
    assert "up_proj.weight, head.weight hold NaN" in capsys.readouterr().err
    for key, where in (("fork", tmp_path / "fork"), ("init_from", tmp_path / "init")):
        line = [o for o in _line_of(made) if key == "fork" or not o.startswith("model")]
        assert main([*line, f"{key}={run}", f"run_dir={where}", "trainer.max_steps=6"]) == 2
        assert f"`{key}`: " in capsys.readouterr().err
        assert not where.exists()
    with pytest.raises(Exception, match="not finite"):  # the steps are not, later
        continued(made, run, "allow_nonfinite=true", "trainer.max_skipped_steps=0")


# ----------------------------------------------------------------------------------------------------- files beside checkpoints

METRICS = {
    "a lost row": (lambda lines: [*lines[:2], *lines[3:]], "must have the 4 rows up to step 4 that were written, but has 3 of them"),
    "half a row": (lambda lines: [*lines[:2], lines[2][:9], *lines[3:]], "line 3, must be a row"),
    "a letter": (lambda lines: [*lines[:2], lines[2][:-1] + "x", *lines[3:]], "line 3, must be a row"),
    "a digit": (lambda lines: [*lines[:2], lines[2].replace(lines[2].split(",")[2], "3.5"), *lines[3:]], "one of them has changed"),
    "a row twice": (lambda lines: [*lines[:3], *lines[2:]], "one of them has changed"),
    "nothing": (lambda lines: [], "has 0 of them"),
}


@pytest.mark.parametrize("damage", METRICS)
def test_rows_that_are_not_those_that_were_written_are_refused(damage, made, run):
    do, says = METRICS[damage]
    file = run / "metrics.csv"
    lines = file.read_text().splitlines()
    file.write_text("".join(f"{line}\n" for line in do(lines)))
    with pytest.raises(ConfigError, match=rf"metrics\.csv.*{says}(.|\n)*mv {file} {file}\.damaged"):
        continued(made, run)
    assert json.loads((run / "run.json").read_text())["status"] == "complete", "nothing was written"


def test_rows_behind_the_checkpoint_may_be_damaged_and_the_file_may_be_gone(made, run, capsys):
    whole = rows(run)
    with open(run / "metrics.csv", "ab") as f:
        f.write(b"5,1,\xff\0\n\0\0\0")
    continued(made, run, "trainer.max_steps=5")
    assert rows(run)[:4] == whole
    (run / "metrics.csv").unlink()
    (run / "run.json").unlink()
    capsys.readouterr()
    continued(made, run)
    said = capsys.readouterr().out
    assert "metrics.csv is gone: it begins anew with step 6" in said
    assert "run.json is gone" in said
    assert [row["step"] for row in rows(run)] == ["6"]


def test_rows_are_told_by_what_they_say(tmp_path):
    """Whatever columns are added, and however a resumed run writes its file anew."""
    path = tmp_path / "metrics.csv"
    file = metrics_csv.MetricsFile(path, ("step", "loss", "lr"))
    for n in (1, 2, 3):
        file.write({"step": n, "loss": 1 / n, "lr": None})
    file.close()
    again = metrics_csv.MetricsFile(path, ("step", "mine", "loss", "lr"), keep=2, n_kept=2)
    two = again.hash
    again.write({"step": 3, "loss": 1 / 3, "mine": None})
    again.close()
    assert (again.hash, again.n_rows) == (file.hash, 3)
    assert two != file.hash
    assert metrics_csv.digest_of(metrics_csv.read(path)).hexdigest() == file.hash


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda file: file.unlink(), r"has no config\.yaml"),
        (lambda file: file.write_text(""), "must be a mapping"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40] + b": {"), "plain YAML"),
    ],
    ids=["gone", "empty", "damaged"],
)
def test_a_runs_config_that_is_damaged_is_told_with_the_copy_to_take(do, says, run, capsys):
    do(run / "config.yaml")
    assert main([f"resume={run}"]) == 2
    said = capsys.readouterr().err
    command = f"cp {step(run, 4)}/config.yaml {run}/config.yaml"
    assert said.strip().endswith(command)
    assert says.replace("\\", "") in said
    shutil.copy(step(run, 4) / "config.yaml", run / "config.yaml")
    assert main([f"resume={run}"]) == 0


def test_a_key_that_the_version_before_did_not_have_has_its_default(made, run):
    """Whatever version of txtrain added it: the run of the older one goes on."""
    config, file = tiny(made, f"run_dir={run}", *SMALL), step(run, 4) / "config.yaml"
    for key, fine in (("ema", True), ("seed", True), ("optimizer", False)):  # the run's own optimizer.lr is not the default
        whole = yaml.safe_load((run / "config.yaml").read_text())
        lost = {**whole, key: {"type": whole[key]["type"]}} if key == "optimizer" else {k: v for k, v in whole.items() if k != key}
        file.write_text(yaml.safe_dump(lost))
        (step(run, 4) / "complete").write_text(json.dumps(checkpoint.marker_of(step(run, 4))))
        with contextlib.nullcontext() if fine else pytest.raises(ConfigError, match=r"`optimizer\.lr` must be .*, but is 0\.01 instead"):
            assert run_folder.choose(config).checkpoint == step(run, 4)


def test_a_changed_value_in_a_runs_config_is_said(run, capsys):
    raw = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**raw, "trainer": {**raw["trainer"], "log_every_n_steps": 3}}))
    assert main([f"resume={run}"]) == 0
    assert "trainer.log_every_n_steps: 1 in step_00000004, 3 in the run's config.yaml" in capsys.readouterr().out


def test_a_damaged_run_json_is_told_and_may_be_moved_away(made, run, capsys):
    for text in ("", "{", '{"starts": "x"}'):
        (run / "run.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"run\.json.*(.|\n)*mv {run}/run\.json {run}/run\.json\.damaged"):
            continued(made, run)
        assert main([f"resume={run}"]) == 2
    (run / "run.json").rename(run / "run.json.damaged")
    assert main([f"resume={run}"]) == 0
    assert "run.json is gone" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_a_newer_format_is_refused_by_its_number(verb, made, run, capsys):
    for file in (run / "run.json", step(run, 4) / "state.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    (step(run, 4) / "config.yaml").write_text("of: another kind")
    line = VERBS[verb](run) + ([o for o in _line_of(made) if verb == "fork" or not o.startswith("model")] if verb in ("fork", "init_from") else [])
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "`format` must be at most" in said
    assert "is 99 instead: a newer version wrote it." in said
    assert "cannot be read" not in said


def test_a_folder_of_runs_does_not_pass_over_a_damaged_run(run, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(run, runs / "one")
    (runs / "one/run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"one/run\.json"):
        load(runs)
    shutil.copy(run / "run.json", runs / "one/run.json")
    for n in (2, 4):
        (step(runs / "one", n) / "complete").unlink()
    with pytest.raises(ConfigError, match="step_00000004 cannot be read"):
        load(runs)


def test_an_older_damaged_checkpoint_neither_stops_a_run_nor_is_removed(made, run, capsys):
    (step(run, 2) / "state.json").write_text("{")
    continued(made, run, "save.keep_last=1")
    assert "step_00000002 is damaged. It is left" in capsys.readouterr().out
    assert step(run, 2) in checkpoint.complete(run)


# ------------------------------------------------------------------------------------------------------------- beside a run


@pytest.mark.parametrize("name", ["step_00000006.damaged", "step_00000006.tmp", "step_x", "step_6"])
def test_a_folder_that_is_no_checkpoint_gives_no_tokenizer(name, run):
    """One that was moved away, as the errors advise, or one that is being written."""
    shutil.copytree(step(run, 4), run / "checkpoints" / name)
    (run / "checkpoints" / name / "tokenizer" / "tokenizer.json").write_text("{}")
    assert load_tokenizer(run).vocab_size == 257


def test_generate_beside_a_run_that_rotates_opens_one_that_stays(made, run, monkeypatch):
    """A checkpoint is gone a moment after it was found, again and again."""
    source, n_gone = step(run, 4), 0
    real = checkpoint.locate

    def racing(where, key="checkpoint"):
        nonlocal n_gone
        found = real(where, key)
        if n_gone < 3:
            n_gone += 1
            newer = step(run, checkpoint.step_of(found) + 1)
            shutil.copytree(found, newer)
            state = json.loads((newer / "state.json").read_text())
            tensors = {name: torch.zeros(shape) for name, shape in checkpoint.shapes(source if source.exists() else newer).items()}
            restore.load_tensors(newer, tensors)
            shutil.rmtree(newer)

            def beside(folder):
                shutil.copy(found / "config.yaml", folder)
                shutil.copytree(found / "tokenizer", folder / "tokenizer")

            saving.save(newer, tensors, RunState(step=state["step"] + 1, data_order_hash="a"), beside)
            saving.rotate(run, SaveConfig(keep_last=1, keep_best=0))
        return found

    monkeypatch.setattr(checkpoint, "locate", racing)
    assert load(run).path == step(run, 7)
    assert n_gone == 3
    with pytest.raises(ConfigError, match="does not exist"):
        load(source)


def test_generate_beside_a_thread_that_rotates(run):
    source = step(run, 4)
    tensors = {name: torch.zeros(shape) for name, shape in checkpoint.shapes(source).items()}
    restore.load_tensors(source, tensors)
    config, tokenizer, ended = (source / "config.yaml").read_text(), shutil.copytree(source / "tokenizer", run / "kept"), threading.Event()

    def beside(folder):
        (folder / "config.yaml").write_text(config)
        shutil.copytree(tokenizer, folder / "tokenizer")

    def rotating():
        with contextlib.suppress(OSError):
            for n in range(5, 500):
                if ended.is_set():
                    return
                saving.save(step(run, n), tensors, RunState(step=n), beside)
                saving.rotate(run, SaveConfig(keep_last=1, keep_best=0))

    thread = threading.Thread(target=rotating)
    thread.start()
    try:
        found, end = [load(run) for _ in range(8)], time.monotonic() + 60
        while len({one.path for one in found}) == 1 and time.monotonic() < end:  # the thread has yet to finish a save
            found.append(load(run))
    finally:
        ended.set()
        thread.join()
    assert len({one.path for one in found}) > 1, "nothing was rotated meanwhile"
    for one in found:
        assert torch.equal(one.model.state_dict()["embedding.token.weight"], tensors["model.embedding.token.weight"])


def test_files_that_vanish_between_their_check_and_their_reading_are_missed(run, monkeypatch):
    source, compared = step(run, 4), restore._compare
    tensors = {name: torch.zeros(shape) for name, shape in checkpoint.shapes(source).items()}

    def then_gone(path, *given):
        compared(path, *given)
        for shard in path.glob("*.safetensors"):
            shard.unlink()

    monkeypatch.setattr(restore, "_compare", then_gone)
    with pytest.raises(ConfigError, match="no longer hold all of"):
        restore.load_tensors(source, tensors)


def test_weights_are_what_they_were(run, made):
    assert weights(run) == weights(made / "run")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_tensor_of_which_each_process_reads_a_part_is_compared_too(tmp_path, damaged):
    """On another number of processes nobody reads it whole: one of them looks at all of it."""
    path, w = step(tmp_path, 1), torch.arange(12.0).reshape(4, 3)
    saving.save(path, {"model.w": w}, RunState(step=1), lambda folder: None)
    if damaged:
        flip(shard(path), -1)
    reader = PlannedReader(Reader(path))
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    halves = [ChunkStorageMetadata(torch.Size((2 * i, 0)), torch.Size((2, 3))) for i in range(2)]
    known = metadata.state_dict_metadata["model.w"]
    plans = reader.prepare_global_plan([LoadPlan(create_read_items_for_chunk_list("model.w", known, [half])) for half in halves])
    assert [len(plan.storage_data) for plan in plans] == [1, 0]
    into = torch.zeros(2, 3)
    planner = SimpleNamespace(resolve_tensor=lambda item: into, commit_tensor=lambda item, tensor: None)
    if damaged:
        with pytest.raises(ConfigError, match=r"model\.w is not what was written"):
            reader.read_data(plans[0], planner)
        return
    for plan, half in zip(plans, (w[:2], w[2:]), strict=True):
        reader.read_data(plan, planner)
        assert torch.equal(into, half)
