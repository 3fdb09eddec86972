"""The screen at the start of a run, as lines of text, and the formats of numbers."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from txtrain.config.schema import Train
from txtrain.config.units import in_units
from txtrain.ground.slurm import Job
from txtrain.ground.unknown_keys import written
from txtrain.model.config import ModelConfig

if TYPE_CHECKING:
    from txtrain.checkpoint.run_folder import RunFolder
    from txtrain.data.tokenizer.tokenizer import Tokenizer

_NAMED = 6  # tensors in a line
_ROUNDED = 0.9  # a tokenizer with this share of the model's tokens, or more, fills it
_UNCOUNTED = 1 << 40  # more samples than this: a stream
Grafts = Mapping[str, Mapping[str, Any]]


class Data(Protocol):
    """The part of a prepared `txtrain.DataModule` that is shown."""

    source: str
    tokenizer: Tokenizer | None
    n_train: int
    n_val: int


def restarted(place: RunFolder | None) -> list[str]:
    """A warning if SLURM has restarted the job and there is no checkpoint to continue from."""
    job = Job.here()
    if place is None or job is None or job.restarts == 0 or place.checkpoint is not None:
        return []
    start = "starts at step 0" if place.parent is None else f"is forked from {place.parent} again"
    return [
        f"SLURM restart {job.restarts} of job {job.number}, and {place.path} has no complete checkpoint: "
        f"the run {start}."
    ]


def opening(config: Train, fallback: str | None) -> list[str]:
    """The first line of a run: its size and those of the family's published models; then a warning of stand-in data."""
    model = config.model
    published = ", ".join(f"{name} {count(n)}" for name, n in model.published.items())
    size = "laptop size" if model.preset == model.family else f"size {model.size}"
    first = f"{model.family}, {size}: {count(model.n_params)} parameters" + (
        f"; published: {published}" if published else ""
    )
    loud = (
        f"STAND-IN DATA: {fallback}. This run trains on data={config.data.type} instead. "
        "For the real set: data.path=, or a hub."
    )
    return [first] if fallback is None else [first, loud]


def table(
    config: Train,
    data: Data,
    steps: int | None,
    machine: object,
    place: RunFolder | None,
    grafts: Grafts,
    strategy: str,
    parameters: tuple[int, int],
    weights: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """The rest of the start screen: names and values.

    data: prepared. parameters: numbers of trained and of all. weights: where they come from, as `weights` tells it.
    """
    trainer = config.trainer
    done = 0 if place is None else place.first_step
    whole = config.adapter.whole(config.model)
    return [
        *axes(config.model).items(),
        *(("graft", text) for text in graft_lines(config.model, grafts)),
        *(("weights", text) for text in weights),
        *([("adapter", f"{_option(config.adapter)}; of {config.init_from}")] if config.adapter.alone else []),
        *([("whole", f"{', '.join(whole)}: trained and saved beside the adapter")] if whole else []),
        *([("trained", trained(*parameters))] if parameters[0] < parameters[1] else []),
        ("data", f"{data.source}; {_number(data.n_train)} training and {data.n_val:,} validation {samples(config)}"),
        ("tokenizer", "none" if data.tokenizer is None else vocabulary(config, data.tokenizer.vocab_size)),
        ("step", batch(config)),
        ("in all", budget(config, steps, data.n_train) + (f"; continues after step {done}" if done else "")),
        ("device", f"{machine}"),
        ("strategy", strategy),
        ("precision", trainer.precision + (", compiled" if trainer.compile else "")),
        ("folder", "none: trainer.fast_dev_run writes nothing" if place is None else str(place.path)),
    ]


def weights(record: Mapping[str, Any]) -> list[str]:
    """Of the entry `init_from` in run.json: `runs/a/b, step_00000100, sha256 1f3c...: 21 tensors`, and what differs."""
    where = record["given"] if record["checkpoint"] is None else f"{record['given']}, {record['checkpoint']}"
    names = {f"{key}: ": list(record[key]) for key in ("initialised", "skipped")}
    names["resized: "] = [f"{name} {there} -> {here}" for name, (there, here) in record["resized"].items()]
    return [
        f"{where}, sha256 {record['sha256'][:12]}...: {len(record['loaded'])} tensors",
        *(what + _listed(found) for what, found in names.items() if found),
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more, in run.json" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def trained(n: int, of: int) -> str:
    """`1.2 M of 5.3 M parameters trained`."""
    return f"{count(n)} of {count(of)} parameters trained"


def _number(n_train: int) -> str:
    return "endless" if n_train > _UNCOUNTED else f"{n_train:,}"


def samples(config: Train) -> str:
    """`sequences of 256 tokens`, or the like for other kinds of data."""
    kinds = {
        "pairs": f"pairs of at most {config.seq_len} tokens a side",
        "labels": f"texts of at most {config.seq_len} tokens",
        "images": f"images in {config.seq_len} positions",
    }
    return kinds.get(config.data.sample_kind, f"sequences of {config.seq_len} tokens")


def batch(config: Train) -> str:
    """`8 sequences x 256 = 2,048 tokens: 2 micro-batches of 4`."""
    size, micro = config.data.global_batch_size, config.micro_batch_size
    parts = f": {size // micro} micro-batches of {micro}" if micro < size else ""
    return f"{size} sequences x {config.seq_len} = {size * config.seq_len:,} tokens{parts}"


def budget(config: Train, steps: int | None, n_train: int) -> str:
    """`600 steps, 1.23 M tokens, 0.42 epochs`."""
    time = [] if config.trainer.max_time is None else [f"at most {config.trainer.max_time} (DD:HH:MM:SS)"]
    if steps is None:
        return time[0]
    samples = steps * config.data.global_batch_size
    epochs = [] if n_train > _UNCOUNTED else [f"{samples / n_train:.2f} epochs"]
    return ", ".join([f"{steps:,} steps", f"{count(samples * config.seq_len)} tokens", *epochs, *time])


def vocabulary(config: Train, n: int) -> str:
    """`bytes, 257 tokens`; where the model has many more, what they cost. A few more are a table rounded up."""
    model, told = config.model, f"{config.data.tokenizer or config.data.path}, {n:,} tokens"
    if n >= _ROUNDED * model.vocab_size:
        return told
    idle = model.n_params - dc.replace(model, vocab_size=n).n_params
    fewer = f": model.vocab_size={n} leaves them out" if config.init_from is None else ""
    return (
        f"{told} of the model's {model.vocab_size:,}; {idle:,} parameters ({idle / model.n_params:.0%}) are of the "
        f"others{fewer}"
    )


def axes(model: ModelConfig) -> dict[str, str]:
    """For each axis the chosen option and its knobs that are not at their defaults."""
    shown = {
        "shape": f"{model.n_layers} layers, dim {model.dim}, {model.n_heads} heads, vocabulary {model.vocab_size:,}"
    }
    for name, component in model.components():
        shown[name.replace("_", " ")] = _option(component)
    return shown


def _option(component: Any) -> str:
    """Its name, and its knobs that are not at their defaults."""
    knobs = [
        f"{f.name}={_value(getattr(component, f.name))}" for f in dc.fields(component)
        if f.name != "type" and getattr(component, f.name) != f.default
    ]
    return ", ".join([component.type, *knobs])


def graft_lines(model: ModelConfig, grafts: Grafts) -> list[str]:
    """`attention: gqa -> mqa; kept window=64; dropped n_kv_heads=2`, and their effect on the number of parameters."""
    if not grafts:
        return []
    told = []
    for name, graft in grafts.items():
        values = {
            what: ", ".join(f"{k}={_value(v)}" for k, v in (graft.get(what) or {}).items())
            for what in ("kept", "dropped")
        }
        told.append(
            f"{name}: {graft['from']} -> {graft['to']}"
            + "".join(f"; {what} {text}" for what, text in values.items() if text)
        )
    before = _unmodified(model, grafts).n_params
    change = model.n_params - before
    return [
        *told,
        f"{change:+,} parameters ({change / before:+.1%}) to {model.family} of this shape "
        f"without {'it' if len(grafts) == 1 else 'them'}",
    ]


def _unmodified(model: ModelConfig, grafts: Grafts) -> ModelConfig:
    """The model with the family's own options on the grafted axes."""
    from txtrain.config.compose import compose_job
    from txtrain.config.loader import make_loader
    from txtrain.config.overrides import parse
    from txtrain.config.paths import families

    known = model.preset if model.preset in families() else model.family  # weights of a folder have a size of their own
    own: ModelConfig = compose_job("train", Train, parse([f"model={known}"]), make_loader())[0].config.model
    return dc.replace(model, **{axis: getattr(own, axis) for axis in grafts})


def _value(value: object) -> str:
    if dc.is_dataclass(value):
        return (
            "{"
            + ", ".join(f"{f.name}={_value(v)}" for f in dc.fields(value) if (v := getattr(value, f.name)) != f.default)
            + "}"
        )
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_value, value)) + "]"
    return written(value)


def count(n: float) -> str:
    """`5.3 M`, `7.24 B`."""
    return in_units(n, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))) or f"{n:,}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `20 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
