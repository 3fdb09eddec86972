"""`logger.KEY=`: to whichever logger has the key; the words are those of the classes that are installed."""

import dataclasses as dc
import inspect

import pytest

from txtrain import compose
from txtrain.config.loggers import TensorBoard, Wandb
from txtrain.errors import ConfigError


def loggers(*overrides):
    return compose(["data=python_docs", *overrides]).logger


def test_the_words_of_wandblogger_are_taken_under_logger():
    made = loggers("logger=wandb", "logger.project=mine", "logger.entity=us", "logger.group=a", "logger.tags=[b,c]", "logger.log_model=all")
    assert {key: made["wandb"][key] for key in ("project", "entity", "group", "tags", "log_model")} == {
        "project": "mine",
        "entity": "us",
        "group": "a",
        "tags": ["b", "c"],
        "log_model": "all",
    }
    assert set(made) == {"wandb"}
    assert loggers("logger=wandb", "logger.wandb.project=mine")["wandb"]["project"] == "mine"


def test_of_several_loggers_each_takes_the_words_that_it_has():
    made = loggers("logger=[wandb,tensorboard]", "logger.project=mine", "logger.x_axis=tokens")
    assert made["wandb"]["project"] == "mine"
    assert "project" not in made["tensorboard"]
    assert made["wandb"]["x_axis"] == made["tensorboard"]["x_axis"] == "tokens"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("logger=wandb logger.projekt=x", "`logger.projekt=x`: wandb has no key projekt. Did you mean logger.project?"),
        ("logger=[wandb,tensorboard] logger.entitty=x", "wandb and tensorboard have no key entitty. Did you mean logger.entity?"),
        ("logger=tensorboard logger.project=x", "tensorboard has no key project. It has: name, version"),
        ("logger.project=x", "the run has no logger to give it to. Write logger=wandb"),
        ("logger.wandb.project=x", "`logger.wandb.project`: the run has no logger wandb. Write logger=wandb."),
        ("logger=tensorboard logger.wandb.project=x", "Write logger=[tensorboard,wandb]."),
        ("logger=wandb logger.wandb.projekt=x", "`logger.wandb.projekt=x`: logger.wandb has no key projekt. Did you mean logger.wandb.project?"),
        ("logger=wandb logger.tags=a", "`logger.wandb.tags` must be a list, but is 'a' instead."),
        ("logger=wandb logger.log_model=sometimes", "`logger.wandb.log_model` must be true or false or all, but is 'sometimes' instead."),
        ("logger=wandb logger.x_axis=epochs", "`logger.wandb.x_axis` must be one of step, tokens, but is 'epochs' instead."),
        ("logger=wandb logger.mode=ofline", "Did you mean offline?"),
    ],
)
def test_a_word_that_no_logger_has_is_refused_with_the_nearest(given, said):
    with pytest.raises(ConfigError) as e:
        loggers(*given.split())
    assert said in str(e.value)


def test_every_word_is_one_of_the_classes_that_are_installed():
    import wandb
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from torch.utils.tensorboard import SummaryWriter

    ours = {"x_axis"}
    theirs = {*inspect.signature(WandbLogger).parameters, *inspect.signature(wandb.init).parameters}
    assert {f.name for f in dc.fields(Wandb)} - ours <= theirs
    theirs = {*inspect.signature(TensorBoardLogger).parameters, *inspect.signature(SummaryWriter).parameters}
    assert {f.name for f in dc.fields(TensorBoard)} - ours <= theirs
