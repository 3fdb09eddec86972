"""resume=RUN: the configuration of an earlier run, with key=value on top."""

import pytest
import yaml

from txtrain.cli.main import main
from txtrain.errors import ConfigError
from txtrain.ground.convert import plain


@pytest.fixture
def run(job, clean_room):
    """run("model=mistral", ...) leaves a run's folder with that configuration."""

    def leave(*overrides, folder="out, 1"):
        (clean_room / folder / "checkpoints/step_00000006").mkdir(parents=True)
        (clean_room / folder / "config.yaml").write_text(yaml.safe_dump(plain(job(*overrides).config)))
        return folder

    return leave


@pytest.mark.parametrize("inside", ["", "/checkpoints/step_00000006", "/"])
def test_the_runs_own_configuration_with_values_on_top(run, job, inside):
    folder = run("model=mistral", "data.path=a${b}", "optimizer.lr=1e-5")
    made = job(
        f"resume={folder}{inside}",
        "optimizer.lr=2e-5",
        "trainer.max_steps=7",
        "logger=wandb",
        "name=${x}, y",
        "model.attention.window=7",
    )
    config = made.config
    assert (config.model.family, config.data.path, config.model.attention.n_kv_heads) == ("mistral", "a${b}", 2)
    assert (config.optimizer.lr, config.trainer.max_steps, config.name, config.model.attention.window) == (
        2e-5,
        7,
        "${x}, y",
        7,
    )
    assert set(config.logger) == {"wandb"}
    assert (config.resume, config.run_dir) == (f"{folder}{inside}", folder)
    assert made.given == ["resume", "optimizer.lr", "trainer.max_steps", "logger", "name", "model.attention.window"]


def test_a_group_chosen_anew_comes_from_its_file(run, job):
    folder = run("trainer.max_steps=5", "trainer.val_check_interval=3")
    assert job(f"resume={folder}", "trainer=default", "trainer.max_steps=9").config.trainer.val_check_interval == 100
    assert job(f"resume={folder}", "trainer.max_steps=9").config.trainer.val_check_interval == 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model/attention=mqa", "a resumed run keeps its parts; only strategy, trainer, logger"),
        ("model=gpt2", "keeps its parts"),
        ("data=python_docs", "keeps its parts"),
        ("recipe=x", "keeps its parts"),
        ("~logger", "keeps its parts"),
        ("optimizer.lrr=1", r"Did you mean optimizer\.lr\?"),
        ("trainer=nope", "`trainer=nope` must be one of default, long, longer, medium, short"),
        ("model.n_layers=x", "must be an integer"),
    ],
)
def test_what_a_resumed_run_may_not_change(override, says, run, job):
    folder = run()
    with pytest.raises(ConfigError, match=says):
        job(f"resume={folder}", override)


def test_no_run_no_resume(run, job, clean_room):
    with pytest.raises(ConfigError, match="'nope' does not exist"):
        job("resume=nope")
    (clean_room / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"'empty' has no config\.yaml"):
        job("resume=empty")
    folder = run()
    (clean_room / folder / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not plain YAML"):
        job(f"resume={folder}")
    (clean_room / folder / "config.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must be a mapping"):
        job(f"resume={folder}")


def test_a_run_is_resumed_alone(run, capsys):
    folder = run(folder="r")
    assert main(["-m", f"resume={folder}", "seed=1,2"]) == 2
    assert "without -m" in capsys.readouterr().err


def test_code_is_never_imported_by_a_checkpoints_word(run, job, clean_room, forget, monkeypatch):
    (clean_room / "own_part.py").write_text(
        "import pathlib, txtrain\npathlib.Path('ran').touch()\n"
        "@txtrain.component('ffn', 'mine')\nclass Mine:\n    def __init__(self, dim, width: int = 3): pass\n"
    )
    folder = run("imports=[own_part.py]", "model/ffn=mine")
    from txtrain.registry import TABLE

    (clean_room / "ran").unlink()
    del TABLE["ffn"]["mine"]
    with pytest.raises(ConfigError, match=r"the run used imports=\[.*own_part\.py\]"):
        job(f"resume={folder}")
    assert not (clean_room / "ran").exists()
    import sys

    del sys.modules["own_part"]
    assert job(f"resume={folder}", "imports=[own_part.py]").config.model.ffn.type == "mine"
    assert (clean_room / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optimizer", {"_target_": "os.system"}, "only under logger and callbacks"),
        ("imports", 5, r"config\.yaml: `imports` must be a list of which each is text or null, but is 5"),
        (
            "logger",
            {"x": {"_target_": "os.system"}},
            "is 'os.system' in the run's config.yaml, and a class that a file names is never built",
        ),
        ("logger", {"wandb": {"_target_": "os.system"}}, "never built"),
        ("logger", {"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "/anywhere"}}, "never built"),
        ("logger", {"x": 3}, "names no class"),
        ("callbacks", {"x": {"_target_": "own_part.Thing"}}, "never built"),
        (
            "callbacks",
            {"x": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "/anywhere"}},
            "never built",
        ),
        (
            "callbacks",
            {"x": {"_target_": "txtrain.parallel.launch.Group", "command": ["touch", "ran"], "environments": [{}]}},
            "never built",
        ),
    ],
)
def test_what_a_run_names_is_not_built(key, value, says, run, job, clean_room):
    with pytest.raises(ConfigError, match=says):
        job(f"resume={changed(clean_room / run(), **{key: value})}")


def changed(folder, **values):
    """The run's folder with other values in its config.yaml."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))
    return folder


def test_callbacks_and_loggers_come_from_the_command_line_where_the_file_has_others(run, job, clean_room):
    bad = {"_target_": "os.system", "patience": 3}
    folder = changed(clean_room / run(), callbacks={"stop": dict(bad)}, logger={"x": dict(bad)})
    line = (
        "logger=none",
        "callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
        "callbacks.stop.monitor=loss",
    )
    made = job(f"resume={folder}", *line)
    assert made.config.callbacks == {
        "stop": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "loss"}
    }
    assert made.config.logger == {}
    assert "logger.x._target_: 'os.system' in the run's config.yaml, now absent" in made.notes
    assert "callbacks.stop.patience: 3 in the run's config.yaml, now absent" in made.notes
    assert job(f"resume={folder}", "logger=none", "callbacks=none").config.callbacks == {}


def test_a_packaged_logger_keeps_its_plain_values(run, job, clean_room):
    folder = run(
        "logger=[wandb,tensorboard]",
        "logger.project=mine",
        "logger.wandb.tags=[a,b]",
        "logger.entity=team",
        "logger.tensorboard.name=x",
    )
    made = job(f"resume={folder}")
    assert (
        made.config.logger
        == job(
            "logger=[wandb,tensorboard]",
            *("logger.project=mine", "logger.wandb.tags=[a,b]", "logger.entity=team", "logger.tensorboard.name=x"),
        ).config.logger
    )
    assert made.notes == ()


@pytest.mark.parametrize(
    ("logger", "key", "value"),
    [
        ("wandb", "settings", {"base_url": "http://stranger.example"}),
        ("wandb", "save_dir", "/anywhere"),
        ("wandb", "save_code", True),
        ("tensorboard", "version", "../../.."),
        ("tensorboard", "name", "wandb"),
        ("tensorboard", "sub_dir", "$HOME"),
        ("tensorboard", "save_dir", "/anywhere"),
    ],
)
def test_hosts_and_paths_of_a_logger_are_named_again(logger, key, value, run, job, clean_room):
    folder = clean_room / run(f"logger={logger}")
    saved = yaml.safe_load((folder / "config.yaml").read_text())["logger"]
    saved[logger][key] = value
    changed(folder, logger=saved)
    with pytest.raises(ConfigError, match=f"`logger.{logger}.{key}` must be named again"):
        job(f"resume={folder}")
    given = job(f"resume={folder}", f"logger.{logger}.{key}=null").config.logger
    assert given[logger][key] is None


def test_a_mapping_adds_to_the_runs_as_it_does_to_a_new_runs(run, job, clean_room):
    folder = run("save.keep_last=9", "save.every_n_steps=3")
    made = job(f"resume={folder}", "save={every_n_steps: 7}").config
    assert (made.save.every_n_steps, made.save.keep_last) == (7, 9)


def test_the_cache_is_not_where_the_file_says(run, job, clean_room):
    folder = run("data.cache_dir=/anywhere")
    made = job(f"resume={folder}")
    assert made.config.data.cache_dir is None
    assert "data.cache_dir is not taken" in made.notes[0]
    assert job(f"resume={folder}", "data.cache_dir=here").config.data.cache_dir == "here"


def test_nor_is_the_cache_of_a_named_set_or_a_source_whatever_its_name(run, job, clean_room):
    named = {"my.set": {"type": "text", "path": "a.txt", "cache_dir": "/anywhere"}}
    made = job(f"resume={changed(clean_room / run(), eval_tasks=named)}")
    assert made.config.eval_tasks["my.set"].cache_dir is None
    assert "eval_tasks.my.set.cache_dir is not taken" in made.notes[0]
    mixture = clean_room / run("data=mixture", "data.sources.a={type: text, path: a.txt}", folder="mixture")
    saved = yaml.safe_load((mixture / "config.yaml").read_text())["data"]
    saved["sources"]["a"]["cache_dir"] = "/anywhere"
    made = job(f"resume={changed(mixture, data=saved)}")
    assert made.config.data.sources["a"].cache_dir is None
    assert "data.sources.a.cache_dir is not taken" in made.notes[0]


def test_nothing_in_a_runs_configuration_is_interpolated(run, job, clean_room, monkeypatch):
    monkeypatch.setenv("CANARY", "sings")
    folder = changed(
        clean_room / run(), name="${oc.env:CANARY}", sample={"prompts": ["${oc.env:CANARY}", "${seed}"], "n": 1}
    )
    config = job(f"resume={folder}", "trainer=default").config
    assert (config.name, config.sample.prompts) == ("${oc.env:CANARY}", ("${oc.env:CANARY}", "${seed}"))
