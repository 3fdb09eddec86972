"""The user's own code: `imports=[file.py, package.module]`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from txtrain.errors import ConfigError

HERE = Path(__file__).resolve().parents[1]


def import_user(what: str, root: Path) -> str:
    """Import a file (from the working directory, else from `root`) or a module; its components register themselves.

    Returns:
        The file's absolute path, or the module's name.

    Raises:
        ConfigError: it does not exist, its name is taken, or it raises (with file and line).
    """
    for folder in (Path.cwd(), root):  # appended: nothing there may shadow an installed module
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    if not what.endswith(".py"):
        _guarded(what, lambda: importlib.import_module(what))
        return what
    file = next((f.resolve() for f in (Path(what), root / what) if f.is_file()), None)
    if file is None:
        looked = " and ".join(dict.fromkeys(map(str, (Path.cwd(), root))))
        raise ConfigError(
            f"`imports` must be files or modules that exist, but {what!r} is not one (looked in {looked})."
        )
    _import_file(file)
    return str(file)


def module_name(what: str) -> str:
    """The module's name for an entry of imports: `mine` for path/mine.py, as in `_target_: mine.MyLogger`."""
    return Path(what).stem if what.endswith(".py") else what


def _import_file(file: Path) -> None:
    name = file.stem
    if not name.isidentifier():
        raise ConfigError(f"`imports`: {file.name} must be named like a Python module (letters, digits, _).")
    present = sys.modules.get(name)
    if present is not None and getattr(present, "__file__", None) == str(file):
        return
    found = importlib.util.find_spec(name) if present is None else present.__spec__
    if present is not None or (found is not None and found.origin != str(file)):
        other = getattr(found, "origin", None) or "built in"
        raise ConfigError(
            f"`imports`: {file} must have a name of its own, but a module {name} exists already ({other}). Rename the "
            "file."
        )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # for modules beside it, as if it were run
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def execute() -> ModuleType:
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    _guarded(str(file), execute)


def _guarded(what: str, load: Any) -> None:
    """Turn an exception into a ConfigError of one line, with file and line of the user's code."""
    try:
        load()
    except ModuleNotFoundError as e:
        if e.name is None or not (what == e.name or what.startswith(f"{e.name}.")):
            raise ConfigError(_where(what, e)) from e
        raise ConfigError(
            f"`imports` must be files or modules that exist, but {what!r} is not one: there is no module {e.name}."
        ) from e
    except Exception as e:
        raise ConfigError(_where(what, e)) from e


def _where(what: str, e: Exception) -> str:
    said = " ".join(line for line in str(e).splitlines() if line)
    if isinstance(e, SyntaxError):
        return f"`imports`: {e.filename}, line {e.lineno}: {type(e).__name__}: {e.msg}"
    frames = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(("<frozen", str(HERE)))]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else what
    return f"`imports`: {place}: {said if isinstance(e, ConfigError) else f'{type(e).__name__}: {said}'}"
