"""The LightningModule: one batch is one global step, one step is one optimizer update."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from txtrain.checkpoint.base import Base
from txtrain.checkpoint.format import LoadError
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.ground.convert import checked
from txtrain.hf.fit import Fit, fitted
from txtrain.hf.pieces import Source
from txtrain.model.config import ModelConfig
from txtrain.model.ffn import balancing
from txtrain.model.transform import transform
from txtrain.model.transformer import Transformer
from txtrain.monitor.layer_stats import LayerStats
from txtrain.objectives.base import ROWS, Batch, Objective, build_objective, by_metric
from txtrain.optim.average import Average
from txtrain.optim.groups import Groups, check_patterns, parameter_groups, set_rates
from txtrain.parallel.activation_checkpointing import wrap_blocks
from txtrain.parallel.build import make_parallel
from txtrain.parallel.one_process import OneProcess
from txtrain.registry import make
from txtrain.training.batches import add, cut, from_bits, is_filler, seed_everything
from txtrain.training.data_module import DataModule
from txtrain.training.limits import Limits
from txtrain.training.models_read import check_vocabularies, described, models_read, start_of

T = TypeVar("T")


def check_model(model: nn.Module | None, config: Train) -> None:
    """Check a model that was given. A module without our config is checked only by calling it.

    Raises:
        ConfigError: it is not a module, or its own config does not fit the objective and the data.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be a torch.nn.Module, but is {type(model).__name__} instead.")
    own = getattr(model, "config", None)
    if not isinstance(own, ModelConfig) or own == config.model:
        return
    checked(dc.replace(config, model=own), Train, "config")
    if own.vocab_size < config.model.vocab_size:
        asked = f"at least {config.model.vocab_size} tokens, config.model.vocab_size"
        raise ConfigError(f"`model` must have a vocabulary of {asked}, but has {own.vocab_size} instead.")
    if own.embedding.grid() is not None and (own.embedding, own.head) != (config.model.embedding, config.model.head):
        raise ConfigError("`model` must have the image embedding and the head of config.model, but has others.")


class LitModule(pl.LightningModule):
    """A model, an objective, an optimizer and a schedule, for `txtrain.train` or one's own lightning.Trainer.

    Its batches are those of `txtrain.DataModule`: this rank's share of one global batch, cut into micro-batches here.
    The trainer's own accumulation and clipping stay off. With a trainer of one's own, its `max_steps` ends the run,
    while the schedule follows the limits of `config.trainer`.

    Args:
        config: from `txtrain.compose`.
        model: trained as it is; by default config.model's, initialised from config.seed.
        parallel: the run's ranks, started; by default those of config.strategy.
        objective: by default config.objective's.
        weights: initial weights, read once the model is wrapped; by default it is initialised.
        read: the models that the objective reads; by default those that config.objective names.
        restored: all weights come from a checkpoint, so none is initialised.
        began: of a run that continues, what `starting_weights` recorded of it.

    Raises:
        ConfigError: config is not a valid configuration, or its objective cannot train the model.
    """

    def __init__(
        self,
        config: Train,
        model: nn.Module | None = None,
        parallel: OneProcess | None = None,
        objective: Objective | None = None,
        weights: Source | None = None,
        read: Mapping[str, Source] | None = None,
        restored: bool = False,
        began: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = checked(config, Train, "config")
        check_model(model, config)
        self.objective = objective or build_objective(config)
        self.parallel = parallel or make_parallel(config)
        self.model = model if model is not None else described(config)
        self.fit: Fit | None = None  # what became of the initial weights
        if weights is not None:
            weights, self.fit = fitted(weights, self.model, config.model, config.init_allow_missing)
            if lost := [name for name in (*self.fit.resized, *self.fit.initialised) if not config.keeps(name)]:
                owners = dict.fromkeys((*config.adapter.modules_to_save, *(n.rpartition(".")[0] for n in lost)))
                raise ConfigError(
                    f"`adapter.modules_to_save` must have all that init_from lacks or has in another shape, but lacks "
                    f"{lost[0]}: a checkpoint holds the adapter and these modules alone. "
                    f"Nearest: 'adapter.modules_to_save=[{','.join(owners)}]'."
                )
        self.weights, self._read = weights, models_read(config, self.parallel) if read is None else read
        for key, source in self._read.items():
            self.parallel.check_read(source.model.config, f"objective.{key}")
        check_vocabularies(config, self._read)
        needed = config.objective.reads_start
        self.start = start_of(config, self.model, self.parallel, weights, began) if needed else None
        if (key := config.objective.start) is not None and self.start is not None:
            if config.objective.resets:
                transform(self.start.model, config.transforms)
            self._read = {**self._read, key: self.start}
        transform(self.model, config.transforms)
        if isinstance(self.model, Transformer):
            self.model.prefix_prompts = config.objective.prefix_prompts
        named = list(self.model.named_parameters())
        check_patterns([name for name, _ in named], config.optimizer)
        self.frozen = frozenset(name for name, p in named if not p.requires_grad)  # parameters that are not trained
        self.n_params = sum(p.numel() for _, p in named)
        self.n_trained = sum(p.numel() for name, p in named if name not in self.frozen)
        self.base: Base | None = None  # what an adapter is added to
        self.step = 0  # completed updates; except for tensors, a run's state is a function of it
        self.skipped = self.skipped_in_a_row = 0  # steps whose loss or gradient was not finite
        self.val_metrics: dict[str, float] = {}  # of the latest validation
        self._token_bytes: Tensor | None = None
        self._val_names: tuple[str, ...] = ()  # of validation sets that have names
        self._sums: dict[str, float] = {}
        self._restored = restored
        self._is_set_up = False
        self._sums_of_sets: dict[int, dict[str, float]] = {}  # of each validation set, by its number
        self._rows: list[Tensor] = []  # of the validation so far: sample index, and the objective's ROWS

    @property
    def tokens(self) -> int:
        """Token positions trained on so far, over all ranks."""
        return self.samples * self.config.seq_len

    @property
    def samples(self) -> int:
        """Sequences trained on so far, over all ranks."""
        return self.step * int(self.config.data.global_batch_size)

    @property
    def _data(self) -> DataModule | None:
        """None where the trainer was given loaders, or a data module that is not ours."""
        given = getattr(self.trainer, "datamodule", None)
        return given if isinstance(given, DataModule) else None

    # ----------------------------------------------------------------------------------------------------------- set-up

    def setup(self, stage: str | None = None) -> None:
        """ConfigError if one's own trainer has other ranks than config.strategy: gradients would not be reduced."""
        if self.trainer.world_size != self.parallel.world.size:
            raise ConfigError(
                f"`trainer.devices` must be {self.parallel.world.size} in a lightning.Trainer of your own, "
                f"but it has {self.trainer.world_size} processes: use txtrain.train, or start the script with torchrun "
                "and one Trainer device."
            )
        self.plan(Limits.of(self.config, self._data.n_train if self._data else 0).steps)

    def plan(self, total_steps: int | None) -> None:
        """Fix the schedule for a run of so many steps.

        Raises:
            ConfigError: the schedule needs a number of steps and none is known.
        """
        self.schedule = make("scheduler", self.config.scheduler, total_steps=total_steps)

    def configure_model(self) -> None:
        """Wrap the model, allocate and initialise it, once; until then it has no storage."""
        if self._is_set_up:
            return
        self._is_set_up = True
        self.parallel.set_up(self.model, self.device)
        wrap_blocks(self.model, self.config.trainer.activation_checkpointing, self.config.trainer.compile)
        if any(p.is_meta for p in self.model.parameters()):
            seed_everything(self.config.seed)
            self.parallel.materialise(self.model, self.device, self._loaded())
        if self.weights is not None:
            self._reading("init_from", self.weights, lambda source: self.parallel.fill(self.model, source))
            self.weights = None
        if self._read:  # no submodules: neither trained nor saved
            self.objective.models = {
                key: self._reading(f"objective.{key}", source, self.lay) for key, source in self._read.items()
            }
        self.layers = LayerStats(self.config.layer_stats, self.model, self.parallel)
        self.model.train()  # Lightning leaves a module in the mode in which it finds it

    def lay(self, source: Source) -> Callable[..., Any]:
        """A further model, which is only read, over the ranks."""
        seed_everything(self.config.seed)  # for what the source lacks: the values that the trained model began with
        return self.parallel.lay_read_only(source, self.device)

    def _reading(self, key: str, source: Source, do: Callable[[Source], T]) -> T:
        """Read it and close its files.

        Raises:
            LoadError: they are gone: on network file systems a file that another machine removes cannot be held open.
        """
        try:
            return do(source)
        except OSError as e:
            again = "If its run has removed it, start again; or name one that stays, as an export does."
            raise LoadError(f"`{key}`: {source.path} cannot be read any more: {e}. {again}") from e
        finally:
            source.close()

    def _loaded(self) -> Collection[str]:
        """Names of the weights that are read and not initialised."""
        if self._restored:
            return self.model.state_dict().keys()
        return () if self.weights is None else self.weights.names

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.parallel.optimizer(
            self.model, make("optimizer", self.config.optimizer, params=self.parameter_groups())
        )
        self.average = Average(self.model, self.config.ema)
        return optimizer

    def parameter_groups(self) -> Groups:
        return parameter_groups(self.model.named_parameters(), self.config.optimizer)

    def on_fit_start(self) -> None:
        if data := self._data:
            self._val_names = data.val_names
            if data.token_bytes is not None:
                self._token_bytes = torch.as_tensor(data.token_bytes).to(self.device)
        self.objective.begin(self, self._data)

    # --------------------------------------------------------------------------------------------------------- training

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return from_bits(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One update. Returns the global batch's terms, the reported `loss`, and the gradient norm before clipping.

        A step whose loss or gradient is not finite changes neither weights nor optimizer state. It counts as a step, so
        that the schedule and the order of the data go on.
        """
        seed_everything(self.config.seed, self.step, self.parallel.rank)
        phases = self.parallel.phases
        batch = self.objective.step_batch(self, batch)
        counts = self.parallel.reduce(self.objective.denominators(batch))
        denominators = {name: n.clamp(min=1) for name, n in counts.items()}  # without a target a term is 0, not NaN
        model = balancing.Observed(self.parallel.forward(self.model))
        shares: list[dict[str, Tensor]] = []
        micro_batches = list(cut(batch, self.config.micro_batch_size))
        with self.layers.watch(self.step + 1):
            for i, micro_batch in enumerate(micro_batches, start=1):
                with self.parallel.micro_batch(self, last=i == len(micro_batches)):
                    terms = self.objective(model, micro_batch, denominators)
                    self.parallel.backward(self, model.total(self.objective, terms, micro_batch, denominators))
                shares.append(
                    {name: share.detach() for name, share in {**terms, "loss": self.objective.reported(terms)}.items()}
                )
        terms = self.parallel.reduce(add(shares))
        phases.enter("optimizer")
        torch.clear_autocast_cache()  # copies of the weights, which the update makes stale
        visits = self.parallel.reduce(model.counts)
        layers = self.layers.measure(self.step + 1, visits)
        norm = self.parallel.clip(self.model.parameters(), self.config.trainer.gradient_clip_val)
        # Loss and norm are equal on all ranks, so all take the same branch.
        if self.is_finite(norm + terms["loss"]):
            self._update(visits)
            self.skipped_in_a_row = 0
        else:
            self.parallel.discard(self.optimizers())
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.average.update(self.step + 1, self.skipped, made=False)
        self.step += 1
        return {**terms, "grad_norm": norm, **balancing.measured(visits), **layers}

    def is_finite(self, total: Tensor) -> bool:
        """Whether loss and gradient norm are finite. Waits for the device: bad values must not reach the weights."""
        return bool(torch.isfinite(total))

    def _update(self, visits: dict[str, Tensor]) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        set_rates(optimizer.optimizer, self.schedule(self.step + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balancing.update(self.model, visits)
        self.average.update(self.step + 1, self.skipped)

    # ------------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._sums_of_sets, self._rows = {}, []
        if self.config.ema.validate:
            self.average.swap_in()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Every rank makes the same number of forwards: one with fewer parts repeats its first sample, uncounted."""
        sums = self._sums_of_sets.setdefault(dataloader_idx, {})
        parts = [] if is_filler(batch) else list(cut(batch, self.config.micro_batch_size))
        for i in range(self.parallel.most(len(parts))):
            counts = i < len(parts)
            micro_batch = parts[i] if counts else {name: value[:1] for name, value in batch.items()}
            found = dict(self.objective.validate(self.model, micro_batch))
            if (rows := found.pop(ROWS, None)) is not None and counts:
                index = micro_batch.get("sample_index", torch.zeros(len(rows[0])))
                self._rows.append(torch.cat((index[:, None].double().cpu(), rows[0].double().cpu()), 1))
            for name, (value, n) in found.items():
                _add(sums, name, value, counts)
                _add(sums, f"{name}/n", n, counts)
            for name in self.config.metrics:
                value, n = by_metric(name, self.model, micro_batch).sum(0)
                _add(sums, name, value, counts)
                _add(sums, f"{name}/n", n, counts)
            ids = self.objective.target_ids(micro_batch)
            if ids is not None and self._token_bytes is not None:
                _add(sums, "bytes", self._token_bytes[ids].sum(), counts)

    def _gather_sums(self) -> None:
        """Sum over all ranks: each validation set, and all sets together."""
        here = {
            f"{number} {name}": value for number, sums in self._sums_of_sets.items() for name, value in sums.items()
        }
        everywhere = self.parallel.reduce(
            {key: torch.tensor(value, dtype=torch.float64, device=self.device) for key, value in here.items()}
        )
        self._sums = {}
        for key, value in everywhere.items():
            number, name = key.split(" ", 1)
            self._sums_of_sets[int(number)][name] = float(value)
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def on_validation_epoch_end(self) -> None:
        """val_loss (the mean over targets, not batches), the objective's metrics, perplexity, and bits per byte, which
        is comparable across tokenizers."""
        self._gather_sums()
        means = _means(self._sums)
        self.val_metrics = {"val_loss": self.objective.reported(means)}
        for number, name in enumerate(self._val_names):
            self.val_metrics[f"val_loss/{name}"] = self.objective.reported(_means(self._sums_of_sets[number]))
        self.val_metrics |= {f"val_{name}": means[name] for name in self.objective.terms if name in means}
        measured = *self.objective.metrics, *self.config.metrics
        self.val_metrics |= {name: means[name] for name in measured if name in means}
        if (rows := self._gathered_rows()) is not None:
            self.val_metrics |= self.objective.score(rows)
        if any(name not in self.val_metrics for name in self.objective.metrics):
            self.val_metrics |= self.objective.examine(self.model, self._data, self.config.micro_batch_size)
        if self.objective.perplexity:
            self.val_metrics["perplexity"] = math.exp(means["loss"]) if means["loss"] < 700 else math.inf
        if self._sums.get("bytes"):
            self.val_metrics["bits_per_byte"] = self._sums["loss"] / math.log(2) / self._sums["bytes"]
        self.val_metrics = self.parallel.first(lambda: self.val_metrics)  # decisions based on them must agree
        self.log_dict(self.val_metrics, logger=False)  # for callbacks that monitor one of them

    def _gathered_rows(self) -> NDArray[np.float64] | None:
        """The objective's ROWS of all ranks, in the order of the set; None if it gives none."""
        every = [rows for held in self.parallel.gathered(self._rows) for rows in held]
        if not every:
            return None
        table = torch.cat(every)
        return table[table[:, 0].argsort(stable=True), 1:].numpy()

    def on_validation_end(self) -> None:
        self.average.swap_out()


def _add(sums: dict[str, float], name: str, value: Tensor, counts: bool) -> None:
    sums[name] = sums.get(name, 0.0) + float(value) * counts  # a Python float: double precision on every device


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: value / max(sums[f"{name}/n"], 1.0) for name, value in sums.items() if f"{name}/n" in sums}


def starting_weights(module: LitModule) -> dict[str, str] | None:
    """What run.json says of the weights with which the run began, for an objective that reads them."""
    start = module.start
    return None if start is None or start.path == Path() else {"path": str(start.path), "sha256": start.identity()}
