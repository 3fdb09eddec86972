"""The typed configuration of the verbs that read a trained model. No torch."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from txtrain.config.schema import Train
from txtrain.config.units import bytes_of
from txtrain.ground.convert import Checked
from txtrain.model.config import Sampling
from txtrain.parallel import config as parallel
from txtrain.registry import axis, config, knob, out_of_range
from txtrain.run_config import Extent


@config
class OnTrained(Train):
    """A trained model, and the data that it reads."""

    reads: ClassVar[tuple[str, ...]] = (
        "data", "reward", "strategy", "trainer.precision", "trainer.accelerator", "trainer.devices",
        "trainer.num_nodes", "seed", "imports", "init_from", "allow_nonfinite",
    )

    # a run, one of its checkpoints, a folder of runs, an export or a Hugging Face folder; model and tokenizer are its
    checkpoint: str | None = knob(None, literal=True, run=True)
    weights: Literal["model", "ema"] = "model"  # ema: averaged weights, of a run with ema.decay
    out: str | None = knob(None, literal=True)  # the file to write

    @property
    def extent(self) -> Extent:
        return Extent(whole=True, rest=True)

    def check(self) -> Iterator[str]:
        """Problems within each group; those between them (`problems`) are asked for once the model is known."""
        groups = [getattr(self, f.name) for f in dc.fields(self)]
        yield from [*out_of_range(self)] or [p for g in groups if isinstance(g, Checked) for p in g.check()]

    def problems(self) -> Iterator[str]:
        """All problems, of the checkpoint's model."""
        yield from Train.check(self)

    def _check_between(self) -> Iterator[str]:
        yield from Train._check_between(self)
        yield from self._check_rows()

    def _check_rows(self) -> Iterator[str]:
        data, head = self.data, self.model.head
        if data.streaming:
            yield "`data.streaming` must be false here, where all rows are read, but is true instead."
        if data.sample_kind == "labels" and head.pools and data.kind != head.kind:
            yield f"`data.kind` must be {head.kind}, as in the checkpoint, but is {data.kind} instead."

    def _check_batch(self) -> Iterator[str]:
        """Ranks need no equal shares."""
        if (world := parallel.processes(self)) is not None:
            yield from self.strategy.problems(world, self.model)


OF_TASKS = "`tasks` must be evaluated by one process: trainer.devices=1."


@config
class LMEvalConfig:
    """How lm_eval evaluates `tasks`; its words."""

    include_path: str | None = knob(None, literal=True)  # a folder with further tasks, as .yaml
    num_fewshot: int | None = knob(None, at_least=0)  # examples before each question; null: the task's own number
    limit: int | None = knob(None, at_least=1)  # questions of each task; null: all


@config
class Evaluate(OnTrained):
    """A trained model, and what to measure it on."""

    reads: ClassVar[tuple[str, ...]] = (*OnTrained.reads, "objective", "metrics")

    tasks: tuple[str, ...] = ()  # instead of data: tasks of lm_eval (pip install "txtrain[eval]")
    lm_eval: LMEvalConfig = dc.field(default_factory=LMEvalConfig)

    # all of the data, or what a run holds out or names for validation; null: all of data.path, where it is given
    # without data.val_path; else validation
    split: Literal["all", "validation"] | None = None
    # tokens from one sequence of data.seq_len to the next, each predicted once; null: sequences side by side
    stride: int | None = knob(None, at_least=1)
    # resampled sets of documents (or rows) for the 95 % interval of each figure; 0: no intervals
    n_bootstrap: int = knob(1000, at_least=0)

    @property
    def extent(self) -> Extent:
        return Extent(whole=self.split == "all", rest=True, stride=self.stride)

    def problems(self) -> Iterator[str]:
        if self.lm_eval != LMEvalConfig() and not self.tasks:
            yield "`tasks` must be given with lm_eval.include_path, num_fewshot and limit, which are of tasks alone."
        yield from self._of_tasks() if self.tasks else OnTrained.problems(self)

    def _of_tasks(self) -> Iterator[str]:
        """Those of `tasks`, which read no data of ours."""
        yield from self.check()
        if self.model.topology == "encoder" or not self.model.head.writes:
            what = f"{self.model.topology} with model/head={self.model.head.type}"
            yield f"`tasks` must be empty for a model that writes no text, a {what}."
        if (parallel.processes(self) or 1) > 1:
            yield OF_TASKS

    def _check_between(self) -> Iterator[str]:
        yield from OnTrained._check_between(self)
        if self.data.sample_kind == "problems" and self.split == "all":
            remedy = "Of the same files: data=questions objective=answers"
            yield f"`split` must be validation with data={self.data.type}, which is divided as for training. {remedy}."
        if self.stride is None:
            return
        limit = self.seq_len - 1
        if self.stride > limit:
            yield (
                f"`stride` must be at most {limit}, one less than the sequences (data.seq_len), but is {self.stride} "
                f"instead. Nearest: {limit}."
            )
        if self.data.packing != "concat" or self.data.sample_kind != "text" or not self.objective.slides:
            yield (
                f"`stride` must be null with objective={self.objective.type} on data={self.data.type} and "
                f"data.packing={self.data.packing}, but is {self.stride} instead: a window slides over a text for "
                "next-token prediction."
            )


@config
class PredictConfig:
    """What `predict` writes of each row."""

    # label: classes with probabilities; text: a continuation or an answer; log_probability: of the row's text, or of
    # its answer; auto: label of a classifier, embedding of an encoder, text of what generates
    what: Literal["auto", "label", "text", "log_probability", "embedding"] = "auto"
    pooling: Literal["mean", "first", "last"] = "mean"  # an embedding's positions of the last layer


@config
class Predict(OnTrained):
    """A trained model, and the rows that it reads."""

    predict: PredictConfig = dc.field(default_factory=PredictConfig)
    max_new_tokens: int = knob(64, at_least=1)
    temperature: float = knob(0.0, at_least=0)  # 0: the most likely token
    top_k: int | None = knob(None, at_least=1)
    top_p: float | None = knob(None, above=0, at_most=1)
    min_p: float | None = knob(None, at_least=0, at_most=1)
    stop: tuple[str, ...] = ()  # texts that end a generated text
    n: int = knob(1, at_least=1)  # samples of each problem (data=arithmetic, countdown, problems), a row each

    def problems(self) -> Iterator[str]:
        """Those of the data and of the ranks: no objective is needed."""
        yield from self.check()
        if self.n > 1 and not (self.temperature and self.data.sample_kind == "problems"):
            why = f"with data={self.data.type}" if self.temperature else "with temperature=0, where all are the same"
            yield f"`n` must be 1 {why}, but is {self.n} instead."
        if self.stop and self.data.sample_kind == "problems":
            yield f"`stop` must be [] with data={self.data.type}, where an end token alone ends an answer."
        yield from self._check_rows()
        yield from self._check_batch()


@config
class Generate(Sampling):
    # a run, one of its checkpoints, a folder of runs, or a Hugging Face folder
    checkpoint: str | None = knob(None, literal=True, run=True)
    weights: Literal["model", "ema"] = "model"  # ema: averaged weights, of a run with ema.decay
    prompt: str | None = knob(None, literal=True)  # taken as typed; `-`: standard input
    prompt_file: str | None = None  # text file with one prompt per line
    chat: bool = False  # talk in the terminal, by the tokenizer's chat template; with messages: answer that file
    # conversations to answer, a JSON object a line (messages, or another format of data=chat)
    messages: str | None = knob(None, literal=True)
    out: str | None = knob(None, literal=True)  # with messages: the .jsonl file to write; null: standard output
    system: str | None = knob(None, literal=True)  # with chat or messages: a system turn where there is none
    stream: bool = True  # print tokens as they are generated, if there is one prompt
    batch_size: int = knob(16, at_least=1)  # rows that are generated together; those that end leave
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"  # of weights and computation
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    strategy: Any = axis("strategy", free=True)  # how the weights lie over the processes
    devices: int = knob(1, at_least=1)  # processes, which txtrain starts; rows are divided among them
    imports: tuple[str, ...] = ()  # files and modules with the user's own components that the run used

    def check(self) -> Iterator[str]:
        if self.checkpoint is None:
            yield "`checkpoint` must be given: a run's folder, or one of its checkpoints."
        chats = self.chat or self.messages is not None
        asked = [self.prompt is not None, self.prompt_file is not None, chats]
        if sum(asked[:2]) == 2:
            yield '`prompt` must be given, or prompt_file, and not both: prompt="The " (or prompt=-: standard input).'
        elif not any(asked):
            others = "or prompt_file, messages or chat=true"
            yield f'`prompt` must be given, {others}: prompt="The " (or prompt=-: standard input).'
        elif sum(asked) > 1:
            yield "`chat` and `messages` must be given without prompt and prompt_file."
        if self.out is not None and self.messages is None:
            yield f"`out` must be null without messages, but is {self.out!r} instead."
        if self.system is not None and not chats:
            yield f"`system` must be null without chat=true or messages, but is {self.system!r} instead."
        if self.chat and self.messages is None and (self.n > 1 or self.devices > 1):
            yield "`chat` must be false with n or devices above 1: one answer is written, by one process."
        yield from Sampling.check(self)


@config
class Export:
    checkpoint: str | None = knob(None, literal=True, run=True)  # a run's folder, or one of its checkpoints
    out: str | None = knob(None, literal=True)  # the folder to write: new or empty
    weights: Literal["model", "ema"] = "model"  # ema: averaged weights, of a run with ema.decay
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights in the files
    # of one file of weights, such as 5GB or 500MiB; larger models get several
    max_shard_size: str = knob("5GB", unit=True)
    # hf: a folder for transformers and what reads its layout. gguf: one file for llama.cpp (txtrain[gguf]).
    format: Literal["hf", "gguf"] = "hf"
    push_to: str | None = knob(None, literal=True)  # a hub name, NAME/MODEL, to which the folder is uploaded too
    merge_adapter: bool = True  # of a run with adapter=lora: false writes the adapter alone, in PEFT's layout
    allow_nonfinite: bool = False  # export even if weights are NaN or infinite
    imports: tuple[str, ...] = ()  # files and modules with the user's own components that the run used

    def check(self) -> Iterator[str]:
        if self.checkpoint is None:
            yield "`checkpoint` must be given: a run's folder, or one of its checkpoints."
        if self.out is None:
            yield "`out` must be given: the folder to write."
        if not bytes_of(self.max_shard_size):
            yield f"`max_shard_size` must be a size such as 5GB or 500MiB, but is {self.max_shard_size!r} instead."
        if not self.merge_adapter:
            for name in ("format", "dtype", "max_shard_size"):
                if (value := getattr(self, name)) != (default := getattr(Export, name)):
                    yield f"`{name}` must be {default} with merge_adapter=false, but is {value} instead."
        elif self.format == "gguf" and self.max_shard_size != Export.max_shard_size:
            yield f"`max_shard_size` must be {Export.max_shard_size} with format=gguf, which is one file."
        if self.push_to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to):
            yield f"`push_to` must be a name on the hub such as me/my-model, but is {self.push_to!r} instead."
