"""`txtrain generate`: prompts in, continuations out; from an encoder-decoder, answers; by a chat template, replies."""

from __future__ import annotations

import sys
from functools import partial

from txtrain.cli.writer import Writer, laid_out, ready, show
from txtrain.config.composed import Composed, to_file
from txtrain.config.schema_of_trained import Generate
from txtrain.data.sources.files import missing
from txtrain.errors import ConfigError
from txtrain.ground.files import path_of
from txtrain.ground.plain_files import split_lines
from txtrain.objectives.continuations import encode
from txtrain.parallel.launch import launch, n_processes

SEPARATOR = "|"  # between a prompt and its answer, as in samples.txt


def run_generate(job: Composed) -> int:
    """Print each prompt with its continuation. A single one is streamed. With several processes, start them.

    Raises:
        ConfigError: no such checkpoint or file of prompts, no prompt, a model that cannot generate text, or more
            tokens than the model has positions.
    """
    config: Generate = job.config
    run = laid_out(config)
    if run is not None and (n := n_processes(run)) > 1:
        return launch(run, partial(to_file, job), n, "generate")
    prompts = read_prompts(config) if run is None else None
    with ready(config, run) as writer:
        if config.messages is not None or config.chat:
            from txtrain.cli import chat  # here: a prompt needs no templates

            (chat.talk if config.messages is None else chat.answer_file)(writer)
        elif prompts is None and writer.parallel is not None:
            _write(writer, writer.parallel.first(lambda: read_prompts(config)))
        else:
            _write(writer, prompts or [])
        writer.tell_rate()
    return 0


def _write(writer: Writer, prompts: list[str]) -> None:
    config, between = writer.config, SEPARATOR if writer.answers else ""
    rows = [encode(writer.tokenizer, prompt, writer.answers) for prompt in prompts]
    if len(prompts) == 1 and config.stream and config.n == config.num_beams == 1 and writer.parallel is None:
        writer.check_length(rows, "prompt")
        print(prompts[0], end=between, flush=True)
        writer.stream(rows[0], partial(show, end=""))
        print(flush=True)
        return
    for prompt, texts in zip(prompts, writer.texts(rows), strict=True):
        for text in texts if writer.is_first else ():
            show(prompt + between + text)


def read_prompts(config: Generate) -> list[str]:
    """`prompt` as typed, or all of standard input for `-`; or the lines of prompt_file; none for a chat.

    Raises:
        ConfigError: the file cannot be read, or holds no prompt, or something is not UTF-8.
    """
    if config.prompt is not None:
        return [_standard_input() if config.prompt == "-" else config.prompt]
    if config.prompt_file is None:
        return []
    path = path_of(config.prompt_file, "prompt_file")
    if path.exists() and not path.is_file():
        raise ConfigError(missing(config.prompt_file, "prompt_file", "a text file with one prompt a line"))
    try:
        lines = split_lines(path.read_text(encoding="utf-8"))
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
