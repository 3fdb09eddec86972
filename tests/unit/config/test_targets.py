"""Which classes a configuration may have made, and that nothing else it names is ever called."""

import builtins
import importlib
import pkgutil
import sys
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txtrain.config import targets
from txtrain.errors import ConfigError


@cache
def callables() -> list[str]:
    """Dotted names of what can be called in txtrain, Lightning, torch and the standard library, also through what imports it."""
    modules = "txtrain lightning.pytorch torch os subprocess builtins shutil pathlib runpy pickle importlib".split()
    found = []
    for name in modules:
        module = importlib.import_module(name)
        inner = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}.")]
        found += [
            f"{m}.{a}"
            for m in [name, *inner]
            if m in sys.modules
            for a, v in vars(sys.modules[m]).items()
            if callable(v)
        ]
    found += [
        f"lightning.pytorch.{m}.{n}"
        for m in ("callbacks", "loggers")
        for n in vars(importlib.import_module(f"lightning.pytorch.{m}"))
    ]
    return sorted(
        {
            *found,
            *dir(builtins),
            "txtrain.parallel.launch.Group",
            "lightning.pytorch.loggers.logger.os.system",
            "hydra.utils.instantiate",
        }
        - targets._EVERY
    )


def values(canary):
    call = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    leaves = st.sampled_from(
        [
            call,
            str(canary),
            ["sh", "-c", f"touch {canary}"],
            {"x": 1},
            None,
            f"${{oc.create:{canary}}}",
            "${oc.env:HOME}",
        ]
    )
    target = st.builds(
        lambda name, more: {"_target_": name, **more},
        st.deferred(lambda: st.sampled_from(callables())),
        st.dictionaries(
            st.sampled_from(
                ["command", "args", "_args_", "_partial_", "f", "path", "cmd", "fn", "on_train_start", "dirpath"]
            ),
            leaves,
            max_size=3,
        ),
    )
    return st.recursive(
        target,
        lambda inner: st.one_of(
            st.builds(
                lambda x: {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "loss", "strict": x},
                inner,
            ),
            st.builds(lambda x: {"_target_": targets.WANDB, "settings": [x]}, inner),
            st.builds(lambda x: {"_target_": "lightning.pytorch.callbacks.Timer", "duration": {"deep": [x, 1]}}, inner),
        ),
        max_leaves=3,
    )


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    return tmp_path_factory.mktemp("canary") / "sings"


def test_nothing_outside_the_list_is_called(canary):
    @settings(max_examples=300, deadline=None)
    @given(st.sampled_from(["logger", "callbacks"]), values(canary))
    def refused(group, node):
        assert list(targets.problems({group: {"a": node}}))
        with pytest.raises(ConfigError):
            targets.instances({"a": node}, group)
        assert not canary.exists()

    refused()


def test_every_callable_is_refused_by_name():
    allowed = [name for name in callables() if not list(targets.problems({"callbacks": {"a": {"_target_": name}}}))]
    assert allowed == []
    assert len(callables()) > 2000


@pytest.mark.parametrize("group", targets.ALLOWED)
def test_every_class_of_the_list_exists(group):
    for name in targets.ALLOWED[group]:
        assert issubclass(targets.class_of(group, name), targets._base(group))


def test_arguments_are_what_they_say(tmp_path):
    text = "${oc.env:HOME}"
    (made,) = targets.instances(
        {"a": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": text, "patience": 7}}, "callbacks"
    )
    assert (made.monitor, made.patience) == (text, 7)


def test_a_module_of_the_users_gives_only_what_it_defines(tmp_path, monkeypatch):
    (tmp_path / "own_things.py").write_text(
        "from subprocess import Popen\nimport lightning.pytorch as pl\nclass Mine(pl.Callback):\n    pass\nclass Other: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("own_things")
    assert (
        type(targets.instances({"a": {"_target_": "own_things.Mine"}}, "callbacks", ["own_things"])[0]).__name__
        == "Mine"
    )
    for name, says in (
        ("Popen", "that own_things defines"),
        ("Other", "must be a Callback of Lightning"),
        ("Absent", "that own_things defines"),
    ):
        with pytest.raises(ConfigError, match=says):
            targets.instances(
                {"a": {"_target_": f"own_things.{name}", "args": ["touch", str(tmp_path / "ran")]}},
                "callbacks",
                ["own_things"],
            )
    assert not (tmp_path / "ran").exists()
    del sys.modules["own_things"]


@pytest.mark.parametrize(
    ("raw", "is_secret"),
    [
        ({"logger": {"wandb": {"settings": {"api_key": "x"}}}}, True),
        ({"logger": {"a": {"mlflow_tracking_token": "x"}}}, True),
        ({"logger": {"a": {"notes": "0123456789" * 4}}}, True),
        ({"data": {"path": "/models/snapshots/" + "0123456789" * 4}}, False),
        ({"data": {"name": "hf_" + "a1" * 17}}, True),
        ({"data": {"path": "https://me:word@host/x"}}, True),
        ({"data": {"path": "s3://bucket/a:b/c"}}, False),
        ({"logger": {"wandb": {"x_axis": "tokens"}}}, False),
        ({"data": {"max_tokens": "12"}}, False),
    ],
)
def test_secrets_are_refused_and_nothing_else(raw, is_secret):
    assert bool(list(targets.problems(raw))) == is_secret
    assert not any(secret in text for text in targets.problems(raw) for secret in ("0123456789", "a1a1", "word"))
