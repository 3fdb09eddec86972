"""A trained model's metrics on a set, with intervals; on any number of ranks, each with a share of the rows."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint.base import is_folder
from txtrain.checkpoint.described import Described, describe, on_described
from txtrain.config.compatibility import fits
from txtrain.config.composed import Composed
from txtrain.config.of_checkpoint import fitted, of_checkpoint
from txtrain.config.schema_of_trained import OF_TASKS, Evaluate, OnTrained
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import OrderedSamples, Rows
from txtrain.data.sources.source import as_named, classified
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.convert import checked
from txtrain.model.transformer import Transformer
from txtrain.objectives.base import ROWS, Numbers, Objective, Statistics, build_objective, by_metric
from txtrain.parallel.build import make_parallel
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.world import World
from txtrain.registry import TABLE
from txtrain.training.batches import placed
from txtrain.training.data_module import DataModule
from txtrain.training.opened import trained_weights

HISTORY = "evaluations.jsonl"  # in a run's folder, a line for each evaluation
_DEFAULT = TABLE["objective"]["causal_lm"].config(type="causal_lm")  # of a configuration that names none
_CONFIDENCE = 0.95
_FEW = 20  # documents; below, their sequences are resampled
_MOST = 4096  # groups that are resampled; more documents than that are resampled by groups of neighbours
Parts = dict[str, list[tuple[Indices, Numbers]]]  # numbers of documents or rows, and their statistics
Tick = Callable[[int, int], None]  # called with rows done, and rows in all


@dc.dataclass(frozen=True)
class Figure:
    """A metric, the ends of its 95 % interval (None: there is none), and the documents or rows that it is of."""

    value: float
    low: float | None
    high: float | None
    n: int


@dc.dataclass(frozen=True)
class Evaluation:
    """What `txtrain.evaluate` returns.

    Attributes:
        metrics: by name; of a named set NAME also as METRIC/NAME.
        facts: what was evaluated on what.
    """

    metrics: dict[str, Figure]
    facts: dict[str, Any] = dc.field(default_factory=dict)

    def to_json(self) -> str:
        said = {name: {k: _finite(v) for k, v in dc.asdict(one).items()} for name, one in self.metrics.items()}
        return json.dumps({"metrics": said, **self.facts}, ensure_ascii=False)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None  # JSON has no NaN


@dc.dataclass(frozen=True)
class Reader:
    """A trained model that is laid over the ranks, and what is needed to read rows with it."""

    model: Any
    objective: Objective
    parallel: OneProcess
    device: torch.device
    token_bytes: Tensor | None
    tokenizer: Any
    size: int  # rows of a rank in a forward
    metrics: tuple[str, ...] = ()  # the user's own
    facts: Mapping[str, Any] = dc.field(default_factory=dict)  # of the weights, if they were read

    def statistics(self, rows: Rows, tick: Tick = lambda done, n: None) -> dict[str, Numbers]:
        """The statistics of each document, or of each row, if the objective tells no documents or they are few:
        [n, k], on all ranks the same. One without any is left out; names are the objective's.
        """
        documents: Parts = {}
        of_rows: Parts = {}
        for shares in shares_of(len(rows), self.size, self.parallel.size):
            index = shares[self.parallel.rank]
            with torch.no_grad(), self.parallel.autocast(self.device):
                made = self._of_shares(rows, shares)
            for name, values in made.items():
                of_row = values.cpu().numpy()[: len(index)]
                if of_row.ndim == 3:
                    documents.setdefault(name, []).append(_by_document(of_row, index, rows))
                    of_row = of_row.sum(1)
                of_rows.setdefault(name, []).append((index, of_row))
            tick(int(shares[0][0]) + sum(map(len, shares)), len(rows))
        if documents.keys() == of_rows.keys():
            found = self._gathered(documents)
            if len(next(iter(found.values()))) >= _FEW:
                return found
        return self._gathered(of_rows)

    def batch(self, rows: Rows, shares: Sequence[Indices], rank: int) -> dict[str, Tensor]:
        """That rank's batch: as many rows as of any, the first of all repeated behind its own."""
        batch = OrderedSamples(rows, 0).__getitems__(filled(shares, rank))
        del batch["sample_index"]
        return placed(batch, self.device, self.parallel.config)

    def _of_shares(self, rows: Rows, shares: Sequence[Indices]) -> Statistics:
        mine, objective = self.parallel.rank, self.objective
        found = objective.measure(self.model, self.batch(rows, shares, mine), self.token_bytes)
        if self.metrics:
            batch = self.batch(rows, shares, mine)
            found |= {name: by_metric(name, self.model, batch) for name in self.metrics}
        if not objective.decodes:
            return found
        # Where a forward is of all ranks together, all generate the same answers at the same time.
        for rank in [mine] if self.parallel.forwards_alone else range(self.parallel.size):
            made = objective.decode(self.model, self.batch(rows, shares, rank), self.tokenizer)
            found |= made if rank == mine else {}
        return found

    def _gathered(self, found: Parts) -> dict[str, Numbers]:
        mine = [np.zeros(0, dtype=np.int64), *(units for parts in found.values() for units, _ in parts)]
        known = np.unique(np.concatenate(self.parallel.of_all(np.unique(np.concatenate(mine)))))
        tables: dict[str, Tensor] = {}
        for name, parts in found.items():
            table = np.zeros((len(known), parts[0][1].shape[1]))  # not as long as the largest number: a file says it
            for units, values in parts:
                np.add.at(table, np.searchsorted(known, units), values)
            tables[name] = torch.from_numpy(table).to(self.device)
        everywhere = {name: table.cpu() for name, table in self.parallel.reduce(tables).items()}
        used = torch.zeros(len(known), dtype=torch.bool)
        for reduced in everywhere.values():
            used |= (reduced != 0).any(1)
        return {name: reduced[used].numpy() for name, reduced in everywhere.items()}


def filled(shares: Sequence[Indices], rank: int) -> list[int]:
    """A rank's share, as long as the first: the first row of all is repeated behind it."""
    return [*shares[rank].tolist(), *[int(shares[0][0])] * (len(shares[0]) - len(shares[rank]))]


def shares_of(n: int, size: int, n_ranks: int, begin: int = 0) -> Iterator[list[Indices]]:
    """Rows begin..n - 1 in order, by forwards of at most `size` rows a rank: of each the rows of every rank; of the
    last ranks fewer, or none."""
    for at in range(begin, n, size * n_ranks):
        rows = np.arange(at, min(at + size * n_ranks, n))
        width = -(-len(rows) // n_ranks)
        yield [rows[rank * width : (rank + 1) * width] for rank in range(n_ranks)]


def _by_document(values: Numbers, index: Indices, rows: Rows) -> tuple[Indices, Numbers]:
    """Numbers of the documents in rows and their statistics, from [n, D, k]."""
    pairs = [
        (unit, of_document) for documents, of_row in zip(rows.sources(index), values, strict=True)
        for unit, of_document in zip(documents, of_row, strict=False)  # beyond them is padding
    ]
    units = np.array([unit for unit, _ in pairs], dtype=np.int64)
    return units, np.stack([v for _, v in pairs]) if pairs else np.zeros((0, values.shape[-1]))


# ------------------------------------------------------------------------------------------------------------- figures


def figures(objective: Objective, statistics: Mapping[str, Numbers], n_bootstrap: int, seed: int) -> dict[str, Figure]:
    """The objective's metrics, and for each the 95 % interval of n_bootstrap sets of as many units, drawn with
    replacement (percentile bootstrap: Efron 1979; of ratios of sums, so each set is weighted as the whole is)."""
    tables = {name: table for name, table in statistics.items() if name != ROWS}
    values = objective.figures({name: table.sum(0) for name, table in tables.items()})
    n_of = {name: int((table[:, -1] > 0).sum()) for name, table in tables.items()}
    most = max(n_of.values(), default=0)
    drawn: dict[str, Numbers] = {}
    rng = np.random.default_rng(seed % 2**64)
    if n_bootstrap and most > 1:
        grouped = {name: _grouped(table) for name, table in tables.items()}
        n = len(next(iter(grouped.values())))
        weights = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap).astype(np.float64)
        drawn = objective.figures({name: weights @ table for name, table in grouped.items()})
    if (rows := statistics.get(ROWS)) is not None:
        values |= {name: np.asarray(value) for name, value in objective.score(rows).items()}
        if n_bootstrap and len(rows) > 1:
            made = [objective.score(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(n_bootstrap)]
            drawn |= {name: np.array([one[name] for one in made]) for name in made[0]}
    tail = (1 - _CONFIDENCE) / 2
    found = {}
    for name, value in values.items():
        some = name in drawn and not np.isnan(drawn[name]).all()  # no set has a correlation with a constant
        low, high = np.nanquantile(drawn[name], [tail, 1 - tail]).tolist() if some else (None, None)
        found[name] = Figure(float(value), low, high, n_of.get(name, most))
    return found


def _grouped(table: Numbers) -> Numbers:
    """At most _MOST groups of neighbours, by their sums."""
    if len(table) <= _MOST:
        return table
    return np.add.reduceat(table, np.arange(_MOST) * len(table) // _MOST, axis=0)


def of_sets(reader: Reader, sets: Mapping[str, Rows], n_bootstrap: int, seed: int, tick: Tick) -> dict[str, Figure]:
    """The metrics of all sets together, and of each that has a name."""
    tables = {name: reader.statistics(rows, tick) for name, rows in sets.items()}
    names = next(iter(tables.values()))
    every = {name: np.concatenate([table[name] for table in tables.values()]) for name in names}
    found = figures(reader.objective, every, n_bootstrap, seed)
    for name, table in tables.items():
        if name and len(tables) > 1:
            one = figures(reader.objective, table, n_bootstrap, seed)
            found |= {f"{metric}/{name}": figure for metric, figure in one.items()}
    return found


# ---------------------------------------------------------------------------------------------------------------- model


def evaluate(model_or_dir: nn.Module | str | os.PathLike[str], cfg: Evaluate) -> Evaluation:
    """A model's metrics on data, as `txtrain evaluate` gives them.

    Args:
        model_or_dir: a model, evaluated as it is on its device; or a run, a checkpoint, a folder of runs, an export or
            a Hugging Face folder, laid over the ranks as cfg.strategy says.
        cfg: of `txtrain.compose([...], verb="evaluate")`.

    Raises:
        ConfigError: the configuration, the data or the weights do not allow it.
    """
    checked(cfg, Evaluate, "cfg")
    if isinstance(model_or_dir, nn.Module):
        if not isinstance(model_or_dir, Transformer):
            what = "a model of txtrain.build_model or txtrain.load_pretrained, or a folder"
            raise ConfigError(f"`model` must be {what}, but is {type(model_or_dir).__name__} instead.")
        if cfg.weights != "model":
            raise ConfigError(f"`weights` must be model with a model, which has one set, but is {cfg.weights}.")
        if cfg.data.tokenizer == "train" and cfg.data.sample_kind != "images":
            raise ConfigError("`data.tokenizer` must be given with a model, which does not know its own.")
        cfg = fitted(cfg, model_or_dir.config)
        with reading(cfg, model_or_dir) as (reader, data):
            return measured(cfg, reader, data, {})
    found = describe(files.path_of(model_or_dir, "model_or_dir"))
    chosen = cfg.objective != _DEFAULT and fits(found.model, cfg.objective.type, cfg.data.sample_kind)
    given = [] if cfg.tasks else ["data", *(["objective"] if chosen else [])]
    job = of_checkpoint(Composed(cfg, {}, given), found)
    return run(dc.replace(job.config, checkpoint=str(found.path)))


def run(cfg: Evaluate, tick: Tick = lambda done, n: None) -> Evaluation:
    """The evaluation of cfg.checkpoint; writes what is to be written, on rank 0."""
    assert cfg.checkpoint is not None
    if cfg.out is not None:
        check_out(cfg.out, ".json")
    if cfg.tasks:
        if World.here().size > 1:  # of a launcher
            raise ConfigError(OF_TASKS)
        made = on_described(cfg.checkpoint, "checkpoint", lambda found: _tasks(cfg, found))
        _write(made, cfg)
        return made
    with reading(cfg) as (reader, data):
        made = measured(cfg, reader, data, reader.facts, tick)
        reader.parallel.first(lambda: _write(made, cfg))
    return made


def _tasks(cfg: Evaluate, found: Described) -> Evaluation:
    from txtrain.training.harness import of_tasks  # needs the extra `eval`

    facts = _facts(found.path)
    values = of_tasks(dc.replace(cfg, checkpoint=str(found.path)), found.tokenizer)
    by_name = {name: Figure(*of_one) for name, of_one in values.items()}
    return Evaluation(by_name, {**facts, "tasks": list(cfg.tasks), "seed": cfg.seed})


def _facts(path: Path) -> dict[str, Any]:
    """What is said of the weights at a path.

    Raises:
        ConfigError: as `_history`.
    """
    if is_folder(path):
        return {"checkpoint": str(path)}
    _history(path)
    return {"checkpoint": str(path), "step": checkpoint.read_state(path).step}


def measured(
    cfg: Evaluate, reader: Reader, data: DataModule, facts: Mapping[str, Any], tick: Tick = lambda done, n: None
) -> Evaluation:
    metrics = of_sets(reader, data.sets, cfg.n_bootstrap, cfg.seed, tick)
    return Evaluation(metrics, {
        **facts, "weights": cfg.weights, "data": data.source, "split": cfg.split, "fingerprint": data.fingerprint,
        "objective": cfg.objective.type, "n_samples": data.n_val, "skipped_rows": data.n_skipped,
        "seq_len": cfg.seq_len, "stride": cfg.stride, "precision": cfg.trainer.precision,
        "strategy": cfg.strategy.type, "n_bootstrap": cfg.n_bootstrap, "seed": cfg.seed,
    })


@contextlib.contextmanager
def reading(cfg: OnTrained, model: Transformer | None = None) -> Iterator[tuple[Reader, DataModule]]:
    """The model over the ranks, and the prepared data. model: read as it is; None: cfg.checkpoint's."""
    parallel = ranks_of(cfg)
    with parallel.started():
        device = parallel.device() if model is None else next(model.parameters()).device
        source, facts = trained_weights(cfg, parallel, _facts) if model is None else (None, {})
        settled = parallel.together(lambda: classified(as_named(cfg)))
        objective = build_objective(settled)
        data = DataModule(settled, "", objective)
        parallel.in_turn(data.prepare)
        parallel.agree({"the fingerprint of the data": data.fingerprint})
        was_training = model is not None and model.training
        callable_: Any = model
        if source is not None:
            callable_ = parallel.lay_read_only(source, device)
            source.close()
        sizes = None if data.token_bytes is None else torch.as_tensor(data.token_bytes).to(device)
        objective.meet(parallel, data.tokenizer)
        try:
            if model is not None:
                model.eval()
            size = cfg.micro_batch_size
            reader = Reader(callable_, objective, parallel, device, sizes, data.tokenizer, size, cfg.metrics, facts)
            yield reader, data
        finally:
            if model is not None:
                model.train(was_training)


def ranks_of(cfg: OnTrained) -> OneProcess:
    """The strategy's ranks, each of which reads as many rows at a time as one process: there is no batch to divide."""
    size = cfg.micro_batch_size
    data = dc.replace(cfg.data, micro_batch_size=size, global_batch_size=size * World.here().size)
    return make_parallel(dc.replace(cfg, data=data))


# --------------------------------------------------------------------------------------------------------------- result


def check_out(out: str, suffix: str) -> Path:
    """The file to write.

    Raises:
        ConfigError: it cannot be written, or has another suffix.
    """
    path = files.path_of(out, "out")
    if path.suffix != suffix or path.is_dir():
        near = path.with_suffix(suffix)
        raise ConfigError(f"`out` must be a {suffix} file, but is {out!r} instead. Nearest: {near}.")
    files.check_writable(path.parent, "out")
    return path


def _history(path: Path) -> Path | None:
    """Where the run of a checkpoint keeps its evaluations; None for a checkpoint outside of a run.

    Raises:
        ConfigError: as `check_folder`.
    """
    if path.parent.name != checkpoint.FOLDER:
        return None
    checkpoint.check_folder(path.parent.parent)
    return path.parent.parent / HISTORY


def _write(made: Evaluation, cfg: Evaluate) -> None:
    """To `out`, and as a line into the run's folder, if it can be written to: it may be another's."""
    history = _history(Path(made.facts["checkpoint"])) if "step" in made.facts else None
    if cfg.out is not None:
        out = files.path_of(cfg.out, "out")
        with files.writing(out.parent, "out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write(out, json.dumps(json.loads(made.to_json()), indent=2, ensure_ascii=False) + "\n")
    if history is not None:
        try:
            with open(history, "a", encoding="utf-8") as f:
                f.write(made.to_json() + "\n")
        except OSError as e:
            print(f"txtrain: {history} cannot be written: {e.strerror}. This evaluation is not in it.", file=sys.stderr)
