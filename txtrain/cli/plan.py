"""`txtrain plan`: the figures on the screen; with plan.simulate=true also those measured on the real model."""

from __future__ import annotations

import dataclasses as dc
import json
import os
from typing import Any

from txtrain.config.composed import Composed
from txtrain.config.schema import Train
from txtrain.config.schema_of_plan import Plan
from txtrain.config.units import in_units
from txtrain.data.sources.source import classified
from txtrain.errors import ConfigError, visible
from txtrain.ground.convert import checked
from txtrain.model.config import ModelConfig
from txtrain.monitor import start_screen
from txtrain.planning import figures
from txtrain.planning.figures import Figures
from txtrain.planning.memory.batch_shapes import unknown
from txtrain.planning.rollouts import Rollouts


def plan(config: Train) -> Figures:
    """Parameters, FLOPs, cache, steps, time and memory of what `train` would run, in closed form.

    config: with verb="plan" it names the hardware; for a `Train` the defaults of the group `plan` hold.

    Raises:
        ConfigError: it does not fit into plan.memory; or plan.simulate=true, and `train` would refuse the run.
    """
    config = classified(checked(config, Train, "config"))
    found = figures.plan(config)
    if not (isinstance(config, Plan) and config.plan.simulate):
        return found
    if found.refused:
        raise ConfigError(found.refused)
    if what := unknown(config):
        raise ConfigError(f"`plan.simulate` must be false here, but is true instead: {'; '.join(what)}.")
    from txtrain.training.simulate import simulate

    return dc.replace(found, memory_simulated=simulate(config, world=found.n_devices).peak)


def run_plan(job: Composed) -> int:
    """Print the figures. Exit code 0.

    Raises:
        ConfigError: as `plan` does; or `train` would refuse the tokenizer.
    """
    config: Plan = classified(job.config)
    found, tokenizer = plan(config), _tokenizer(config)
    if config.plan.format == "json":
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    head, *rest = lines(config, found, tokenizer)
    for line in (head, *map(_escaped, job.notes), *rest):
        console.print(visible(line))
    return 0


def lines(config: Train, f: Figures, tokenizer: list[tuple[str, str]]) -> list[str]:
    """The lines of the screen, in rich's markup."""
    model = config.model
    further = f.params_by_part.get("mtp", 0)
    beside = f", {start_screen.count(f.n_params - further)} of them without the MTP modules" if further else ""
    active = f", {start_screen.count(f.n_active_params)} active a token" if f.n_active_params < f.n_params else ""
    trained = f"; {start_screen.trained(f.n_trained_params, f.n_params)}" if f.n_trained_params < f.n_params else ""
    head = f"[bold]{f.model}[/]: {start_screen.count(f.n_params)} parameters{beside}{active}{trained}"
    sections = [
        _section("model", [*start_screen.axes(model).items(), *tokenizer]),
        _section("parts", _parts(f)),
        _section("FLOPs", _flops(f)),
        _section("cache", _cache(model, f)),
        _section(f"memory of {'the' if f.n_devices == 1 else 'each'} process", _memory(f)),
        *([_section("rollouts, estimated", _rollouts(f.rollouts))] if f.rollouts else []),
        _section("run", _run(config, f)),
    ]
    return [head, *(line for section in sections for line in section)]


def _tokenizer(config: Train) -> list[tuple[str, str]]:
    """Of one that is given and lies here; the data, by which it may be trained, are not read.

    Raises:
        ConfigError: it cannot be read, or has more tokens than the model.
    """
    name = config.data.tokenizer
    if name is None or name == "train" or not (name == "bytes" or os.path.lexists(os.path.expanduser(name))):
        return []
    from txtrain.data.fitted_tokenizer import fitted
    from txtrain.data.tokenizer.load import load_tokenizer

    tokenizer = fitted(load_tokenizer(name), name, config)
    return [("tokenizer", start_screen.vocabulary(config, tokenizer.vocab_size))]


def _section(title: str, rows: Any) -> list[str]:
    return ["", f"[bold cyan]{title}[/]", *(f"  {name.replace('_', ' '):<20}{_escaped(text)}" for name, text in rows)]


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _parts(f: Figures) -> list[tuple[str, str]]:
    """Parameters of each part, and its FLOPs in the forward pass of one sample."""

    def row(params: int, work: float, trained: int | None = None) -> str:
        shown = (f"{params:,}", f"{params / f.n_params:.1%}") if params else ("", "")
        done = (flops(work), f"{work / whole:.1%}") if work else ("", "")
        learned = "" if not frozen else f"{'' if trained is None else f'{trained:,}':>18}"
        return f"{shown[0]:>18}{shown[1]:>8}{learned}{done[0]:>16}{done[1]:>8}".rstrip()

    whole, frozen = sum(f.flops_by_part.values()), f.n_trained_params < f.n_params
    names = dict.fromkeys((*f.params_by_part, *f.flops_by_part))
    params, work, trained = f.params_by_part, f.flops_by_part, f.trained_by_part
    rows = [
        (name, row(n := params.get(name, 0), work.get(name, 0.0), trained.get(name, 0) if n else None))
        for name in names
    ]
    title = f"{'parameters':>18}{'':8}{'trained' if frozen else '':>{18 * frozen}}{'forward, ' + a(f.sample):>24}"
    rows = [("", title), *rows, ("in all", row(f.n_params, whole, f.n_trained_params))]
    return [*rows, ("active", row(f.n_active_params, 0.0))] if f.n_active_params < f.n_params else rows


def _flops(f: Figures) -> list[tuple[str, str]]:
    lengths = (
        f"{f.seq_len} tokens"
        if f.target_len is None else f"{f.seq_len} tokens of the source and {f.target_len} of the target"
    )
    lengths = f"{f.seq_len} positions" if f.sample == "image" else lengths
    rows = [(a(f.sample), f"{flops(f.flops_per_sample)} forward and backward, of {lengths}")]
    if f.sample != "image":
        rows.append(
            ("a token", f"{flops(f.forward_flops_per_token)} forward, {flops(f.flops_per_token)} forward and backward")
        )
    return [*rows, *([("not stated", f.flops_missing)] if f.flops_missing else [])]


def _cache(model: ModelConfig, f: Figures) -> list[tuple[str, str]]:
    if not f.cache_bytes_per_token:
        return [("none", "an encoder reads all at once")]
    length = f.target_len or f.seq_len
    beside = f", and a source of {f.seq_len}" if f.target_len else ""
    windows = [w for i in range(model.n_layers) if (w := model.attention.window_at(i))]
    rows = [
        ("a token", f"{size(f.cache_bytes_per_token)} in {f.cache_dtype}"),
        (f"{length} tokens", f"{size(f.cache_bytes)}{beside}"),
        *([("not stated", f.cache_missing)] if f.cache_missing else []),
    ]
    if windows:
        rows.append(("windows", f"{len(windows)} of {model.n_layers} layers hold {max(windows) - 1:,} tokens at most"))
    return rows


def _run(config: Train, f: Figures) -> list[tuple[str, str]]:
    n, what = f.global_batch_size, {"image": "images", "pair": "pairs"}.get(f.sample, "sequences")
    rows = [
        ("step", f"{n:,} {what}" if f.sample == "image" else f"{n:,} {what} x {f.seq_len} = {n * f.seq_len:,} tokens")
    ]
    if f.steps is None or f.tokens is None or f.flops is None or f.seconds is None:
        return [*rows, ("steps", "unknown without the data (max_epochs). Give trainer.max_steps or max_tokens.")]
    left_out = "; trainer.max_epochs needs the data: not counted" if config.trainer.max_epochs is not None else ""
    seen = (
        start_screen.count(f.steps * n)
        if f.sample == "image" else f"{start_screen.count(f.tokens)}, {f.tokens / f.n_params:.3g} a parameter"
    )
    devices = f.device if f.n_devices == 1 else f"{f.n_devices:,} x {f.device}"
    return [
        *rows,
        ("steps", f"{f.steps:,} ({f.limited_by}{left_out})"),
        ("images" if f.sample == "image" else "tokens", seen),
        ("compute", flops(f.flops)),
        ("time", f"{duration(f.seconds)} on {devices} at {f.mfu:.0%} of {flops(f.peak_flops)}/s "
                 f"({config.trainer.precision}); {'training and rollouts' if f.rollouts else 'training'} only"),
    ]


def _rollouts(r: Rollouts) -> list[tuple[str, str]]:
    each, serves = r.n_completions // r.n_prompts, f"for {r.updates:,} update{'s' if r.updates > 1 else ''}"
    long = f"of {r.max_new_tokens:,} tokens, the most that there can be"
    parts = f"decoding {duration(r.decode_seconds)}, log-probabilities {duration(r.forward_seconds)}"
    return [
        ("completions", f"{r.n_completions:,}, {each:,} of each of {r.n_prompts:,} prompts, {long}; {serves}"),
        ("cache", f"{size(r.cache_bytes)} a process, {r.rows:,} rows together"),
        ("time", f"{duration(r.seconds)}: {parts}; rewards and exchanges between processes not counted"),
        ("an update", duration(r.update_seconds)),
    ]


def _memory(f: Figures) -> list[tuple[str, str]]:
    if f.memory is None:
        rows = [("not counted", f.memory_missing or "")]
    else:
        rows = [("train refuses", f.refused)] if f.refused else []
        rows += [
            (name, f"{size(n):>12}{n / f.memory:>8.1%}")
            for name, n in sorted(f.memory_by_part.items(), key=lambda row: -row[1])
        ]
        when = f"at the fullest moment of a step of micro-batches of {f.micro_batch_size}"
        rows.append(("in all", f"{size(f.memory):>12}{'':8}  {when}"))
        if f.memory_of_host:
            parts = ", ".join(f"{name} {size(n)}" for name, n in f.memory_of_host_by_part.items())
            rows.append(("in host memory", f"{size(f.memory_of_host):>12}{'':8}  {parts}"))
    if f.memory_simulated is not None:
        how = "the real model without storage, with the CPU's kernels"
        rows.append(("simulated", f"{size(f.memory_simulated):>12}{'':8}  {how}"))
    if f.largest_micro_batch_size is not None:
        rows.append(("largest micro-batch", f"{f.largest_micro_batch_size:>12,}"))
    return [*rows, *((f"{name}, a step", f"{size(n):>12}") for name, n in f.communicated.items())]


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def duration(seconds: float) -> str:
    """`61 d 16 h`; below two days as the start screen; `0.31 s`."""
    hours = round(seconds / 3600)
    if seconds < 10:
        return f"{seconds:.2g} s"
    return start_screen.duration(seconds) if hours < 48 else f"{hours // 24:,} d {hours % 24:02d} h"


def flops(n: float) -> str:
    """`5.3 GFLOP`, `1.2 EFLOP`; beyond that in powers of ten."""
    units = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))
    return (None if n >= 999.5e18 else in_units(n, units)) or f"{n:.3g} FLOP"


def size(n: float) -> str:
    """`68.6 KiB`."""
    return in_units(n, ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))) or f"{n} B"
