"""W&B with its real client, offline: what it leaves on the disk is read back."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import lightning.pytorch as pl
import pytest
import wandb
from PIL import Image
from wandb.sdk.lib.settings_file import SettingsFiles

from tests.training import RUN, tiny
from tests.wandb_file import WandbFile, wandb_files
from txtrain import compose
from txtrain.monitor.metrics_csv import read
from txtrain.training.run import train


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wandb")


def config(folder, name, *overrides):
    return tiny(folder, f"run_dir={folder / name}", "logger=wandb", *overrides)


class At(pl.Callback):
    """Does something after the step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, module, *_):
        if module.step == self.step:
            self.what()


def interrupt_at(step):
    return At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def service():
    """The processes of W&B's service that this one has started."""
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if line.split()[1].startswith("wandb")]


def history(files):
    """Of all processes, without what the client adds and what is no number."""
    return [{name: value for name, value in row.items() if name[0] != "_" and not name.startswith("samples")} for file in files for row in file.history]


def written(run_dir):
    return [{name: float(text) for name, text in row.items() if text and name != "step"} for row in read(run_dir / "metrics.csv")]


def steps(run_dir):
    return [int(row["step"]) for row in read(run_dir / "metrics.csv")]


@pytest.fixture(scope="module")
def whole(folder):
    """A run from its first step to its last, and what it said."""
    wandb.teardown()  # it reads its variables once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_TAGS", "from,outside")
        patch.setenv("WANDB_DATA_DIR", str(folder / "data"))
        given = ("logger.project=mine", "logger.group=g", "logger.tags=[a]", "logger.x_axis=tokens", "logger.log_model=true", "sample.prompts=[The,A]")
        train(config(folder, "whole", *given, "sample.max_new_tokens=4"))
    (file,) = wandb_files(folder / "whole")
    return file


def test_the_history_is_metrics_csv(whole, folder):
    assert whole.steps == steps(folder / "whole") == [*range(1, 13)]
    assert history([whole]) == written(folder / "whole")
    assert {name: whole.summary[name] for name in ("loss", "val_loss", "tokens")} == {
        name: written(folder / "whole")[-1][name] for name in ("loss", "val_loss", "tokens")
    }
    assert whole.summary["data_order_hash"] == json.loads((folder / "whole" / "run.json").read_text())["data_order_hash"]


def test_the_config_tells_of_code_data_and_plan(whole, folder):
    said = json.loads((folder / "whole" / "run.json").read_text())
    assert whole.config["optimizer"]["lr"] == 0.01
    assert whole.config["model"]["attention"]["type"] == "mha"
    told = whole.config["run"]
    assert (told["git_commit"], told["data"], told["parent"]) == (said["git_commit"], said["data"], None)
    assert "status" not in told
    plan = whole.config["plan"]
    assert plan["n_params"] == said["parameters"]
    assert min(plan["flops_per_token"], plan["memory"], plan["flops"]) > 0


def test_the_words_of_the_configuration_and_the_variables_that_win(whole, folder):
    assert (whole.project, whole.group, whole.name) == ("mine", "g", "llama2-text/whole")
    assert sorted(whole.tags) == ["from", "outside"]
    assert whole.metrics == {"tokens": "", "*": "tokens"}
    assert whole.id == json.loads((folder / "whole" / "run.json").read_text())["wandb_id"]


def test_samples_are_tables_and_the_last_checkpoint_an_artifact(whole):
    tables = sorted((whole.path.parent / "files" / "media" / "table").glob("samples_*"))
    assert len(tables) == 3
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["step", "given", "answer"]
    assert [row[:2] for row in table["data"]] in ([[step, "The"], [step, "A"]] for step in (5, 10, 12))
    assert [row["_step"] for row in whole.history if "samples.nrows" in row] == [5, 10, 12]
    assert (f"model-{whole.id}", "model", ["best", "latest", "step-12"]) in whole.artifacts


def test_images_are_shown_with_label_and_prediction(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = ("model.n_layers=1", "model.dim=32", "model.n_heads=2", "trainer.max_steps=2", "sample.n=3", f"run_dir={folder / 'images'}")
    train(compose(["model=vit", *RUN, *given, "logger=[wandb,tensorboard]"]))
    (file,) = wandb_files(folder / "images")
    shown = file.history[-1]
    assert (shown["samples/images._type"], shown["samples/images.count"], shown["_step"]) == ("images/separated", 3, 2)
    assert all(re.fullmatch(r"label \d, predicted \d \(0\.\d\d\)", caption) for caption in shown["samples/images.captions"])
    pictures = [*(file.path.parent / "files" / "media" / "images").rglob("*.png")]
    assert len(pictures) == 3
    assert all(Image.open(picture).size == (8, 8) and Image.open(picture).convert("RGB").getextrema()[0] == (0, 255) for picture in pictures)
    events = EventAccumulator(str(folder / "images" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples/images")] == [2]
    text = (folder / "images" / "samples.txt").read_text()
    assert text.count("label") == 3
    assert "|predicted " in text


def test_a_complete_run_ends_with_exit_code_0(whole):
    assert (whole.exit_code, whole.preempted) == (0, False)


def test_a_preempted_run_is_marked_and_its_next_start_goes_on_with_the_same_run_also_in_another_place(folder, capsys):
    assert train(config(folder, "cut"), callbacks=[interrupt_at(6)]).status == "preempted"
    (first,) = wandb_files(folder / "cut")
    assert (first.exit_code, first.preempted, first.steps) == (75, True, [*range(1, 7)])
    shutil.move(folder / "cut", folder / "moved")
    train(config(folder, "moved"))
    first, second = wandb_files(folder / "moved")
    assert (second.id, second.exit_code, second.preempted) == (first.id, 0, False)
    assert first.steps + second.steps == steps(folder / "moved")
    assert history([first, second]) == written(folder / "moved")
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("to send the run later: wandb sync") == 2
    assert f"wandb/offline-run-*-{first.id}" in said


def test_rows_that_a_killed_process_took_with_it_are_sent_again(folder):
    """W&B's client loses up to 32 KiB of its last records; metrics.csv loses none."""
    train(config(folder, "killed"), callbacks=[interrupt_at(8)])
    (file,) = wandb_files(folder / "killed")
    data = file.path.read_bytes()
    cut = next(n for n in range(len(data), 0, -100) if WandbFileOf(file.path, data[:n]).steps[-1:] == [5])
    file.path.write_bytes(data[:cut])
    train(config(folder, "killed"))
    first, second = wandb_files(folder / "killed")
    assert (first.steps, second.steps) == ([*range(1, 6)], [*range(6, 13)])
    assert history([first, second]) == written(folder / "killed")


def WandbFileOf(path, data):
    part = path.with_suffix(".part")
    part.write_bytes(data)
    try:
        return WandbFile(part)
    finally:
        part.unlink()


def test_a_service_that_is_killed_alone_is_started_anew(folder):
    """SLURM sends SIGTERM to every process of a job, and the service ends at once, with what it has not written."""

    def kill():
        while not service():
            time.sleep(0.1)
        time.sleep(1)
        for pid in service():
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)

    train(config(folder, "service"), callbacks=[At(4, kill)])
    files = wandb_files(folder / "service")
    assert len(files) == 2
    assert {file.id for file in files} == {files[0].id}
    assert [step for file in files for step in file.steps] == [*range(1, 13)]
    assert files[-1].exit_code == 0
    assert history(files) == written(folder / "service")


def test_a_fork_is_a_run_of_its_own_that_names_its_parent(folder, whole):
    train(config(folder, "fork", f"fork={folder / 'whole'}", "trainer.max_steps=14"))
    (fork,) = wandb_files(folder / "fork")
    assert fork.id != whole.id
    assert fork.config["run"]["parent"] == {"checkpoint": str(folder / "whole/checkpoints/step_00000012"), "step": 12, "wandb_id": whole.id}
    assert fork.steps == [13, 14]


def test_a_run_that_was_ended_before_its_first_checkpoint_keeps_its_id_and_another_configuration_does_not(folder):
    place = folder / "early"
    place.mkdir()
    train(config(folder, "early", "logger=none", "trainer.max_steps=1"))
    shutil.rmtree(place / "checkpoints")
    text = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps(text | {"wandb_id": "kept0000"}))
    train(config(folder, "early", "logger=none", "trainer.max_steps=1"))
    assert json.loads((place / "run.json").read_text())["wandb_id"] == "kept0000"
    shutil.rmtree(place / "checkpoints")
    train(config(folder, "early", "logger=none", "trainer.max_steps=1", "optimizer.lr=0.02"))
    assert "wandb_id" not in json.loads((place / "run.json").read_text())


def test_without_a_key_the_run_is_offline_and_says_so_with_the_command(folder, monkeypatch, capsys):
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "no_netrc"))
    train(config(folder, "keyless", "trainer.max_steps=2"))
    (file,) = wandb_files(folder / "keyless")
    assert file.steps == [1, 2]
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("W&B offline (no API key") == 1
    assert f"wandb sync {folder / 'keyless'}/wandb/offline-run-*-{file.id}" in said


@pytest.mark.slow
def test_without_a_network_the_run_is_offline(folder, monkeypatch, capsys):
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    train(config(folder, "netless", "trainer.max_steps=2"))
    (file,) = wandb_files(folder / "netless")
    assert file.steps == [1, 2]
    assert capsys.readouterr().out.replace("\n", "").count("W&B offline (Failed to authenticate with http://127.0.0.1:9") == 1


def test_a_failing_run_is_failed_there_too(folder, monkeypatch):
    def fail():
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        train(config(folder, "failing"), callbacks=[At(3, fail)])
    (file,) = wandb_files(folder / "failing")
    assert (file.exit_code, file.preempted) == (1, False)


def test_an_argument_that_does_not_fit_is_the_users_mistake_before_anything_is_written(folder):
    from txtrain.errors import ConfigError

    with pytest.raises(ConfigError, match=r"`logger\.wandb` .* cannot be made.*offline"):
        train(config(folder, "wrong", "logger.offline=true", "logger.log_model=all"))
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_a_current_folder_that_names_a_server_or_a_key_is_refused_before_anything_is_written(name, folder, tmp_path, monkeypatch):
    from txtrain.errors import ConfigError

    monkeypatch.chdir(tmp_path)
    settings = tmp_path / name / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nproject = mine\n")
    train(config(folder, f"own{name}", "trainer.max_steps=1"))
    settings.write_text("[default]\nbase_url = https://elsewhere.example\napi_key: x\n")
    with pytest.raises(ConfigError, match=rf"{name}/settings must not name api_key and base_url.*WANDB_BASE_URL"):
        train(config(folder, f"theirs{name}"))
    assert not (folder / f"theirs{name}").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[default]\nBASE_URL = https://elsewhere.example\n", "base_url"),
        ("[default]\nproject = mine\rbase_url = https://elsewhere.example\n", "base_url"),
        ("[DEFAULT]\nhttps_proxy = https://elsewhere.example\n[default]\n", "https_proxy"),
        ("[default]\ninsecure_disable_ssl = true\nidentity_token_file = x\n", "identity_token_file and insecure_disable_ssl"),
    ],
)
def test_every_spelling_that_wandb_reads_is_refused(text, named, tmp_path, monkeypatch):
    from txtrain.errors import ConfigError
    from txtrain.monitor.loggers.wandb import WandbLogger

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wandb" / "settings"
    path.parent.mkdir()
    path.write_bytes(text.encode())
    assert set(named.split(" and ")) <= SettingsFiles(global_settings=None, local_settings=path).all().keys()
    with pytest.raises(ConfigError, match=f"must not name {named}, "):
        WandbLogger()


def test_settings_that_name_no_server_are_accepted_and_no_settings_at_all_are_refused(tmp_path, monkeypatch):
    from txtrain.errors import ConfigError
    from txtrain.monitor.loggers.wandb import WandbLogger

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wandb" / "settings"
    path.parent.mkdir()
    path.write_text("[default]\nMode = offline\nentity: us\nproject = base_url\n  api_key = not a key but a value's second line\n")
    WandbLogger()
    path.write_text("base_url = https://elsewhere.example\n")
    with pytest.raises(ConfigError, match="must be settings of W&B's, but cannot be read: File contains no section headers"):
        WandbLogger()
