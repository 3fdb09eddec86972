"""The Hugging Face hub: its cache first, then one short request whether it answers at all.

The libraries themselves retry each request to an unreachable hub for 24 s.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from txtrain.errors import ConfigError, shorten
from txtrain.ground.plain_files import read_text

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}

_PATIENCE = 8.0  # seconds; name resolution has no time-out, hence the thread


class HubUnreachable(Exception):
    """Not in the cache, and the hub does not answer; the message says why."""


@functools.cache
def why_unreachable() -> str | None:
    """Why the hub is unreachable; None if it is not. Checked once per process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "txtrain"})
            urllib.request.urlopen(request, timeout=_PATIENCE).close()
            answer.append(None)
        except urllib.error.HTTPError as e:  # the hub answers, or a proxy refuses
            answer.append(f"{constants.ENDPOINT} answers {e.code}" if e.code in (403, 407) or e.code >= 500 else None)
        except (OSError, ValueError) as e:
            answer.append(f"{constants.ENDPOINT} cannot be reached ({getattr(e, 'reason', e)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answer[0] if answer else f"{constants.ENDPOINT} does not answer within {_PATIENCE:.0f} s"


def client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises if the hub refuses, or is lost on the way. Its versions differ in the library that
    asks: errors of a connection are OSErrors in requests, and not in httpx."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return OSError, HFValidationError, *HfHubHTTPError.__bases__


def said_by(e: Exception) -> str:
    """An error of the hub's client in a line: `Cannot find ... on the local disk` has a cause."""
    return next(iter(str(e.__cause__ or e).strip().splitlines()), type(e).__name__)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Restrict the libraries to their caches. Both read a module constant at each use."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache
def load_dataset(path: str, name: str | None, split: str | None = None, streaming: bool = False) -> Any:
    """`datasets.load_dataset` of a local file or folder, or of a hub name: from the cache, else (and streamed) the hub.

    Raises:
        HubUnreachable: it is not in the cache, and the hub does not answer.
        ValueError: it is the name of a loader, or the folder's card names files elsewhere. The library raises others.
    """
    import datasets

    if path in _by_name():
        raise ValueError(f"{path} is the name of a loader. Name a file, or a folder as ./{path}: its format is known")
    with _quietly():
        if loader := _LOADERS.get(os.path.splitext(path)[1]) if os.path.isfile(path) else None:
            return datasets.load_dataset(loader, data_files=path, split=split, streaming=streaming)
        if os.path.exists(path):
            _check_card(Path(path))
            return datasets.load_dataset(path, name, split=split, streaming=streaming)
        if streaming:
            if reason := why_unreachable():
                raise HubUnreachable(f"it is streamed, and {reason}")
            return datasets.load_dataset(path, name, split=split, streaming=True)
        try:
            with offline():
                return datasets.load_dataset(path, name, split=split)
        except (FileNotFoundError, ConnectionError, ValueError) as e:  # ValueError: cached without this name or split
            miss = f" ({str(e).splitlines()[0]})" if isinstance(e, ValueError) else ""
        if reason := why_unreachable():
            raise HubUnreachable(f"it is not in the cache{miss}, and {reason}")
        try:
            return datasets.load_dataset(path, name, split=split)
        except ConnectionError as e:
            raise HubUnreachable(f"it is not in the cache{miss}, and {e}") from e


def _by_name() -> Collection[str]:
    """Loaders that the library takes by name before any folder: they read the current folder, one of them pickles."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return frozenset(_PACKAGED_DATASETS_MODULES)


def _check_card(folder: Path) -> None:
    """Refuse a local set whose card (README.md) names files outside of its folder: the library would fetch them."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        text = read_text(card) if card.is_file() else ""
        if card.suffix == ".md":
            front = REGEX_YAML_BLOCK.search(text)
            text = front[2] if front else ""
        try:
            named = [*_files_in(yaml.compose(text))]
        except yaml.YAMLError as e:
            raise ValueError(f"{card} holds YAML that is none: {shorten(e)}") from e
        for file in named:
            if re.search(r"://|::", file) or file[:1] in ("/", "~") or ".." in Path(file).parts:
                raise ValueError(f"{card} names {shorten(file)}, which is not in its folder")


def _files_in(node: yaml.Node | None) -> Iterator[str]:
    """The texts under `data_files` and `data_dir` of a YAML file; each node once, however many aliases it has."""
    waiting, seen = [(node, False)], set()
    while waiting:
        node, is_named = waiting.pop()
        if (id(node), is_named) in seen:
            continue
        seen.add((id(node), is_named))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                waiting.append((value, is_named or key.value in ("data_files", "data_dir")))
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(value, is_named) for value in node.value]
        elif isinstance(node, yaml.ScalarNode) and is_named:
            yield node.value


@contextlib.contextmanager
def set_errors(key: str, path: str, split: str, allowed: str, remedy: str = "") -> Iterator[None]:
    """Tell what `load_dataset` raises as an error of a key. remedy: for an unreachable hub.

    Raises:
        ConfigError: the set is unavailable, or cannot be read.
    """
    try:
        yield
    except HubUnreachable as e:
        said = f"is no local file, and as a hub set it is unavailable: {e}.{remedy and f' {remedy}'}"
        raise ConfigError(f"`{key}`: {path} {said}") from e
    except (ConfigError, MemoryError):
        raise
    except Exception as e:  # of the library's parsers of many formats, and of its cache
        said = next(iter(str(e.__cause__ or e).splitlines()), type(e).__name__)
        raise ConfigError(f"`{key}` must be {allowed}, but {path} ({split}) is not: {said}") from e


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the library's note that it reads its cache, but not its progress bars."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
