"""The training values that a published size brings from its paper (conf/training). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from txtrain.config.schema import Train
from txtrain.ground.convert import flat, plain
from txtrain.ground.unknown_keys import written

_MULTIPLE = 8  # of which batches are, so that as many ranks can share one
_BATCH = "data.global_batch_size"


def sequences(n_tokens: int, *, _root_: DictConfig) -> int:
    """`${sequences:N}` in a YAML file: the sequences in about N tokens, at the configuration's length."""
    lengths = (OmegaConf.select(_root_, key) for key in ("data.seq_len", "model.max_seq_len"))
    # a length that is no number is refused by its name later
    return _of(n_tokens, next((n for n in lengths if type(n) is int and n > 0), 1))


def _of(n_tokens: int, length: int) -> int:
    return round(n_tokens / length / _MULTIPLE) * _MULTIPLE or max(1, round(n_tokens / length))


def sentence(config: Train, published: Mapping[str, Any]) -> str:
    """What a run takes from its model's paper, and what of it was given otherwise, for the start screen and `plan`.

    published: `file` of conf/training, and its `values` by group.
    """
    now = flat(plain(config))
    papers = flat(published["values"])
    if isinstance(tokens := papers.get(_BATCH), str):
        papers[_BATCH] = _of(int(tokens.partition(":")[2].rstrip("}")), config.seq_len)
    other = [
        f"{key}={written(now[key])} (published: {written(value)})"
        for key, value in papers.items() if key in now and now[key] != value
    ]
    whose = f"training values of the published {config.model.preset} (conf/{published['file']}.yaml)"
    return f"{whose}: {', '.join(_values(config))}" + (f"; not {', '.join(other)}." if other else ".")


def _values(config: Train) -> Iterator[str]:
    optimizer, scheduler, trainer, n = config.optimizer, config.scheduler, config.trainer, config.data.global_batch_size
    yield f"{optimizer.type} at {optimizer.lr:.3g}"
    yield f"weight decay {optimizer.weight_decay:g}"
    yield f"{scheduler.type} after {scheduler.warmup_steps:,} steps of warm-up"
    unit = "images" if config.data.kind == "images" else f"x {config.seq_len:,} = {n * config.seq_len:,} tokens"
    yield f"{n:,} {unit} a step"
    yield "no clipping" if trainer.gradient_clip_val is None else f"clipped at {trainer.gradient_clip_val:g}"
    yield trainer.precision
