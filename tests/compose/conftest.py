import os
import subprocess
import sys
from pathlib import Path

import pytest

from txtrain.cli.jobs import compose_job
from txtrain.config.composed import Composed
from txtrain.config.loader import Loader, make_loader
from txtrain.config.overrides import expand

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_room(tmp_path, monkeypatch):
    """An empty working directory, and nothing in the environment that a run would heed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TXTRAIN_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("LOCAL_RANK", "TXTRAIN_CONFIG", "TXTRAIN_DEBUG"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture(scope="session")
def loader() -> Loader:
    return make_loader()


@pytest.fixture
def job(loader):
    """job("model=gpt2", ...) -> Composed, as the command line would."""

    def compose(*overrides: str, verb: str = "train", config_dir: object = None) -> Composed:
        used = make_loader(str(config_dir)) if config_dir else loader
        return compose_job(verb, expand(overrides, False, used)[0], used)[0]

    return compose


@pytest.fixture
def cli():
    """cli("-m", ...) runs `python -m txtrain` in a process of its own."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "txtrain", *args]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, timeout=120)

    return run


@pytest.fixture
def forget(loader):
    """Take back what a test registers and imports. loader: what Hydra itself registers at its first use must stay."""
    from hydra.core.config_store import ConfigStore

    from txtrain.registry import TABLE

    table = {axis: dict(options) for axis, options in TABLE.items()}
    modules, store = set(sys.modules), ConfigStore.instance()
    repo = {k: dict(v) if isinstance(v, dict) else v for k, v in store.repo.items()}
    nested = {k: dict(v) for k, v in repo.get("model", {}).items() if isinstance(v, dict)}
    yield
    TABLE.clear()
    TABLE.update(table)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and "txtrain" not in name and "/tmp" in str(sys.modules[name].__file__):
            del sys.modules[name]
    store.repo.clear()
    store.repo.update(repo)
    store.repo.get("model", {}).update(nested)
