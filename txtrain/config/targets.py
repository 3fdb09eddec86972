"""Lightning objects of a configuration: which classes `_target_` may name, and how they are built. No torch.

Configurations may be strangers' files: only here is a class looked up by a name in a configuration. Values are not
interpolated.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from txtrain.config.user_code import module_name
from txtrain.errors import ConfigError, nearest

WANDB = "txtrain.loggers.wandb.WandbLogger"
_LOGGERS = "CometLogger CSVLogger MLFlowLogger TensorBoardLogger WandbLogger"
_CALLBACKS = (  # those that neither take a function nor change the training step
    "DeviceStatsMonitor EarlyStopping LearningRateMonitor ModelCheckpoint ModelSummary OnExceptionCheckpoint "
    "RichModelSummary Timer"
)
ALLOWED: dict[str, tuple[str, ...]] = {
    "logger": (WANDB, *(f"lightning.pytorch.loggers.{name}" for name in _LOGGERS.split())),
    "callbacks": tuple(f"lightning.pytorch.callbacks.{name}" for name in _CALLBACKS.split()),
}
_EVERY = {target for targets in ALLOWED.values() for target in targets}

# Secrets belong in the environment or ~/.netrc, which are never saved.
_SECRET_KEY = re.compile(
    r"(?i)(^|_)(api_?key|apikey|token|access_?key|secret|password|passwd|credentials?|private_?key)(_|$)"
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|wandb_v\d+_\w{20,})\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]*:[^/\s@]+@"
)
_WANDB_KEY = re.compile(r"(local-)?[0-9a-f]{40}")  # looks like a git commit: only below logger and callbacks


def problems(raw: Mapping[str, Any], imports: Collection[str] = ()) -> Iterator[str]:
    """Problems of the `_target_`s of an interpolated configuration, and values that look like secrets.

    imports: the user's files and modules, whose classes `_target_` may name.
    """
    modules = {module_name(what) for what in imports}
    for path, key, value in _walk(raw, ""):
        part = path.partition(".")[0]
        if key == "_target_" and part not in ALLOWED:
            yield (
                f"`{path}={value}`: _target_ may stand only under logger and callbacks. Own components are registered: "
                "@txtrain.component."
            )
        elif key == "_target_":
            yield from _target_problems(path, value, modules)
        elif part in ALLOWED and re.fullmatch(r"_\w+_", key):
            yield f"`{path}` must not be given: of Hydra's keys for objects only _target_ is known."
        elif (secret := _secret(key, value, part in ALLOWED)) is not None:
            yield secret.format(path=path)


def _walk(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Dotted path, last key and value of every entry, at any depth."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        yield inner, str(key), value
        yield from _walk(value, inner)


def _target_problems(path: str, target: Any, modules: Collection[str]) -> Iterator[str]:
    if is_allowed(target, modules):
        return
    listed = ALLOWED[path.partition(".")[0]]
    short = {name.rpartition(".")[2]: name for name in listed}
    near = short.get(str(target)) or short.get(nearest(str(target).rpartition(".")[2], short) or "")
    yield (
        f"`{path}` must be a class in a module given by imports=[...], or one of {', '.join(listed)}, "
        f"but is {target!r} instead."
        + (f" Did you mean {near}?" if near else "")
    )


def is_allowed(target: Any, modules: Collection[str]) -> bool:
    """Whether the target is listed, or has the form of a class of a user's module. A longer path could reach what that
    module imports (`mine.os.system`)."""
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    return target in _EVERY if module not in modules else re.fullmatch(r"[A-Z]\w*", name) is not None


def _secret(key: str, value: Any, is_logger: bool) -> str | None:
    if not isinstance(value, str):
        return None
    named = is_logger and _SECRET_KEY.search(key)
    if named or _SECRET_VALUE.search(value) or (is_logger and _WANDB_KEY.fullmatch(value)):
        return (
            "`{path}` must not be in a configuration, which is saved with the run: it looks like a secret. "
            "Give it by the environment (WANDB_API_KEY, HF_TOKEN, ...) or by ~/.netrc (`wandb login`)."
        )
    return None


# ------------------------------------------------------------------------------------------------------------ building


def instances(nodes: Mapping[str, Any], group: str, imports: Collection[str] = ()) -> list[Any]:
    """The Lightning loggers or callbacks of a group.

    Raises:
        ConfigError: a class is not allowed or does not exist, or its arguments are wrong.
    """
    if found := list(problems({group: nodes}, imports)):
        raise ConfigError(*found)
    return [_made(f"{group}.{name}", node, _base(group), imports) for name, node in nodes.items()]


def _base(group: str) -> type:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    return Logger if group == "logger" else Callback


def class_of(path: str, target: str, imports: Collection[str] = ()) -> type:
    """The class of an allowed target.

    Raises:
        ConfigError: the module defines no class of that name.
    """
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    own = target in _EVERY or getattr(found, "__module__", None) in {module_name(what) for what in imports}
    if not isinstance(found, type) or not own:
        raise ConfigError(f"`{path}._target_` must be a class that {module} defines, but is {target!r} instead.")
    return found


def _made(path: str, node: Any, base: type, imports: Collection[str]) -> Any:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"`{path}` must be a mapping with _target_, but is {node!r} instead.")
    cls = class_of(path, node["_target_"], imports)
    if not issubclass(cls, base):
        raise ConfigError(f"`{path}._target_` must be a {base.__name__} of Lightning, but {node['_target_']} is none.")
    given = {key: _argument(f"{path}.{key}", value, imports) for key, value in node.items() if key != "_target_"}
    try:
        return cls(**given)
    except Exception as e:  # a constructor may raise anything
        raise ConfigError(
            f"`{path}` ({node['_target_']}) cannot be made: {type(e).__name__}: {e}".splitlines()[0]
        ) from e


def _argument(path: str, value: Any, imports: Collection[str]) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        return _made(path, value, object, imports)
    if isinstance(value, Mapping):
        return {key: _argument(f"{path}.{key}", inner, imports) for key, inner in value.items()}
    return (
        [_argument(f"{path}.{i}", inner, imports) for i, inner in enumerate(value)]
        if isinstance(value, (list, tuple)) else value
    )
