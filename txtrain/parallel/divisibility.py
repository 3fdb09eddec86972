"""What ranks that share a model must divide of it, as components declare (`txtrain.registry.Cut`). No torch."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from txtrain.model.component import Size
from txtrain.model.config import ModelConfig
from txtrain.registry import cut_of, resolve

SUBLAYERS = ("attention", "ffn")


def experts(model: ModelConfig) -> int | None:
    """How many each mixture has; None: there is none that can be divided by experts."""
    return int(model.ffn.n_experts) if "experts" in cut_of("ffn", model.ffn).values() else None


_COUNTED = (
    "`strategy` must be without tensor parallelism with {}, but has it: no rule cuts it, and its auxiliary loss would count in every process. "
    "Nearest: strategy=fsdp."
)


def sizes(model: ModelConfig) -> list[Size]:
    """What is divided."""
    components = [(axis, getattr(model, axis)) for axis in SUBLAYERS]
    return [size for axis, c in components if cut_of(axis, c) for size in c.divided(model)]


def shared_heads(model: ModelConfig) -> int:
    """Key-value heads of which several ranks may share one; 0: there are as many as query heads."""
    return next((size.value for size in model.attention.divided(model) if size.shared), 0)


def whole(model: ModelConfig) -> list[str]:
    """The chosen options, `model/axis=name`, that nothing divides: every rank computes them in full."""
    components = [(axis, getattr(model, axis)) for axis in SUBLAYERS]
    return [f"model/{axis}={c.type}" for axis, c in components if not cut_of(axis, c)]


def problems(model: ModelConfig, key: str, size: int, world: int) -> Iterator[str]:
    """What `size` of `world` processes (as `key` has it) cannot divide of a model: finished sentences."""
    fitting = [n for n in range(1, world + 1) if world % n == 0 and _leaves_rows(model, n) and all(s.fits(n) for s in sizes(model))]
    near = f"Nearest that the model and {world} processes allow: {', '.join(map(str, sorted(sorted(fitting, key=lambda n: (abs(n - size), n))[:2])))}."
    for s in sizes(model):
        if not s.fits(size):
            how = "divide, or be a multiple of," if s.shared else "divide"
            yield f"`{key}` must {how} {s.key} ({s.value}), but is {size} instead. {near}"
    kind = model.ffn.type
    if not cut_of("ffn", model.ffn) and "loss_scale" in signature(resolve("ffn", kind).forward).parameters:
        yield _COUNTED.format(f"model/ffn={kind}")
    if not _leaves_rows(model, size):
        yield f"`{key}` must leave each process a part of model.vocab_size ({model.vocab_size}), but is {size} instead. {near}"


def _leaves_rows(model: ModelConfig, size: int) -> bool:
    """Parts are of one size, rounded up, and the last ones smaller; none may be empty."""
    return not model.vocab_size or -(-model.vocab_size // size) * (size - 1) < model.vocab_size
