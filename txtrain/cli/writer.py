"""A trained model that writes texts: loaded whole, or laid over the processes of a strategy."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from txtrain.checkpoint.described import describe
from txtrain.checkpoint.load import load, open_weights
from txtrain.config.schema import Train
from txtrain.config.schema_of_trained import Generate
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError, visible
from txtrain.model.config import ModelConfig, Sampling
from txtrain.model.decoding import Written
from txtrain.model.few_rows import kernels
from txtrain.model.generation import Decoding, continue_rows
from txtrain.objectives.continuations import end_tokens
from txtrain.parallel.build import make_parallel
from txtrain.parallel.config import StrategyConfig
from txtrain.parallel.one_process import OneProcess

T = TypeVar("T")
WINDOW = 64  # batches of prompts that are sorted by length and printed together


def show(text: str, end: str = "\n") -> None:
    """Print what a model wrote; to a terminal without its control characters."""
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


class Writer:
    """Texts from prompts, by the sampling of a configuration.

    ends: tokens that end a text: the tokenizer's and the model's, and in a chat the one that ends a turn.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: Generate, parallel: OneProcess | None, device: torch.device
    ) -> None:
        self.model, self.tokenizer, self.config, self.parallel, self.device = model, tokenizer, config, parallel, device
        self.how = Sampling(**{f.name: getattr(config, f.name) for f in dc.fields(Sampling)})
        if self.how.seed is None:
            self.how = dc.replace(self.how, seed=self._first(lambda: int(torch.randint(2**63 - 1, ()))))
        self.ends = end_tokens(model.config, tokenizer)
        self.n_tokens, self.seconds = 0, 0.0

    @property
    def answers(self) -> bool:
        """Whether the output answers the prompt, which an encoder reads, instead of continuing it."""
        return self.model.encoder is not None

    @property
    def is_first(self) -> bool:
        return self.parallel is None or self.parallel.is_first

    def _first(self, do: Callable[[], Any]) -> Any:
        return do() if self.parallel is None else self.parallel.first(do)

    def texts(self, prompts: Sequence[Sequence[int]], what: str = "prompt") -> Iterator[list[str]]:
        """For each prompt the texts of its n rows, in the order of the prompts; on all ranks.

        Raises:
            ConfigError: a prompt and the new tokens exceed the learned positions. what: the key of the prompts.
        """
        self.together(lambda: self.check_length(prompts, what))
        size = self.config.batch_size * WINDOW
        for start in range(0, len(prompts), size):
            yield from self._together(prompts[start : start + size], start)

    def _together(self, prompts: Sequence[Sequence[int]], start: int) -> list[list[str]]:
        rank, of = (0, 1) if self.parallel is None else (self.parallel.rank, self.parallel.size)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        mine = order[rank::of]  # ranks get prompts of like lengths
        written = self._written([prompts[i] for i in mine], [start + i for i in mine])
        n, found = self.how.n, {}
        for k, i in enumerate(mine):
            found[i] = [self._said(row.ids.tolist()) for row in written[k * n : (k + 1) * n]]
        counts = rank, sum(len(row.ids) for row in written), found
        all_ranks = [counts] if self.parallel is None else self.parallel.of_all(counts)
        by_rank = {r: (n_tokens, texts) for r, n_tokens, texts in all_ranks}  # under tp several have the same
        self.n_tokens += sum(n_tokens for n_tokens, _ in by_rank.values())
        merged = {i: texts for _, some in by_rank.values() for i, texts in some.items()}
        return [merged[i] for i in range(len(prompts))]

    def stream(
        self, prompt: Sequence[int], show: Callable[[str], None], number: int = 0, interruptible: bool = False
    ) -> str:
        """One text, that of row `number`, whose pieces are shown as they come.

        interruptible: Ctrl-C ends the text, not the program.
        """
        said: list[int] = []
        printer = Printer(self._said, show, self.how.stop)

        def step(new_B: Tensor) -> None:
            said.extend(new_B.tolist())
            printer(said)

        with contextlib.suppress(*([KeyboardInterrupt] if interruptible else [])):
            self._written([prompt], [number], step)
        self.n_tokens += len(said)
        return printer.finish(said)

    def together(self, do: Callable[[], T]) -> T:
        """On every rank; of the errors that all have, the first rank alone reports."""
        return do() if self.parallel is None else self.parallel.together(do)

    def _written(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], step: Callable[[Tensor], None] | None = None
    ) -> list[Written]:
        job = Decoding(self.how, self.ends, self.config.batch_size, self.decode, on_step=step, device=self.device)
        if self.parallel is not None:
            job = dc.replace(job, ranks=self.parallel)
        begun = time.perf_counter()
        try:
            return continue_rows(self.model, prompts, job, numbers)
        finally:
            self.seconds += time.perf_counter() - begun

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, special=self.answers)

    def _said(self, ids: Sequence[int]) -> str:
        """The text up to the end token or the first stop string."""
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        return cut(self.decode(ids[:end]), self.how.stop)

    def check_length(self, rows: Sequence[Sequence[int]], what: str) -> None:
        longest, limit = max(map(len, rows)), self.model.max_positions
        if self.answers:
            if limit is not None and longest > limit:
                raise ConfigError(
                    f"`{what}` must have at most {limit} tokens, its end among them, but has {longest}: {limit} "
                    "positions were learned."
                )
            longest = 1  # the decoder's own positions begin with its start token
        if limit is not None and longest + self.how.max_new_tokens > limit:
            room = limit - longest
            problem = f"must be at most {room}" if room > 0 else "has no room"
            raise ConfigError(
                f"`max_new_tokens` {problem} after a prompt of {longest} tokens, but is {self.how.max_new_tokens} "
                f"instead: {limit} positions were learned."
            )

    def tell_rate(self) -> None:
        """On standard error, by the first rank; and why products go by torch's kernels where ours would serve."""
        if self.is_first and self.n_tokens:
            rate = self.n_tokens / max(self.seconds, 1e-9)
            told = f"{self.n_tokens:,} tokens in {self.seconds:.1f} s: {rate:,.0f} tokens/s"
            reason = kernels() if self.device.type == "cpu" and self.config.dtype == "float32" else None
            if isinstance(reason, str):
                told += f"; matrix products by torch, as {reason}"
            print(f"txtrain: {told}", file=sys.stderr)


class Printer:
    """Shows what each token adds to a text; a character of several tokens once it is complete, or at the end.

    What may be the beginning of a stop string waits until it is known to be none.
    """

    def __init__(self, said: Callable[[list[int]], str], show: Callable[[str], None], stop: Sequence[str] = ()) -> None:
        self._said, self._show, self._stop, self._shown = said, show, stop, ""

    def __call__(self, ids: list[int]) -> None:
        text = self._said(ids)
        if not text.endswith("\ufffd"):
            waiting = max((_overlap(text, string) for string in self._stop), default=0)
            self._until(text[: len(text) - waiting])

    def finish(self, ids: list[int]) -> str:
        """The whole text."""
        text = self._said(ids)
        self._until(text)
        return text

    def _until(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of the text that begins the string."""
    return next((k for k in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:k])), 0)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the strings in it."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


# ------------------------------------------------------------------------------------------------------------ loading


def laid_out(config: Generate) -> Train | None:
    """A run's configuration with the checkpoint's model and this strategy, as strategies read it; None: one process
    holds the model."""
    if config.devices == 1 and type(config.strategy) is StrategyConfig:  # of copies of the model
        return None
    from txtrain.cli.jobs import compose

    assert config.checkpoint is not None
    run = compose(["trainer.max_steps=1"])
    assert isinstance(run, Train)
    devices, trainer = config.devices, dc.replace(run.trainer, devices=config.devices, accelerator=config.accelerator)
    return dc.replace(
        run, model=describe(config.checkpoint).model, strategy=config.strategy, trainer=trainer,
        data=dc.replace(run.data, global_batch_size=devices, micro_batch_size=1),
    )


@contextlib.contextmanager
def ready(config: Generate, run: Train | None) -> Iterator[Writer]:
    """The writer of a checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, it does not write text, or cannot be laid over the processes.
    """
    assert config.checkpoint is not None
    dtype = getattr(torch, config.dtype)
    if run is None:
        device = pick_device(config.accelerator)
        loaded = load(config.checkpoint, device, weights=config.weights, finite=True)
        tokenizer = _check_writes(str(loaded.path), loaded.model.config, loaded.tokenizer)
        yield Writer(loaded.model.to(dtype), tokenizer, config, None, device)
        return
    parallel = make_parallel(run)
    with parallel.started():
        device, (rank, size, *_) = parallel.device(), parallel.world
        source = parallel.together(
            lambda: open_weights(config.checkpoint or "", "checkpoint", True, rank, size, config.weights)
        )
        place, model = describe(source.path).tokenizer, source.model.config
        found = None if place is None else load_tokenizer(place)
        tokenizer = parallel.together(lambda: _check_writes(str(source.path), model, found))
        parallel.check_read(source.model.config, "checkpoint")
        source.model.to(dtype)
        yield Writer(parallel.lay_read_only(source, device), tokenizer, config, parallel, device)


def _check_writes(where: str, model: ModelConfig, tokenizer: Tokenizer | None) -> Tokenizer:
    if model.topology == "encoder":
        raise ConfigError(
            f"`checkpoint` must be of a model that writes, a decoder or an encoder with one, but {where!r} is an "
            f"encoder ({model.family}), which reads a whole text and continues none."
        )
    if tokenizer is None:
        raise ConfigError(f"`checkpoint` must have a tokenizer, but {where!r} has none: it was not trained on text.")
    return tokenizer


def pick_device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("`accelerator` must be cpu or auto here, but is gpu instead: torch sees no CUDA device.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
