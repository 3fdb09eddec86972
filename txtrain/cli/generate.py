"""`txtrain generate`: prompts in, continuations out; from an encoder-decoder, answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.checkpoint.load import Loaded, load
from txtrain.config.composed import Composed
from txtrain.config.schema import Generate
from txtrain.data.sources.files import missing
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.model.generation import generate
from txtrain.objectives.continuations import encode

BATCH = 16  # prompts at a time
SEPARATOR = "|"  # between a prompt and its answer, as in samples.txt


def run_generate(job: Composed) -> int:
    """Print each prompt with its continuation. A single prompt is streamed.

    Raises:
        ConfigError: no such checkpoint or file of prompts, no prompt, a model that cannot generate text, or more
            tokens than the model has positions.
    """
    config: Generate = job.config
    prompts = read_prompts(config)
    device = pick_device(config.accelerator)
    assert config.checkpoint is not None
    loaded = load(config.checkpoint, device, weights=config.weights, finite=True)
    _check_writes(loaded)
    assert loaded.tokenizer is not None
    answers = _answers(loaded.model)
    rows = [encode(loaded.tokenizer, prompt, answers) for prompt in prompts]
    _check_length(loaded.model, rows, config.max_new_tokens)
    if len(prompts) == 1 and config.stream:
        _stream(loaded.model, loaded.tokenizer, prompts[0], rows[0], config)
        return 0
    for start in range(0, len(prompts), BATCH):
        texts = _continuations(loaded.model, loaded.tokenizer, rows[start : start + BATCH], config)
        for prompt, text in zip(prompts[start : start + BATCH], texts, strict=True):
            print(prompt + (SEPARATOR if answers else "") + text, flush=True)
    return 0


def _check_writes(loaded: Loaded) -> None:
    where = str(loaded.path)
    if loaded.model.config.topology == "encoder":
        raise ConfigError(
            f"`checkpoint` must be of a model that writes, a decoder or an encoder with one, but {where!r} is an "
            f"encoder ({loaded.model.config.family}), which reads a whole text and continues none."
        )
    if loaded.tokenizer is None:
        raise ConfigError(f"`checkpoint` must have a tokenizer, but {where!r} has none: it was not trained on text.")


def _answers(model: Any) -> bool:
    """Whether the output answers the prompt, which an encoder reads, instead of continuing it."""
    return model.encoder is not None


def read_prompts(config: Generate) -> list[str]:
    """`prompt` as typed, or all of standard input for `-`; or the lines of prompt_file.

    Raises:
        ConfigError: the file cannot be read, or holds no prompt, or something is not UTF-8.
    """
    if config.prompt is not None:
        return [_standard_input() if config.prompt == "-" else config.prompt]
    assert config.prompt_file is not None
    path = Path(config.prompt_file).expanduser()
    if path.exists() and not path.is_file():
        raise ConfigError(missing(config.prompt_file, "prompt_file", "a text file with one prompt a line"))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"`prompt_file` must be a text file with one prompt a line, but {config.prompt_file!r} cannot be read: "
            f"{reason}."
        ) from e
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"`prompt_file` must hold at least one prompt, but {config.prompt_file!r} holds none.")
    return prompts


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # in an ASCII locale other bytes are read as lone surrogates
    except UnicodeError as e:
        raise ConfigError(f"`prompt` must be text in UTF-8, but standard input is not: {e}.") from e
    return text


def pick_device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("`accelerator` must be cpu or auto here, but is gpu instead: torch sees no CUDA device.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _check_length(model: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    longest, limit = max(map(len, rows)), model.max_positions
    if _answers(model):
        if limit is not None and longest > limit:
            raise ConfigError(
                f"`prompt` must have at most {limit} tokens, its end among them, but has {longest}: {limit} positions "
                "were learned."
            )
        longest = 1  # the decoder's own positions begin with its start token
    if limit is not None and longest + max_new_tokens > limit:
        room = limit - longest
        problem = f"must be at most {room}" if room > 0 else "has no room"
        raise ConfigError(
            f"`max_new_tokens` {problem} after a prompt of {longest} tokens, but is {max_new_tokens} instead: {limit} "
            "positions were learned."
        )


def _continuations(model: Any, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], config: Generate) -> list[str]:
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_id] * (width - len(row)) + list(row) for row in rows], device=_device(model))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=_device(model))
    out = generate(model, ids, mask, **_how(config, tokenizer))
    answers = _answers(model)
    new = out[:, 1 if answers else width :]  # an answer follows the start token
    return [tokenizer.decode(_before_end(row, tokenizer.eos_id), special=answers) for row in new.tolist()]


def _stream(model: Any, tokenizer: Tokenizer, prompt: str, row: Sequence[int], config: Generate) -> None:
    answers = _answers(model)
    print(prompt, end=SEPARATOR if answers else "", flush=True)
    printer = _Printer(tokenizer, answers)
    generate(model, torch.tensor([row], device=_device(model)), on_token=printer, **_how(config, tokenizer))
    printer.finish()
    print(flush=True)


class _Printer:
    """Prints the text that each token adds; a character of several tokens once it is complete, or at the end.

    special: print special tokens too, by name.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._ids: list[int] = []
        self._printed = ""

    def __call__(self, new_B: Tensor) -> None:
        self._ids.append(int(new_B[0]))
        if not self._text.endswith("\ufffd"):
            self.finish()

    @property
    def _text(self) -> str:
        return self.tokenizer.decode(_before_end(self._ids, self.tokenizer.eos_id), special=self.special)

    def finish(self) -> None:
        text = self._text
        print(text[len(self._printed) :], end="", flush=True)
        self._printed = text


def _how(config: Generate, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_k": config.top_k,
        "top_p": config.top_p, "min_p": config.min_p, "eos_token_id": tokenizer.eos_id, "seed": config.seed
    }


def _before_end(ids: Sequence[int], eos_id: int) -> list[int]:
    return list(ids[: ids.index(eos_id)] if eos_id in ids else ids)


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
