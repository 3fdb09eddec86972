"""What is divided over processes, told of a configuration by component type, as tensor_parallel.py and expert_parallel.py divide modules by type. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from txtrain.model.config import ModelConfig
from txtrain.registry import TABLE, resolve


class Size(NamedTuple):
    """A number that each process takes an equal part of, and the key that sets it. shared: or that as many processes share one of."""

    key: str
    value: int
    shared: bool = False

    def fits(self, size: int) -> bool:
        return self.value % size == 0 or (self.shared and size % self.value == 0)


def _multi_head(model: ModelConfig, attention: Any) -> Iterator[Size]:
    n_heads, n_kv_heads, _ = attention.heads(model)
    yield Size("model.n_heads", n_heads)
    if n_kv_heads != n_heads:
        yield Size("model.attention.n_kv_heads", n_kv_heads, shared=True)


def _latent(model: ModelConfig, attention: Any) -> Iterator[Size]:
    yield Size("model.n_heads", model.n_heads)


def _feed_forward(model: ModelConfig, ffn: Any) -> Iterator[Size]:
    yield Size("model.ffn.hidden_dim", ffn.width(model))


def _mixture(model: ModelConfig, ffn: Any) -> Iterator[Size]:
    yield Size("model.ffn.hidden_dim", ffn.width(model))
    if ffn.dense_layers:
        yield Size("model.ffn.dense_hidden_dim", ffn.dense_width(model))


MIXTURE = "txtrain.model.ffn.moe:feed_forward"
CUT: dict[str, Callable[[ModelConfig, Any], Iterator[Size]]] = {
    "txtrain.model.attention.multi_head:MultiHeadAttention": _multi_head,
    "txtrain.model.attention.latent:LatentAttention": _latent,
    "txtrain.model.ffn.dense:MLP": _feed_forward,
    "txtrain.model.ffn.dense:GatedFFN": _feed_forward,
    MIXTURE: _mixture,
}


def experts(model: ModelConfig) -> int | None:
    """How many each mixture has; None: there is none that can be divided by experts."""
    return int(model.ffn.n_experts) if TABLE["ffn"][model.ffn.type].target == MIXTURE else None


_COUNTED = (
    "`strategy` must be without tensor parallelism with {}, but has it: no rule cuts it, and its auxiliary loss would count in every process. "
    "Nearest: strategy=fsdp."
)


def _rule(axis: str, component: Any) -> Callable[[ModelConfig, Any], Iterator[Size]] | None:
    target = TABLE[axis][component.type].target
    return CUT.get(target) if isinstance(target, str) else None


def sizes(model: ModelConfig) -> list[Size]:
    """What is divided."""
    rules = ((component, _rule(axis, component)) for axis, component in (("attention", model.attention), ("ffn", model.ffn)))
    return [size for component, rule in rules if rule is not None for size in rule(model, component)]


def whole(model: ModelConfig) -> list[str]:
    """The chosen options, `axis=name`, whose matrices no rule divides: every process computes them in full."""
    axes = (("attention", model.attention), ("ffn", model.ffn))
    return [f"model/{axis}={component.type}" for axis, component in axes if _rule(axis, component) is None]


def problems(model: ModelConfig, key: str, size: int, world: int) -> Iterator[str]:
    """What `size` of `world` processes (as `key` has it) cannot divide of a model: finished sentences."""
    fitting = [n for n in range(1, world + 1) if world % n == 0 and _leaves_rows(model, n) and all(s.fits(n) for s in sizes(model))]
    near = f"Nearest that the model and {world} processes allow: {', '.join(map(str, sorted(sorted(fitting, key=lambda n: (abs(n - size), n))[:2])))}."
    for s in sizes(model):
        if not s.fits(size):
            how = "divide, or be a multiple of," if s.shared else "divide"
            yield f"`{key}` must {how} {s.key} ({s.value}), but is {size} instead. {near}"
    if _rule("ffn", model.ffn) is None and "loss_scale" in inspect.signature(resolve("ffn", model.ffn.type).forward).parameters:
        yield _COUNTED.format(f"model/ffn={model.ffn.type}")
    if not _leaves_rows(model, size):
        yield f"`{key}` must leave each process a part of model.vocab_size ({model.vocab_size}), but is {size} instead. {near}"


def _leaves_rows(model: ModelConfig, size: int) -> bool:
    """Parts are of one size, rounded up, and the last ones smaller; none may be empty."""
    return not model.vocab_size or -(-model.vocab_size // size) * (size - 1) < model.vocab_size
