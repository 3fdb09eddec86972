"""The groups `optimizer`, `scheduler` and `ema`: typed, without torch; and the bytes that an optimizer's state takes."""

from __future__ import annotations

import dataclasses as dc
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from txtrain.ground.patterns import pattern_problems
from txtrain.registry import BASES, knob, register

Shape = tuple[int, ...]


class Held(NamedTuple):
    """A parameter of which a process holds some part. own: the shape of that part. piece: what is in shards, where tensor parallelism has cut first."""

    name: str
    shape: Shape
    own: Shape
    piece: Shape | None = None

    @property
    def n(self) -> int:
        return math.prod(self.own)


# ------------------------------------------------------------------------------------------------------------------ optimizer


@dc.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What holds for the parameters whose dotted name has the pattern (re.search) instead of the optimizer's own values."""

    pattern: str
    lr_scale: float | None = knob(None, at_least=0)  # the rate as a multiple of what it would be
    weight_decay: float | None = knob(None, at_least=0)  # comes before no_decay

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None

    def check(self, path: str) -> Iterator[str]:
        yield from pattern_problems(f"{path}.pattern", (self.pattern,))
        if self.lr_scale is None and self.weight_decay is None:
            yield f"`{path}` must give lr_scale, weight_decay or both, but gives {self.pattern!r} neither."


@dc.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    type: str
    lr: float = knob(1e-3, at_least=0)
    weight_decay: float = knob(0.1, at_least=0)
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding")  # parameters whose dotted name has one of these as a pattern (re.search)
    groups: tuple[GroupConfig, ...] = ()  # of several that match, the last that gives a value holds

    elementwise: ClassVar[bool] = False  # true: a value's update needs no other value, so that parameters may be flattened and cut anywhere

    def check(self) -> Iterator[str]:
        yield from pattern_problems("optimizer.no_decay", self.no_decay)
        for i, group in enumerate(self.groups):
            yield from group.check(f"optimizer.groups[{i}]")

    def settings(self, name: str, shape: Shape) -> dict[str, Any]:
        """What holds for a parameter, as the keys of its group in the optimizer. peak_lr: its rate where the schedule is 1."""
        found: dict[str, Any] = {
            "peak_lr": self.rate(name, shape),
            "weight_decay": 0.0 if any(re.search(p, name) for p in self.no_decay) else self.weight_decay,
        }
        scale = 1.0
        for group in self.groups:
            if group.matches(name):
                scale = scale if group.lr_scale is None else group.lr_scale
                found["weight_decay"] = found["weight_decay"] if group.weight_decay is None else group.weight_decay
        return found | {"peak_lr": scale * found["peak_lr"]}

    def rate(self, name: str, shape: Shape) -> float:
        """The rate of a parameter that no group scales."""
        return self.lr

    def state_values(self, name: str, shape: Shape) -> int | None:
        """Values kept for a parameter beside it, a counter of the steps not among them; None: not known."""
        return None

    def state_bytes(self, shapes: Mapping[str, Shape], bytes_per_value: int = 4) -> int | None:
        """Bytes of the whole state. None: an optimizer of the user's own, of which nothing is known.

        Args:
            shapes: of the parameters held here, by their canonical names.
            bytes_per_value: of the parameters' own type, in which the state is kept.
        """
        values = [self.state_values(name, shape) for name, shape in shapes.items()]
        known = [v for v in values if v is not None]
        counters = sum(STEP_BYTES for name, shape in shapes.items() if self.counts_steps(name, shape))
        return sum(known) * bytes_per_value + counters if len(known) == len(values) else None

    def counts_steps(self, name: str, shape: Shape) -> bool:
        """Whether a parameter has a counter of its own in the state."""
        return False

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """Bytes made at the fullest moment of the update of a group's parameters, in their order, beside state and gradients.

        Args:
            size: bytes of a parameter's element.
        """
        return 0  # fused kernels make none

    def update_sent(self, held: Sequence[Held], size: int) -> dict[str, int]:
        """Bytes that the update of these parameters exchanges, by collective, where a process holds parts of them."""
        return {}


STEP_BYTES = 4  # a counter of the steps is one float32


@dc.dataclass(frozen=True, kw_only=True)
class AdamConfig(OptimizerConfig):
    """adamw decouples the decay (1711.05101); adam adds it to the gradient (1412.6980)."""

    betas: tuple[float, float] = knob((0.9, 0.95), at_least=0, below=1)
    eps: float = knob(1e-8, at_least=0)

    elementwise: ClassVar[bool] = True

    def state_values(self, name: str, shape: Shape) -> int:
        return 2 * math.prod(shape)

    def counts_steps(self, name: str, shape: Shape) -> bool:
        return True


@dc.dataclass(frozen=True, kw_only=True)
class LionConfig(OptimizerConfig):
    """The sign of an interpolated momentum (2302.06675). The rate is some 3 to 10 times lower than AdamW's, the decay as much higher."""

    lr: float = knob(1e-4, at_least=0)
    weight_decay: float = knob(1.0, at_least=0)
    # Of the update, and of the momentum that is kept.
    betas: tuple[float, float] = knob((0.9, 0.99), at_least=0, below=1)

    elementwise: ClassVar[bool] = True

    def state_values(self, name: str, shape: Shape) -> int:
        return math.prod(shape)

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """A direction, while the one before is still there."""
        return size * max(before + h.n for before, h in _after(held))


@dc.dataclass(frozen=True, kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Second moments of a matrix as its rows' and columns' (1804.04235). As T5 uses it, the rate comes from outside and is relative."""

    lr: float = knob(1e-2, at_least=0)
    weight_decay: float = knob(0.0, at_least=0)
    beta1: float | None = knob(None, at_least=0, below=1)  # null: no momentum, and no memory for one
    beta2_decay: float = knob(0.8, above=0, at_most=1)  # beta2 at step t is 1 - t^-beta2_decay
    clip_threshold: float = knob(1.0, above=0)  # of the root mean square of a parameter's update, before its rate
    # Added to squared gradients; least root mean square by which a rate is scaled.
    eps: tuple[float, float] = knob((1e-30, 1e-3), at_least=0)
    scale_parameter: bool = True  # the rate is a share of the parameter's root mean square
    relative_step: bool = False  # the share is also at most 1/sqrt(step), as in the paper

    def state_values(self, name: str, shape: Shape) -> int:
        moments = math.prod(shape) if len(shape) < 2 else math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))
        return moments + (0 if self.beta1 is None else math.prod(shape))

    def state_bytes(self, shapes: Mapping[str, Shape], bytes_per_value: int = 4) -> int | None:
        return OptimizerConfig.state_bytes(self, shapes, 4)  # float32, whatever the parameters are

    def counts_steps(self, name: str, shape: Shape) -> bool:
        return True

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """In float32: squares and two products; what the parameter before made of them is still there, unless the momentum took it in.
        From half precision also value and gradient."""
        left = (0 if self.beta1 is not None else 1) + (size < 4)
        return 4 * max(left * before + (3 + 2 * (size < 4)) * h.n for before, h in _after(held))

    def update_sent(self, held: Sequence[Held], size: int) -> dict[str, int]:
        """Sums along what is cut, over each of the dimensions of processes that cut it."""
        cuts = [(h, pair) for h in held for pair in ((h.shape, h.piece or h.shape), (h.piece or h.shape, h.own))]
        cut = [(h, d) for h, (before, after) in cuts if len(h.shape) >= 2 for d in (-1, -2) if after[d] != before[d]]
        found = sum(4 * h.n // h.own[d] for h, d in cut)
        return {"all_reduce": found} if found else {}


@dc.dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Matrices of the hidden layers by Muon (Jordan 2024; 2502.16982 for its scale beside AdamW), everything else by AdamW."""

    momentum: float = knob(0.95, at_least=0, below=1)
    nesterov: bool = True
    ns_steps: int = knob(5, at_least=1, at_most=99)  # of the Newton-Schulz iteration
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # in which it is computed
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"  # torch's words; the former lets one lr serve both
    adamw: tuple[str, ...] = ("embedding", r"^head\.")  # matrices that AdamW trains, as patterns of their dotted name (re.search)
    adamw_lr: float | None = knob(None, at_least=0)  # null: lr
    adamw_betas: tuple[float, float] = knob((0.9, 0.95), at_least=0, below=1)
    adamw_eps: float = knob(1e-8, at_least=0)

    def check(self) -> Iterator[str]:
        yield from OptimizerConfig.check(self)
        yield from pattern_problems("optimizer.adamw", self.adamw)

    def is_matrix(self, name: str, shape: Shape) -> bool:
        """Whether Muon trains it: a matrix, or a stack of them (the weights of experts), that is no table and no head."""
        return len(shape) in (2, 3) and not any(re.search(p, name) for p in self.adamw)

    def rate(self, name: str, shape: Shape) -> float:
        return self.lr if self.adamw_lr is None or self.is_matrix(name, shape) else self.adamw_lr

    def settings(self, name: str, shape: Shape) -> dict[str, Any]:
        return {**OptimizerConfig.settings(self, name, shape), "use_muon": self.is_matrix(name, shape)}

    def state_values(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * (1 if self.is_matrix(name, shape) else 2)

    def counts_steps(self, name: str, shape: Shape) -> bool:
        return not self.is_matrix(name, shape)

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """What Muon wants of a matrix, the whole matrix where the process has a part of it, and the iteration's own; AdamW makes nothing."""
        matrices = [h for h in held if self.is_matrix(h.name, h.shape)]
        return max((self._of_matrix(h, before, size) for before, h in _after(matrices)), default=0)

    def _of_matrix(self, h: Held, before: int, size: int) -> int:
        low, wanted = (2 if self.ns_dtype == "bfloat16" else 4), h.n * size if self.nesterov else 0
        n, side = (math.prod(h.shape) if self._is_gathered(h) else h.n), min(h.shape[-2:])
        if len(h.shape) == 3 and h.own[-2:] != h.shape[-2:]:  # cut within its matrices: each process computes some of them
            shares = math.prod(h.shape) // h.n
            n = math.ceil(h.shape[0] / shares) * math.prod(h.shape[-2:])
        squares = math.ceil(n / math.prod(h.shape[-2:])) * side**2 * low
        gathered = n * size if h.own[-2:] != h.shape[-2:] else 0
        iteration = max(2 * n * low + 2 * squares, n * low + n * size)
        return before * size + wanted + gathered + iteration

    def update_sent(self, held: Sequence[Held], size: int) -> dict[str, int]:
        """Matrices are gathered. (What of a stack that is cut within its matrices goes to and fro is not counted.)"""
        found = sum(math.prod(h.shape) * size for h in held if self.is_matrix(h.name, h.shape) and self._is_gathered(h))
        return {"all_gather": found} if found else {}

    def _is_gathered(self, h: Held) -> bool:
        """A stack is not."""
        return len(h.shape) == 2 and h.own != h.shape


def _after(held: Sequence[Held]) -> list[tuple[int, Held]]:
    """Each with the number of elements of the one before it."""
    return list(zip([0, *(h.n for h in held)], held, strict=False))


# ------------------------------------------------------------------------------------------------------------------ scheduler


@dc.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The rate as a share of optimizer.lr: linear warm-up, then the option's own shape down to min_lr_ratio."""

    type: str
    warmup_steps: int = knob(0, at_least=0)
    min_lr_ratio: float = knob(0.0, at_least=0, at_most=1)


@dc.dataclass(frozen=True, kw_only=True)
class InverseSqrtConfig(SchedulerConfig):
    # The share is 1 up to this step, then sqrt(timescale / step); null: warmup_steps.
    timescale: int | None = knob(None, at_least=1)

    def check(self) -> Iterator[str]:
        if (steps := self.timescale) is not None and steps < (low := self.warmup_steps):
            yield f"`scheduler.timescale` must be at least {low} (warmup_steps), but is {steps} instead."


@dc.dataclass(frozen=True, kw_only=True)
class WSDConfig(SchedulerConfig):
    decay_steps: int | None = knob(None, at_least=0)  # the last so many; null: decay_ratio of the run
    decay_ratio: float = knob(0.1, at_least=0, at_most=1)
    decay_type: Literal["linear", "1-sqrt", "cosine"] = "1-sqrt"


# ------------------------------------------------------------------------------------------------------------------------ ema


@dc.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """An exponential moving average of the weights, beside them."""

    decay: float | None = knob(None, at_least=0, below=1)  # null: none is kept
    every_n_steps: int = knob(1, at_least=1)
    validate: bool = False  # validate, sample and choose the best checkpoint with the averaged weights

    def check(self) -> Iterator[str]:
        if self.validate and self.decay is None:
            yield "`ema.validate` must be false without an average, but is true instead. Add ema.decay=0.999."


register("optimizer", "adamw", "txtrain.optim.adam:adamw", AdamConfig)
register("optimizer", "adam", "txtrain.optim.adam:adam", AdamConfig)
register("optimizer", "adafactor", "txtrain.optim.adafactor:Adafactor", AdafactorConfig)
register("optimizer", "muon", "txtrain.optim.muon:Muon", MuonConfig)
register("optimizer", "lion", "txtrain.optim.lion:Lion", LionConfig)
register("scheduler", "constant", "txtrain.optim.schedules:Constant", SchedulerConfig)
register("scheduler", "linear", "txtrain.optim.schedules:Linear", SchedulerConfig)
register("scheduler", "cosine", "txtrain.optim.schedules:Cosine", SchedulerConfig)
register("scheduler", "inverse_sqrt", "txtrain.optim.schedules:InverseSqrt", InverseSqrtConfig)
register("scheduler", "wsd", "txtrain.optim.schedules:WSD", WSDConfig)

BASES.update(optimizer=OptimizerConfig, scheduler=SchedulerConfig)
