"""The typed configuration of train and of what reads its data, and the checks across groups. No torch."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import txtrain.data.config
import txtrain.hf.lora_config
import txtrain.objectives.config  # noqa: F401  (these register the sources, the adapters and the objectives)
from txtrain.config import compatibility
from txtrain.errors import divisors_near, hint
from txtrain.ground.convert import Checked, among
from txtrain.ground.patterns import pattern_problems
from txtrain.model import rules
from txtrain.parallel import config as parallel  # (registers the strategies)
from txtrain.registry import METRIC, TABLE, config, key_of, knob, out_of_range
from txtrain.run_config import RunConfig


@config
class Train(RunConfig):
    """The configuration of a run, with the checks across its groups."""

    # of these keys those that a verb reads, which trains nothing and refuses the others; (): it reads all
    reads: ClassVar[tuple[str, ...]] = ()

    def check(self) -> Iterator[str]:
        """Problems: numbers out of bounds, or else those within each group; conflicts of model, objective and data;
        and, if the groups are sound, those between their values."""
        groups = [getattr(self, f.name) for f in dc.fields(self)]
        problems = [*out_of_range(self)] or [p for g in groups if isinstance(g, Checked) for p in g.check()]
        problems += pattern_problems("freeze", self.freeze)
        problems += pattern_problems("init_allow_missing", self.init_allow_missing)
        problems += self._check_evaluated()
        yield from problems
        if not any(rules.problems(self.model)):
            yield from compatibility.problems(self)
        if not problems:
            yield from self._check_between()

    @classmethod
    def unread(cls, given: Iterable[str]) -> Iterator[str]:
        """A problem for each given key that would change nothing."""
        own = {key_of(f) for f in dc.fields(cls)} - {key_of(f) for f in dc.fields(Train)}
        for key in given:
            if cls.reads and not among(key.replace("/", "."), (*cls.reads, *own)):
                comes = among(key.replace("/", "."), ("model", "adapter"))
                why = "it comes with the weights" if comes else "nothing here reads it"
                yield f"`{key}` must not be given here: {why}."

    def _check_between(self) -> Iterator[str]:
        data = self.data
        position = self.model.position
        if (limit := position.max_positions(self.model)) is not None and self.seq_len > limit:
            yield (
                f"`data.seq_len` must be at most model.max_seq_len ({limit}) with model/position={position.type}, "
                f"but is {self.seq_len} instead. Nearest: {limit}."
            )
        if (depth := self.model.mtp_depth) >= self.seq_len:
            yield (
                f"`model.mtp_depth` must be below data.seq_len ({self.seq_len}), but is {depth} instead. "
                f"Nearest: {self.seq_len - 1}."
            )
        yield from self._check_batch()
        if data.streaming and self.trainer.max_epochs is not None:
            yield (
                "`trainer.max_epochs` must be null with data.streaming=true: the length of a stream is unknown. Give "
                "trainer.max_steps or max_tokens."
            )
        if not self.objective.trains and not self.reads:
            yield f"`objective` must be one that trains, but is {self.objective.type} instead, which is for evaluate."
        if not self.trainer.limit_val_batches and (unmeasured := self._of_validation()):
            yield (
                f"`trainer.limit_val_batches` must be at least 1 with {', '.join(unmeasured)}, which a validation "
                "measures, but is 0 instead: there would be none. Nearest: 1."
            )
        yield from self._check_layer_stats()
        yield from self.strategy.check_with(self)
        yield from self.objective.check_with(self)
        if (steps := self.profile_steps) is not None:
            if not self.profile:
                yield (
                    f"`profile_steps` must be null without profile=true, but is [{steps[0]},{steps[1]}] instead. Add "
                    "profile=true."
                )
            if steps[0] > steps[1]:
                yield f"`profile_steps` must be the first and the last step to trace, but is {list(steps)} instead."
        yield from self._check_name()
        yield from self._check_base()
        if self.fork is not None and self.init_from is not None and not self.adapter.alone:
            yield "`fork` must be null with init_from, or the other way round: both say where the weights come from."
        if self.init_allow_missing and self.init_from is None:
            yield "`init_allow_missing` must be [] without init_from: no weights are read."
        if self.fork is not None and self.resume not in ("auto", "never"):
            yield f"`fork` must be null with resume={self.resume}, or resume auto: a fork is a run of its own."
        for key, source in (("fork", self.fork), ("resume", None if self.resume in ("auto", "never") else self.resume)):
            if source is not None and self.trainer.fast_dev_run:
                yield (
                    f"`trainer.fast_dev_run` must be false with {key}, but is {self.trainer.fast_dev_run} instead: it "
                    f"neither continues nor forks a run. To try a step from its weights: init_from={source}."
                )

    def _of_validation(self) -> list[str]:
        """The keys that ask for what only a validation gives."""
        asked = {
            "trainer.stop_after.patience": self.trainer.stop_after.patience, "eval_tasks": self.eval_tasks,
            "metrics": self.metrics, "save.load_best": self.save.load_best,
        }
        return [key for key, value in asked.items() if value]

    def _check_batch(self) -> Iterator[str]:
        if self.data.global_batch_size % self.micro_batch_size:
            near = ", ".join(map(str, divisors_near(self.micro_batch_size, self.data.global_batch_size)))
            yield (
                f"`data.micro_batch_size` must divide data.global_batch_size ({self.data.global_batch_size}), "
                f"but is {self.micro_batch_size} instead. Nearest: {near}."
            )
        elif (world := parallel.processes(self)) is not None:
            yield from self._check_processes(world)

    def _check_evaluated(self) -> Iterator[str]:
        for name, data in self.eval_tasks.items():
            key = f"eval_tasks.{name}"
            if not re.fullmatch(r"\w[\w.-]*", name):
                yield f"`{key}`: a name must be of letters, digits, _, . and -, but is {name!r} instead."
            if data.mixes or data.streaming:
                yield f"`{key}.type` must be a single source that is read whole, but is {data.type} instead."
            yield from (problem.replace("`data.", f"`{key}.", 1) for problem in data.check())
        known = TABLE.get(METRIC, {})
        for name in self.metrics:
            if name not in known:
                listed = ", ".join(known) or "(none is registered: imports=[FILE.py])"
                yield f"`metrics` must be of {listed}, but has {name} instead.{hint(name, known)}"

    def _check_base(self) -> Iterator[str]:
        if self.adapter.alone and self.init_from is None:
            yield (
                f"`init_from` must be given with adapter={self.adapter.type}: the folder, run or checkpoint whose "
                "weights are adapted. A checkpoint holds the adapter alone and names them."
            )

    def _check_name(self) -> Iterator[str]:
        parts = self.name.split("/")
        if not self.name.isprintable() or any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts):
            yield f"`name` must be the name of a folder in runs/, but is {self.name!r} instead. Elsewhere: run_dir=..."

    def _check_layer_stats(self) -> Iterator[str]:
        every, rows = self.layer_stats.every_n_steps, self.trainer.log_every_n_steps
        if every is None:
            return
        if every % rows:
            yield (
                f"`layer_stats.every_n_steps` must be a multiple of trainer.log_every_n_steps ({rows}) or null, "
                f"but is {every} instead. Nearest: {max(1, round(every / rows)) * rows}."
            )
        if self.layer_stats.activations and self.strategy.cuts_activations:
            yield (
                f"`layer_stats.activations` must be false with strategy={self.strategy.type}, but is true instead: "
                "a block's output is sharded and padded. Gradient and weight norms are given with it."
            )

    def _check_processes(self, world: int) -> Iterator[str]:
        problems = list(parallel.problems(self, world))
        yield from problems
        if not problems:
            yield from self.objective.check_ranks(self, self.strategy.layout(world).data)


@config
class PrepareConfig:
    """How `prepare` writes."""

    shard_tokens: int = knob(100_000_000, at_least=1)  # a file ends with the document that reaches this length


@config
class Prepare(Train):
    """The data of `train` to tokenise, and where to write them."""

    # the folder to write: a new one, or one that an interrupted `prepare` of the same data left
    out: str | None = knob(None, literal=True)
    prepare: PrepareConfig = dc.field(default_factory=PrepareConfig)

    def check(self) -> Iterator[str]:
        if self.out is None:
            yield "`out` must be given: the folder to write."
        yield from Train.check(self)


@config
class PreviewConfig:
    """What `preview` shows."""

    n: int | Literal["all"] = knob(3, at_least=1)  # number of samples, from the first step on; all: one epoch
    split: Literal["train", "validation", "val"] = "train"
    format: Literal["text", "json"] = "text"  # json: a line per sample: `input_ids`, `trained`, `documents`, `source`


@config
class Preview(Train):
    """The samples of `train` to show."""

    preview: PreviewConfig = dc.field(default_factory=PreviewConfig)
