"""`state.json`, a checkpoint's state of the run, as a frozen object; and the state in its shards' headers. No torch."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from txtrain.data.store.stream_position import WIDTH, is_position
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import check_keys, parse_json, read_json
from txtrain.hf.tensor_names import CHECKSUMS

FORMAT = 2  # of state.json and run.json. Absent, 1: 0.1.0. 2: checkpoints have an id and checksums
_MOST = 10**15  # for any count


@dc.dataclass(frozen=True, kw_only=True)
class LossState:
    """What `monitor.loss_spikes` has seen of the losses.

    Attributes:
        window: the latest losses.
        first: the highest of the first steps.
        lowest: the lowest median so far.
        far_off: number of steps in a row that were far above it.
    """

    window: list[float] = dc.field(default_factory=list)
    first: float | None = None
    lowest: float | None = None
    n_spikes: int = 0
    far_off: int = 0
    in_spike: bool = False


class NewerFormat(ConfigError):
    """A file of a newer format: it is not damaged, and an older checkpoint is no remedy."""


@dc.dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run after a step.

    Attributes:
        step: completed updates. tokens, samples: trained on so far, over all ranks.
        seconds: of training, over all starts; times: their sums by phase.
        data_order_hash: of the samples of steps 1..step. data_fingerprint: of contents, tokenizer and packing.
        stream_position: where the next step of a streamed set is read from (`data.store.stream.positions`).
        samples_size: bytes of samples.txt.
        metrics: val_loss and the metric of save.keep_best, if this step was validated.
        stopping: of trainer.stop_after: the best value so far, and the number of values since then; None: none yet.
        weights_only: the checkpoint has no state of the optimizer (save.weights_only_last).
        open_row: the row of a step whose validation was cut short by an interrupt.
        save_seconds: the longest save so far.
        skipped: steps that were not finite: in all, and the latest in a row.
        id: of the checkpoint, also in the headers of its shards; empty in those of 0.1.0.
        rows: number of rows of metrics.csv so far, and rows_hash: their checksum; None and empty: unknown.
        averaged: whether the average of the weights has begun; None: unknown.
        optimizer: numbers of the optimizer's state that are not tensors, by parameter and name.
    """

    format: int = FORMAT
    step: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    losses: LossState = dc.field(default_factory=LossState)
    times: dict[str, float] = dc.field(default_factory=dict)
    data_order_hash: str = ""
    data_fingerprint: str = ""
    stream_position: list[int] | None = None
    samples_size: int = 0
    metrics: dict[str, float] = dc.field(default_factory=dict)
    open_row: dict[str, float | None] | None = None
    save_seconds: float | None = None
    skipped: tuple[int, int] = (0, 0)
    id: str = ""
    rows: int | None = None
    rows_hash: str = ""
    averaged: bool | None = None
    optimizer: dict[str, float | bool] = dc.field(default_factory=dict)
    stopping: list[float] | None = None
    weights_only: bool = False

    @property
    def val_loss(self) -> float | None:
        return self.metrics.get("val_loss")

    def to_json(self) -> str:
        return json.dumps(dc.asdict(self), indent=1)


def read_state(file: Path) -> RunState:
    """The state in a state.json.

    Raises:
        ConfigError: a key is missing or of another type, a number is no count, or the format is newer.
    """
    raw = read_json(file, finite=False)
    check_format(raw, file)
    where = str(file)
    defaults = (
        "format", "losses", "save_seconds", "skipped", "times", "optimizer", "id", "rows", "rows_hash", "weights_only",
        "averaged",
    )
    kinds = _kinds(RunState) | {"losses": dict | None, "skipped": list[int] | None}
    check_keys(raw, where, {key: kind | None if key in defaults else kind for key, kind in kinds.items()})
    losses = raw.get("losses") or {}
    check_keys(losses, f"{where}: losses", {key: kind | None for key, kind in _kinds(LossState).items()})
    skipped, position = raw.get("skipped") or [0, 0], raw.get("stream_position")
    counts = [
        raw["step"], raw["tokens"], raw["samples"], raw["samples_size"], *skipped, *(position or ()),
        raw.get("rows") or 0,
    ]
    sound = len(skipped) == 2 and (position is None or is_position(position))
    if not sound or not all(0 <= n < _MOST for n in counts):
        raise ConfigError(
            f"{where}: `step`, `tokens`, `samples`, `samples_size`, `skipped` (2), `stream_position` ({WIDTH} for each "
            f"reader) and `rows` must be counts, but are {counts}."
        )
    given = {key: value for key, value in raw.items() if key in kinds and value is not None}
    return RunState(
        **given
        | {"format": FORMAT, "losses": LossState(**_known(LossState, losses)), "skipped": (skipped[0], skipped[1])}
    )


@dc.dataclass(frozen=True, kw_only=True)
class ShardState:
    """The checkpoint that a shard belongs to. checksums: by tensor. All empty in 0.1.0."""

    id: str = ""
    step: int = 0
    checksums: dict[str, str] = dc.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dc.asdict(self))

    @classmethod
    def of(cls, metadata: Any, where: str) -> ShardState:
        """From the metadata of a header. where: what an error calls it.

        Raises:
            ConfigError: they are damaged.
        """
        text = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
        if text is None:
            return cls()
        said = parse_json(str(text), where)
        check_keys(said, where, _kinds(ShardState))
        return cls(**_known(cls, said))


def check_format(raw: Mapping[str, Any], file: Path) -> None:
    """Raise NewerFormat if this version does not know the file's format."""
    check_keys(raw, str(file), {"format": int | None})
    number = FORMAT if raw.get("format") is None else raw["format"]
    if not 1 <= number <= FORMAT:
        raise NewerFormat(
            f"{file}: `format` must be at most {FORMAT} for this version of txtrain, but is {number} instead: "
            "a newer version wrote it."
        )


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _known(cls: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dc.fields(cls)}
    return {key: value for key, value in raw.items() if key in names and value is not None}
