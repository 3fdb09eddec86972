"""RunConfig: what a run is told, as data, objectives, strategies and checkpoints see it. No torch.

What of it goes together is checked where the groups meet: `txtrain.config.schema.Train`.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator
from typing import Any, Literal

from txtrain.model.config import ModelConfig
from txtrain.optim.config import EMAConfig
from txtrain.registry import axis


@dc.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Lightning's words. Every interval counts steps; a step is one optimizer update. The first limit that is reached ends the run."""

    max_steps: int | None = None
    max_epochs: int | None = None
    max_tokens: int | None = None
    max_time: str | None = None  # DD:HH:MM:SS
    val_check_interval: int = 100  # steps
    limit_val_batches: int = 32  # of global_batch_size sequences each
    log_every_n_steps: int = 10
    gradient_clip_val: float | None = 1.0  # by the global norm; null: never
    max_skipped_steps: int = 5  # in a row; a step whose loss or gradient is not finite changes nothing, and one more of them ends the run
    max_divergent_steps: int | None = None  # in a row, whose loss is far above the best (`monitor.loss_spikes`); one more ends the run; null: it is only said
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = "auto"  # processes on each node; auto: one a GPU, or one
    num_nodes: int = 1
    compile: bool = False
    activation_checkpointing: Literal["none", "full", "selective"] | int = "none"  # computed again in the backward: all; all but products; every n-th block
    deterministic: bool = False
    auto_requeue: bool = True  # a SLURM job that is preempted, or whose end is near, asks to be run again once its checkpoint is complete
    fast_dev_run: bool | int = False  # so many steps (true: 1) of training and validation, then stop; nothing saved
    overfit_batches: int = 0  # train on the first so many global batches again and again

    def check(self) -> Iterator[str]:
        limits = ("max_steps", "max_epochs", "max_tokens", "max_time")
        if all(getattr(self, name) is None for name in limits):
            yield "`trainer.max_steps` must be given, or one of trainer.max_epochs, max_tokens, max_time: nothing would end the run."
        for name in ("max_steps", "max_epochs", "max_tokens", "val_check_interval", "limit_val_batches", "log_every_n_steps", "devices", "num_nodes"):
            value = getattr(self, name)
            low = 0 if name == "limit_val_batches" else 1
            if isinstance(value, int) and value < low:
                yield f"`trainer.{name}` must be at least {low}, but is {value} instead."
        for name in ("overfit_batches", "fast_dev_run", "gradient_clip_val", "max_skipped_steps", "max_divergent_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                yield f"`trainer.{name}` must be at least 0, but is {getattr(self, name)} instead."
        if self.max_time is not None and not re.fullmatch(r"\d+:\d{1,2}:\d{1,2}:\d{1,2}", self.max_time):
            yield f"`trainer.max_time` must be DD:HH:MM:SS, but is {self.max_time!r} instead. One hour: 00:01:00:00."


@dc.dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When checkpoints are written. The last step, an interrupt and a new best always write one as far as these allow."""

    every_n_steps: int = 200
    keep_last: int = 2  # the newest so many
    keep_best: int = 1  # and the best so many by validation loss
    keep_every_n_steps: int | None = None  # and those of every so many steps, for good
    async_: bool = False  # write while training goes on, from a copy in the processor's memory

    def check(self) -> Iterator[str]:
        for name, low in (("every_n_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < low:
                yield f"`save.{name}` must be at least {low}, but is {getattr(self, name)} instead."
        every = self.keep_every_n_steps
        if every is not None and (every < 1 or every % self.every_n_steps):
            yield f"`save.keep_every_n_steps` must be a multiple of save.every_n_steps ({self.every_n_steps}) or null, but is {every} instead."


@dc.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Continuations written at each validation: to the screen and to samples.txt."""

    prompts: tuple[str, ...] = ()  # empty: the first words of the first n validation documents
    n: int = 2
    max_new_tokens: int = 40
    temperature: float = 0.8

    def check(self) -> Iterator[str]:
        for name in ("n", "max_new_tokens", "temperature"):
            if getattr(self, name) < 0:
                yield f"`sample.{name}` must be at least 0, but is {getattr(self, name)} instead."


@dc.dataclass(frozen=True, kw_only=True)
class LayerStatsConfig:
    """Figures of each layer in metrics.csv and the loggers: gradient and weight norms, and of each mixture how even its load is."""

    every_n_steps: int | None = None  # in the row of every so many steps; null: never
    activations: bool = False  # also the root mean square of what each block puts out

    def check(self) -> Iterator[str]:
        if self.every_n_steps is None and self.activations:
            yield "`layer_stats.every_n_steps` must be given with layer_stats.activations=true."


@dc.dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: ModelConfig
    data: Any = axis("data")
    objective: Any = axis("objective")
    optimizer: Any = axis("optimizer")
    scheduler: Any = axis("scheduler")
    strategy: Any = axis("strategy")
    trainer: TrainerConfig
    save: SaveConfig
    ema: EMAConfig = dc.field(default_factory=EMAConfig)
    sample: SampleConfig
    layer_stats: LayerStatsConfig = dc.field(default_factory=LayerStatsConfig)
    logger: dict[str, Any]  # Lightning loggers by _target_
    callbacks: dict[str, Any]  # Lightning callbacks by _target_
    name: str = "default"  # part of the run's folder
    run_dir: str | None = None
    seed: int = 1337
    imports: tuple[str, ...] = ()
    init_from: str | None = None  # weights, architecture and tokenizer of a Hugging Face folder, an export, a run or a checkpoint
    resume: str = "auto"  # auto, never, or a run or checkpoint
    resume_allow: tuple[str, ...] = ()  # keys that may differ from those of the run that is continued
    fork: str | None = None  # a checkpoint or run whose weights, optimizer state and position this run starts from; it has a folder of its own
    verbosity: Literal["quiet", "normal", "verbose"] = "normal"  # of what is printed; metrics.csv is the same
    profile: bool = False  # write a trace of a few steps into the run's folder
    profile_steps: tuple[int, int] | None = None  # the first and the last of them; null: the fourth to the sixth of this start

    @property
    def seq_len(self) -> int:
        return int(self.data.seq_len or self.model.max_seq_len)

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Positions of one sample as the model reads it, at most: of the source, and of the target where there are two stacks."""
        if self.model.topology != "encoder_decoder":
            return self.seq_len, None
        source, target = self.objective.lengths(self.seq_len)
        return source, target

    @property
    def micro_batch_size(self) -> int:
        return int(self.data.micro_batch_size or self.data.global_batch_size)
