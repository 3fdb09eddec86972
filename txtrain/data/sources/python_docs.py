"""data=python_docs: English text of the Python installation: pydoc's help topics and the library's docstrings."""

from __future__ import annotations

import ast
import functools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from txtrain.data.sources.files import files_identity
from txtrain.data.sources.source import Split

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonDocs:
    """One document per help topic and one per module; modules are parsed, never imported."""

    def documents(self, split: Split) -> Iterator[str]:
        return iter(_documents())

    def identity(self) -> str:
        import pydoc_data.topics

        return files_identity([Path(pydoc_data.topics.__file__), *_modules()])

    def describe(self) -> str:
        return "help topics and docstrings of the standard library"


@functools.cache
def _documents() -> tuple[str, ...]:
    """A few megabytes, cached because parsing is slow."""
    from pydoc_data.topics import topics

    return (*(topics[name] for name in sorted(topics)), *filter(None, map(_docstrings, _modules())))


def _modules() -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = {*folders} - _LEFT_OUT  # not walked through: what is installed there may be large
        found += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found)


def _docstrings(path: Path) -> str:
    """All docstrings of a module, each under its name, in the order of the file."""
    try:
        module = ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 and others have files for other versions of Python
        return ""
    return "\n\n".join(f"{name}\n\n{doc}" for name, doc in _walk(module, path.stem) if doc)


def _walk(node: _Documented, name: str) -> Iterator[tuple[str, str | None]]:
    yield name, ast.get_docstring(node)
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"def {child.name}({ast.unparse(child.args)})")
        elif isinstance(child, ast.ClassDef):
            yield from _walk(child, f"class {child.name}")
