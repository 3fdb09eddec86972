"""The Hugging Face hub, at a bounded price: its cache first, then one short look whether it answers at all.

The libraries themselves retry an unreachable hub for 24 s, for each thing that they ask it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}

_PATIENCE = 8.0  # seconds; name resolution has no time-out of its own, hence the thread


class HubUnreachable(Exception):
    """Not in the cache, and the hub does not answer; the message says why."""


@functools.cache
def why_unreachable() -> str | None:
    """Why the hub cannot be asked, or None. Asked once a process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "txtrain"})
            urllib.request.urlopen(request, timeout=_PATIENCE).close()
            answer.append(None)
        except urllib.error.HTTPError as e:  # something answers; a proxy's refusal is not the hub
            answer.append(f"{constants.ENDPOINT} answers {e.code}" if e.code in (403, 407) or e.code >= 500 else None)
        except (OSError, ValueError) as e:
            answer.append(f"{constants.ENDPOINT} cannot be reached ({getattr(e, 'reason', e)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answer[0] if answer else f"{constants.ENDPOINT} does not answer within {_PATIENCE:.0f} s"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, the libraries look into their caches only. Both keep the setting as a constant that they read at each use."""
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
    """`datasets.load_dataset`: a local file or folder at once, a hub name from the cache, else from the hub; streamed, always from there.

    Raises:
        HubUnreachable: neither the cache nor the hub has an answer.
    """
    import datasets

    with _quietly():
        if loader := _LOADERS.get(os.path.splitext(path)[1]) if os.path.isfile(path) else None:
            return datasets.load_dataset(loader, data_files=path, split=split, streaming=streaming)
        if os.path.exists(path):
            return datasets.load_dataset(path, name, split=split, streaming=streaming)
        if streaming:
            if reason := why_unreachable():
                raise HubUnreachable(f"it is streamed, and {reason}")
            return datasets.load_dataset(path, name, split=split, streaming=True)
        try:
            with offline():
                return datasets.load_dataset(path, name, split=split)
        except (FileNotFoundError, ConnectionError, ValueError) as e:  # ValueError: cached, but not with this name or split
            miss = f" ({str(e).splitlines()[0]})" if isinstance(e, ValueError) else ""
        if reason := why_unreachable():
            raise HubUnreachable(f"it is not in the cache{miss}, and {reason}")
        try:
            return datasets.load_dataset(path, name, split=split)
        except ConnectionError as e:
            raise HubUnreachable(f"it is not in the cache{miss}, and {e}") from e


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's note that it reads its cache; its progress bars stay."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
