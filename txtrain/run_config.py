"""RunConfig: the configuration of a run, as data, objectives, strategies and checkpoints see it. No torch.

Checks that involve several groups are in `txtrain.config.schema.Train`.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from txtrain.errors import hint
from txtrain.ground.patterns import pattern_problems
from txtrain.ground.slurm import MAX_REQUEUES
from txtrain.model.adapter import AdapterConfig
from txtrain.model.config import ModelConfig
from txtrain.model.transform import Freeze, Transform
from txtrain.optim.config import EMAConfig
from txtrain.registry import TABLE, axes, axis, config, knob

_LOWER = ("loss", "perplexity", "bits_per_byte", "grad_norm")
_HIGHER = (
    "accuracy", "accuracy_per_token", "accuracy_per_byte", "masked_accuracy", "nsp_accuracy", "top1", "top5",
    "f1_macro", "f1_micro", "mcc", "pearson", "spearman", "exact_match", "bleu", "chrf",
)
Direction = Literal["min", "max"]


def direction_of(metric: str) -> Direction | None:
    """Whether a metric is better when it is lower (min) or higher; None: it is not known."""
    name = metric.partition("/")[0]
    if name in _HIGHER:
        return "max"
    return "min" if name in _LOWER or name.endswith("_loss") else None


def _no_direction(key: str, metric: str) -> str:
    return f"`{key}` must be given for {metric}, min or max: whether a lower or a higher one is better is not known."


@config
class StopConfig:
    """When a run ends before its last step: once a metric no longer improves."""

    patience: int | None = knob(None, at_least=1)  # values in a row without a gain that end the run; null: never
    metric: str = "val_loss"  # any column of metrics.csv that validation fills
    direction: Direction | None = None  # whether lower or higher is better; null: known by the metric's name
    min_gain: float = knob(0.0, at_least=0)  # a smaller improvement is none

    def check(self) -> Iterator[str]:
        if self.direction is None and direction_of(self.metric) is None:
            yield _no_direction("trainer.stop_after.direction", self.metric)

    @property
    def sign(self) -> int:
        """1 if lower is better, -1 if higher is."""
        return 1 if (self.direction or direction_of(self.metric)) == "min" else -1


@config
class TrainerConfig:
    """Names as in Lightning. Intervals count steps, that is optimizer updates. The limit reached first ends the run."""

    max_steps: int | None = knob(None, at_least=1)  # optimizer updates
    max_epochs: int | None = knob(None, at_least=1)  # passes over the training data
    max_tokens: int | None = knob(None, at_least=1)  # positions, padding included
    max_time: str | None = knob(None, unit=True)  # DD:HH:MM:SS
    val_check_interval: int = knob(100, at_least=1)  # steps between validations
    limit_val_batches: int = knob(32, at_least=0)  # at most so many batches of global_batch_size sequences each
    log_every_n_steps: int = knob(10, at_least=1)  # steps between rows of metrics.csv
    gradient_clip_val: float | None = knob(1.0, above=0)  # clip the global norm of the gradients; null: never
    # allowed in a row; a step whose loss or gradient is not finite is skipped, and one more ends the run
    max_skipped_steps: int = knob(5, at_least=0)
    # allowed in a row with a loss far above the best (`monitor.loss_spikes`); one more ends the run; null: only warn
    max_divergent_steps: int | None = knob(None, at_least=0)
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = knob("auto", at_least=1)  # processes on each node; auto: one for each GPU, or one
    num_nodes: int = knob(1, at_least=1)
    compile: bool = False  # compile the blocks with torch.compile
    # recomputed in the backward: full: all activations; selective: all but matrix products; a number: every n-th block
    activation_checkpointing: Literal["none", "full", "selective"] | int = knob("none", at_least=1)
    deterministic: bool = False  # use deterministic algorithms only
    auto_requeue: bool = True  # requeue a SLURM job that is preempted or near its end, after a checkpoint
    # requeue a SLURM job at most so often in a row without a new checkpoint
    max_requeues: int = knob(MAX_REQUEUES, at_least=0)
    # stop after so many steps (true: 1) of training and validation; write nothing
    fast_dev_run: bool | int = knob(False, at_least=0)
    overfit_batches: int = knob(0, at_least=0)  # train only on the first so many global batches; 0: on all
    stop_after: StopConfig = dc.field(default_factory=StopConfig)
    # steps between evaluations of eval_tasks, a multiple of val_check_interval; null: at each validation
    eval_tasks_interval: int | None = knob(None, at_least=1)

    def check(self) -> Iterator[str]:
        yield from self.stop_after.check()
        every, between = self.eval_tasks_interval, self.val_check_interval
        if every is not None and every % between:
            near = max(1, round(every / between)) * between
            yield (
                f"`trainer.eval_tasks_interval` must be a multiple of trainer.val_check_interval ({between}) or null, "
                f"but is {every} instead. Nearest: {near}."
            )
        limits = ("max_steps", "max_epochs", "max_tokens", "max_time")
        if all(getattr(self, name) is None for name in limits):
            yield (
                "`trainer.max_steps` must be given, or one of trainer.max_epochs, max_tokens, max_time: "
                "nothing would end the run."
            )
        if self.max_time is not None and not re.fullmatch(r"\d{1,6}:\d{1,2}:\d{1,2}:\d{1,2}", self.max_time):
            yield f"`trainer.max_time` must be DD:HH:MM:SS, but is {self.max_time!r} instead. One hour: 00:01:00:00."


@config
class SaveConfig:
    """When checkpoints are written: also at the last step, an interrupt and a new best validation, if allowed."""

    every_n_steps: int = knob(200, at_least=1)  # steps between checkpoints
    keep_last: int = knob(2, at_least=1)  # how many of the newest to keep
    keep_best: int = knob(1, at_least=0)  # how many with the best metric to keep
    metric: str = "val_loss"  # of keep_best: any column of metrics.csv that validation fills
    direction: Direction | None = None  # whether a lower or higher one is better; null: known by the metric's name
    load_best: bool = False  # at the end, load the weights with the best metric
    weights_only_last: bool = False  # the checkpoint of the last step holds weights alone: no run continues from it
    keep_every_n_steps: int | None = knob(None, at_least=1)  # those of every so many steps are kept for good
    async_: bool = False  # write from a copy in CPU memory while the training goes on
    verify: bool = True  # compare each tensor with its checksum on resume and fork

    @property
    def sign(self) -> int:
        """1 if a lower metric is better, -1 if a higher one is."""
        return 1 if (self.direction or direction_of(self.metric)) == "min" else -1

    def check(self) -> Iterator[str]:
        if self.direction is None and direction_of(self.metric) is None:
            yield _no_direction("save.direction", self.metric)
        if self.load_best and not self.keep_best:
            yield "`save.keep_best` must be at least 1 with save.load_best=true, but is 0 instead. Nearest: 1."
        every, step = self.keep_every_n_steps, self.every_n_steps
        if every is not None and every % step:
            multiple = f"a multiple of save.every_n_steps ({step}) or null"
            yield f"`save.keep_every_n_steps` must be {multiple}, but is {every} instead."


@config
class SampleConfig:
    """Continuations written at each validation: to the screen and to samples.txt."""

    prompts: tuple[str, ...] = ()  # empty: the first words of the first n validation documents
    n: int = knob(2, at_least=0)  # validation samples that are shown or continued
    max_new_tokens: int = knob(40, at_least=0)
    temperature: float = knob(0.8, at_least=0)  # 0: the most likely token


@config
class LayerStatsConfig:
    """Statistics of each layer in metrics.csv and the loggers: norms of gradients and weights, load balance of MoE."""

    every_n_steps: int | None = knob(None, at_least=1)  # in rows of every so many steps; null: never
    activations: bool = False  # also the root mean square of each block's output

    def check(self) -> Iterator[str]:
        if self.every_n_steps is None and self.activations:
            yield "`layer_stats.every_n_steps` must be given with layer_stats.activations=true."


@dc.dataclass(frozen=True)
class Extent:
    """How much of the data is the validation set.

    Attributes:
        whole: all of it, nothing is held out for training.
        rest: no token is left out: the last sequence may be shorter.
        stride: tokens between the begins of sequences, each of which predicts what the one before has not; None: those
            of training.
    """

    whole: bool = False
    rest: bool = False
    stride: int | None = None


@config
class Weighted:
    weight: float = 1.0  # of this reward in the sum of all


@config
class AnswerConfig(Weighted):
    """1 for the right answer, else 0."""

    # exact: the same text; numeric: the same number; equation: an expression of the problem's `numbers`, each of them
    # once, that has the value; auto: equation for a problem with `numbers`, else exact
    match: Literal["auto", "exact", "numeric", "equation"] = "auto"
    # where the answer stands: the last place of this in the completion, its first group if it has one; null: all of it
    pattern: str | None = None
    reference_pattern: str | None = None  # the same for the problem's answer; GSM8K's: '#### (.*)'


@config
class FormatConfig(Weighted):
    """1 for reasoning and an answer, each once in its tags and nothing beside them (2501.12948), else 0."""

    tags: tuple[str, str] = ("think", "answer")


@config
class LengthConfig(Weighted):
    """0 up to `free` tokens, then falling to -1 at `free` + `over` (2503.14476, equation 13)."""

    free: int | None = knob(None, at_least=0)  # must be given
    over: int = knob(16, at_least=1)


@config
class RegexConfig(Weighted):
    """1 for a completion that has the pattern, else 0."""

    pattern: str | None = None  # must be given


@config
class RewardConfig:
    """What a completion is worth, for objective=grpo: the weighted sum of the chosen rewards."""

    # reward=[NAME,...]: answer, format, length, regex, or your own of `imports`
    use: tuple[str, ...] = ("answer",)
    workers: int = knob(0, at_least=0, free=True)  # processes per rank that compute rewards; 0: the rank itself
    timeout: float | None = knob(None, above=0, free=True)  # seconds for one completion, in a worker; null: no limit
    # of a reward that raises, hangs or is not finite: stop the run, or count 0; either way it is named with its problem
    on_error: Literal["stop", "zero"] = "stop"
    answer: AnswerConfig = AnswerConfig()
    format: FormatConfig = FormatConfig()
    length: LengthConfig = LengthConfig()
    regex: RegexConfig = RegexConfig()

    def check(self) -> Iterator[str]:
        known = ", ".join(TABLE.get("reward", {}))
        for name in self.use:
            if name not in TABLE.get("reward", {}):
                meant = hint(name, TABLE["reward"])
                yield f"`reward` must be a list of {known}, but has {name} instead.{meant}"
        if not self.use or len(set(self.use)) < len(self.use):
            yield f"`reward` must be a list of different rewards ({known}), but is {list(self.use)} instead."
        if self.timeout is not None and not self.workers:
            yield (
                f"`reward.timeout` must be null with reward.workers=0, but is {self.timeout} instead: only a process "
                "of its own can be stopped. Nearest: reward.workers=1."
            )
        for name, key, value in (("length", "free", self.length.free), ("regex", "pattern", self.regex.pattern)):
            if name in self.use and value is None:
                yield f"`reward.{name}.{key}` must be given with reward=[{name}]."
        for key, pattern in (
            ("answer.pattern", self.answer.pattern), ("answer.reference_pattern", self.answer.reference_pattern),
            ("regex.pattern", self.regex.pattern),
        ):
            yield from pattern_problems(f"reward.{key}", () if pattern is None else (pattern,))


@config
class RunConfig:
    model: ModelConfig
    data: Any = axis("data")
    objective: Any = axis("objective")
    # further data that validation evaluates, by name: the `type` of the source, and its keys
    eval_tasks: dict[str, Any] = axes("data")
    # your own metrics of validation, functions registered by @txtrain.component("metric", NAME)
    metrics: tuple[str, ...] = ()
    optimizer: Any = axis("optimizer")
    scheduler: Any = axis("scheduler")
    strategy: Any = axis("strategy", free=True)
    trainer: TrainerConfig = knob(free=True)
    save: SaveConfig = knob(free=True)
    ema: EMAConfig = dc.field(default_factory=EMAConfig)
    # parameters that are not trained: those whose dotted name has one of these patterns (re.search)
    freeze: tuple[str, ...] = ()
    adapter: Any = axis("adapter", AdapterConfig(type="none"))
    sample: SampleConfig = knob(free=True)
    layer_stats: LayerStatsConfig = knob(LayerStatsConfig(), free=True)
    reward: RewardConfig = RewardConfig()
    # Lightning loggers by _target_; the keys of wandb are in docs/logging.md
    logger: dict[str, Any] = knob(free=True)
    callbacks: dict[str, Any] = knob(free=True)  # Lightning callbacks by _target_
    name: str = knob("default", literal=True)  # part of the run's folder
    run_dir: str | None = knob(None, free=True, literal=True)  # null: runs/<name>/<date>_<time>
    seed: int = knob(1337, at_least=-(2**63), below=2**64)
    # files or modules with your own components, registered by @txtrain.component
    imports: tuple[str, ...] = knob((), free=True)
    # start from the weights, architecture and tokenizer of a Hugging Face folder, an export, a run or a checkpoint
    init_from: str | None = knob(None, literal=True, run=True)
    # tensors that init_from may lack, or have in another shape, are initialised; what only it has is skipped: patterns
    init_allow_missing: tuple[str, ...] = knob((), free=True)
    # auto: from run_dir's newest checkpoint; never; or a run, checkpoint or folder of runs, which further keys override
    resume: str = knob("auto", free=True, literal=True)
    resume_allow: tuple[str, ...] = knob((), free=True)  # keys that may differ from the resumed or forked run
    # start a new run from the weights, optimizer state and step of this run or checkpoint
    fork: str | None = knob(None, literal=True, run=True)
    # accept NaN and infinity in the weights of init_from, fork and resume
    allow_nonfinite: bool = knob(False, free=True)
    # how much is printed; NO_COLOR=1 turns colours off
    verbosity: Literal["quiet", "normal", "verbose"] = knob("normal", free=True)
    profile: bool = knob(False, free=True)  # write a trace of a few steps into the run's folder
    # the first and the last step to trace; null: the fourth to the sixth of this start
    profile_steps: tuple[int, int] | None = knob(None, at_least=1, free=True)

    @property
    def extent(self) -> Extent:
        """How much of the data is validated."""
        return Extent()

    @property
    def seq_len(self) -> int:
        return int(self.data.seq_len or self.model.max_seq_len)

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Maximal positions of one sample: of the source, and of the target where there are two stacks."""
        if self.model.topology != "encoder_decoder":
            return self.seq_len, None
        source, target = self.objective.lengths(self.seq_len)
        return source, target

    @cached_property
    def transforms(self) -> tuple[Transform, ...]:
        """Changes to the model before it is sharded."""
        return (*self.adapter.transforms(self.model), *([Freeze(self.freeze)] if self.freeze else []))

    def trains(self, name: str) -> bool:
        """Whether the parameter of that name is trained."""
        return all(t.trains(name) for t in self.transforms)

    def keeps(self, name: str) -> bool:
        """Whether checkpoints hold the parameter or buffer: of an adapter's base they hold what is trained whole."""
        return all(t.keeps(name) for t in self.transforms)

    def rank(self, matrix: str) -> int:
        """The rank of the adapter of a matrix, by its name without `.weight`; 0: it has none."""
        return sum(t.rank(matrix) for t in self.transforms)

    @property
    def micro_batch_size(self) -> int:
        return int(self.data.micro_batch_size or self.data.global_batch_size)
