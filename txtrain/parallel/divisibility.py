"""Numbers of a model that its ranks must divide, as components declare (`txtrain.registry.Cut`). No torch."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from txtrain.model.component import Size
from txtrain.model.config import ModelConfig
from txtrain.registry import cut_of, resolve

SUBLAYERS = ("attention", "ffn")


def experts(model: ModelConfig) -> int | None:
    """Experts of each mixture; None: nothing can be divided by experts."""
    return int(model.ffn.n_experts) if "experts" in cut_of("ffn", model.ffn).values() else None


def sizes(model: ModelConfig) -> list[Size]:
    """The numbers that are divided."""
    components = [(axis, getattr(model, axis)) for axis in SUBLAYERS]
    return [size for axis, c in components if cut_of(axis, c) for size in c.divided(model)]


def shared_heads(model: ModelConfig) -> int:
    """Key-value heads of which several ranks may share one; 0: as many as query heads."""
    return next((size.value for size in model.attention.divided(model) if size.shared), 0)


def whole(model: ModelConfig) -> list[str]:
    """The chosen options, `model/axis=name`, that every rank computes in full."""
    components = [(axis, getattr(model, axis)) for axis in SUBLAYERS]
    return [f"model/{axis}={c.type}" for axis, c in components if not cut_of(axis, c)]


def problems(model: ModelConfig, key: str, size: int, world: int) -> Iterator[str]:
    """Why `size` (the value of `key`) of `world` ranks cannot share a model, as sentences."""
    divided = sizes(model)
    fitting = [n for n in range(1, world + 1) if world % n == 0 and all(s.fits(n) for s in divided)]
    fitting = sorted((n for n in fitting if _leaves_rows(model, n)), key=lambda n: (abs(n - size), n))
    near = f"Nearest that the model and {world} ranks allow: {', '.join(map(str, sorted(fitting[:2])))}."
    for s in divided:
        if not s.fits(size):
            how = "divide, or be a multiple of," if s.shared else "divide"
            yield f"`{key}` must {how} {s.key} ({s.value}), but is {size} instead. {near}"
    kind = model.ffn.type
    if not cut_of("ffn", model.ffn) and "loss_scale" in signature(resolve("ffn", kind).forward).parameters:
        why = "no rule cuts it, and its auxiliary loss would count on every rank"
        given = f"without tensor parallelism with model/ffn={kind}, but has it"
        yield f"`strategy` must be {given}: {why}. Nearest: strategy=fsdp."
    if not _leaves_rows(model, size):
        part = f"a part of model.vocab_size ({model.vocab_size})"
        yield f"`{key}` must leave each rank {part}, but is {size} instead. {near}"


def _leaves_rows(model: ModelConfig, size: int) -> bool:
    """Whether no rank is empty, with parts of one size, rounded up, and smaller last ones."""
    return not model.vocab_size or -(-model.vocab_size // size) * (size - 1) < model.vocab_size
