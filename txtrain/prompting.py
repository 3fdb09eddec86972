"""`txtrain generate`: prompts in, continuations out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.config import Generate
from txtrain.data.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.generation import generate
from txtrain.loading import load

BATCH = 16  # prompts at a time


def run_generate(config: Generate) -> int:
    """Print each prompt with its continuation. One prompt is printed as it grows.

    Raises:
        ConfigError: no such checkpoint or file of prompts, nothing to continue, or more tokens than the model has positions.
    """
    prompts = read_prompts(config)
    device = pick_device(config.accelerator)
    assert config.checkpoint is not None
    loaded = load(config.checkpoint, device, weights=config.weights)
    if loaded.tokenizer is None:
        raise ConfigError(f"`checkpoint` must have a tokenizer to continue text, but {str(loaded.path)!r} has none: it was not trained on text.")
    rows = [encode(loaded.tokenizer, prompt) for prompt in prompts]
    _check_length(loaded.model, rows, config.max_new_tokens)
    if len(prompts) == 1 and config.stream:
        _stream(loaded.model, loaded.tokenizer, prompts[0], rows[0], config)
        return 0
    for start in range(0, len(prompts), BATCH):
        texts = _continuations(loaded.model, loaded.tokenizer, rows[start : start + BATCH], config)
        for prompt, text in zip(prompts[start : start + BATCH], texts, strict=True):
            print(prompt + text, flush=True)
    return 0


def read_prompts(config: Generate) -> list[str]:
    """`prompt` as it was typed; `-` is all of standard input; prompt_file has one a line.

    Raises:
        ConfigError: the file cannot be read, or holds no prompt.
    """
    if config.prompt is not None:
        return [sys.stdin.read() if config.prompt == "-" else config.prompt]
    assert config.prompt_file is not None
    try:
        lines = Path(config.prompt_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"`prompt_file` must be a text file with one prompt a line, but {config.prompt_file!r} cannot be read: {reason}.") from e
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"`prompt_file` must hold at least one prompt, but {config.prompt_file!r} holds none.")
    return prompts


def pick_device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("`accelerator` must be cpu or auto here, but is gpu instead: torch sees no CUDA device.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """As a document begins in training: an empty prompt is the beginning of any."""
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return [begin, *tokenizer.encode(prompt)]


def _check_length(model: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    longest, limit = max(map(len, rows)), model.max_positions
    if limit is not None and longest + max_new_tokens > limit:
        room = limit - longest
        problem = f"must be at most {room}" if room > 0 else "has no room"
        raise ConfigError(f"`max_new_tokens` {problem} after a prompt of {longest} tokens, but is {max_new_tokens} instead: {limit} positions were learned.")


def _continuations(model: Any, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], config: Generate) -> list[str]:
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_id] * (width - len(row)) + list(row) for row in rows], device=_device(model))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=_device(model))
    out = generate(model, ids, mask, **_how(config, tokenizer))
    return [tokenizer.decode(_before_end(row, tokenizer.eos_id)) for row in out[:, width:].tolist()]


def _stream(model: Any, tokenizer: Tokenizer, prompt: str, row: Sequence[int], config: Generate) -> None:
    print(prompt, end="", flush=True)
    generate(model, torch.tensor([row], device=_device(model)), on_token=_printer(tokenizer), **_how(config, tokenizer))
    print(flush=True)


def _printer(tokenizer: Tokenizer) -> Callable[[Tensor], None]:
    """Prints what each token adds to the text. A character of several tokens waits until it is whole."""
    ids: list[int] = []
    printed = ""

    def on_token(new_B: Tensor) -> None:
        nonlocal printed
        ids.append(int(new_B[0]))
        text = tokenizer.decode(_before_end(ids, tokenizer.eos_id))
        if text.endswith("\ufffd"):
            return
        print(text[len(printed) :], end="", flush=True)
        printed = text

    return on_token


def _how(config: Generate, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "eos_token_id": tokenizer.eos_id,
        "seed": config.seed,
    }


def _before_end(ids: Sequence[int], eos_id: int) -> list[int]:
    return list(ids[: ids.index(eos_id)] if eos_id in ids else ids)


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
