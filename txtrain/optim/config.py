"""The groups `optimizer`, `scheduler` and `ema`, typed and without torch; and the bytes of an optimizer's state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from txtrain.ground.patterns import pattern_problems
from txtrain.registry import BASES, config, knob, register

Shape = tuple[int, ...]


class Held(NamedTuple):
    """A parameter that a rank holds a part of.

    own: the shape of that part. piece: the shape of what is sharded, where tensor parallelism has cut it first.
    """

    name: str
    shape: Shape
    own: Shape
    piece: Shape | None = None

    @property
    def n(self) -> int:
        return math.prod(self.own)


class Depths(NamedTuple):
    """Numbers of blocks, of an encoder and of the stack that ends in the head, for `OptimizerConfig.layer_decay`.

        embeddings, positions      0
        block i                    i + 1; an encoder's blocks come before the decoder's
        last norm, head, MTP       the number of blocks + 1
    """

    encoder: int
    blocks: int

    @classmethod
    def of(cls, names: Iterable[str]) -> Depths:
        found = [_BLOCK.match(name) for name in names]
        counts = dict.fromkeys(("encoder.", None), 0)
        for match in filter(None, found):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
        return cls(counts["encoder."], counts[None])

    def below_head(self, name: str) -> int:
        """How many layers a parameter is below the head."""
        top = self.encoder + self.blocks + 1
        if (match := _BLOCK.match(name)) is not None:
            return top - (1 + int(match[2]) + (0 if match[1] else self.encoder))
        if name.startswith("encoder.final_norm"):
            return top - self.encoder
        return top if name.startswith(_LOWEST) else 0


_BLOCK = re.compile(r"(encoder\.)?blocks\.(\d+)\.")
_LOWEST = ("embedding.", "encoder_embedding.", "position.", "encoder.position.")


# ------------------------------------------------------------------------------------------------------------ optimizer


@config
class GroupConfig:
    """Values for the parameters whose dotted name has the pattern (re.search), in place of the optimizer's own."""

    pattern: str
    lr_scale: float | None = knob(None, at_least=0)  # factor of the rate
    weight_decay: float | None = knob(None, at_least=0)  # wins over no_decay

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None

    def check(self, path: str) -> Iterator[str]:
        yield from pattern_problems(f"{path}.pattern", (self.pattern,))
        if self.lr_scale is None and self.weight_decay is None:
            yield f"`{path}` must give lr_scale, weight_decay or both, but gives {self.pattern!r} neither."


@config
class OptimizerConfig:
    type: str
    lr: float = knob(1e-3, at_least=0)  # the highest rate, which the schedule scales
    weight_decay: float = knob(0.1, at_least=0)
    # parameters without weight decay: those whose dotted name has one of these patterns (re.search)
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding")
    groups: tuple[GroupConfig, ...] = ()  # of several that match, the last that gives a value wins
    # factor of the rate for each layer below the head (ELECTRA, 2003.10555; BEiT, 2106.08254); 1: the same for all
    layer_decay: float = knob(1.0, above=0, at_most=1)

    # each value is updated by itself, so that parameters may be flattened and cut anywhere
    elementwise: ClassVar[bool] = False

    def check(self) -> Iterator[str]:
        yield from pattern_problems("optimizer.no_decay", self.no_decay)
        for i, group in enumerate(self.groups):
            yield from group.check(f"optimizer.groups[{i}]")

    def settings(self, name: str, shape: Shape, depths: Depths) -> dict[str, Any]:
        """A parameter's values, as keys of its group in the optimizer. peak_lr: its rate where the schedule is 1."""
        found: dict[str, Any] = {
            "peak_lr": self.rate(name, shape),
            "weight_decay": 0.0 if any(re.search(p, name) for p in self.no_decay) else self.weight_decay,
        }
        scale = 1.0
        for group in self.groups:
            if group.matches(name):
                scale = scale if group.lr_scale is None else group.lr_scale
                found["weight_decay"] = found["weight_decay"] if group.weight_decay is None else group.weight_decay
        scale *= self.layer_decay ** depths.below_head(name)
        return found | {"peak_lr": scale * found["peak_lr"]}

    def rate(self, name: str, shape: Shape) -> float:
        """The rate of a parameter before a group scales it."""
        return self.lr

    def state_values(self, name: str, shape: Shape) -> int | None:
        """Number of state values for a parameter, without its step counter; None: unknown."""
        return None

    def state_bytes(self, shapes: Mapping[str, Shape], bytes_per_value: int = 4) -> int | None:
        """Bytes of the whole state. None: unknown, for an optimizer of the user's own.

        Args:
            shapes: of the parameters held here, by canonical name.
            bytes_per_value: of the parameters' own type, in which the state is kept.
        """
        values = [self.state_values(name, shape) for name, shape in shapes.items()]
        known = [v for v in values if v is not None]
        counters = sum(STEP_BYTES for name, shape in shapes.items() if self.counts_steps(name, shape))
        return sum(known) * bytes_per_value + counters if len(known) == len(values) else None

    def counts_steps(self, name: str, shape: Shape) -> bool:
        """Whether a parameter's state has a step counter of its own."""
        return False

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """Temporary bytes at the peak of the update of a group's parameters, in order, beside state and gradients.

        Args:
            size: bytes of a parameter's element.
        """
        return 0  # fused kernels need none

    def update_sent(self, held: Sequence[Held], size: int) -> dict[str, int]:
        """Bytes that the update of these parameters exchanges, by collective, where they are sharded."""
        return {}


STEP_BYTES = 4  # a step counter is one float32


@config
class AdamConfig(OptimizerConfig):
    """adamw decouples the decay (1711.05101); adam adds it to the gradient (1412.6980)."""

    betas: tuple[float, float] = knob((0.9, 0.95), at_least=0, below=1)
    eps: float = knob(1e-8, above=0)  # 0: the step of a value without a gradient so far would be 0/0

    elementwise: ClassVar[bool] = True

    def state_values(self, name: str, shape: Shape) -> int:
        return 2 * math.prod(shape)

    def counts_steps(self, name: str, shape: Shape) -> bool:
        return True


@config
class LionConfig(OptimizerConfig):
    """The sign of an interpolated momentum (2302.06675); lr 3 to 10 times lower than AdamW's, and more weight decay."""

    lr: float = knob(1e-4, at_least=0)
    weight_decay: float = knob(1.0, at_least=0)
    # of the update, and of the momentum that is kept
    betas: tuple[float, float] = knob((0.9, 0.99), at_least=0, below=1)

    elementwise: ClassVar[bool] = True

    def state_values(self, name: str, shape: Shape) -> int:
        return math.prod(shape)

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """The direction, while the previous one still exists."""
        return size * max(before + h.n for before, h in _after(held))


@config
class AdafactorConfig(OptimizerConfig):
    """Second moments factored into rows and columns (1804.04235); as in T5, lr is relative and from the schedule."""

    lr: float = knob(1e-2, at_least=0)
    weight_decay: float = knob(0.0, at_least=0)
    beta1: float | None = knob(None, at_least=0, below=1)  # decay of the momentum; null: none, which saves its memory
    beta2_decay: float = knob(0.8, above=0, at_most=1)  # beta2 at step t is 1 - t^-beta2_decay
    clip_threshold: float = knob(1.0, above=0)  # upper bound of an update's root mean square, before the rate
    # added to squared gradients; lower bound of the root mean square that scales a rate
    eps: tuple[float, float] = knob((1e-30, 1e-3), at_least=0)
    scale_parameter: bool = True  # multiply the rate by the parameter's root mean square
    relative_step: bool = False  # limit the rate to 1/sqrt(step) before that, as in the paper

    def check(self) -> Iterator[str]:
        yield from OptimizerConfig.check(self)
        if not self.eps[0]:
            yield f"`optimizer.eps[0]` must be above 0, but is {self.eps[0]} instead. Nearest: 1e-30."

    def state_values(self, name: str, shape: Shape) -> int:
        moments = math.prod(shape) if len(shape) < 2 else math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))
        return moments + (0 if self.beta1 is None else math.prod(shape))

    def state_bytes(self, shapes: Mapping[str, Shape], bytes_per_value: int = 4) -> int | None:
        return OptimizerConfig.state_bytes(self, shapes, 4)  # float32, whatever the parameters are

    def counts_steps(self, name: str, shape: Shape) -> bool:
        return True

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """In float32: squares and two products, while the previous parameter's change still exists, unless the momentum
        took it in. From half precision also value and gradient."""
        left = (0 if self.beta1 is not None else 1) + (size < 4)
        return 4 * max(left * before + (3 + 2 * (size < 4)) * h.n for before, h in _after(held))

    def update_sent(self, held: Sequence[Held], size: int) -> dict[str, int]:
        """Sums along sharded dimensions, over each mesh dimension that shards them."""
        cuts = [(h, pair) for h in held for pair in ((h.shape, h.piece or h.shape), (h.piece or h.shape, h.own))]
        cut = [(h, d) for h, (before, after) in cuts if len(h.shape) >= 2 for d in (-1, -2) if after[d] != before[d]]
        found = sum(4 * h.n // max(1, h.own[d]) for h, d in cut)  # 0: more processes than heads, which `train` refuses
        return {"all_reduce": found} if found else {}


@config
class MuonConfig(OptimizerConfig):
    """Muon for matrices of hidden layers (Jordan 2024; 2502.16982 for its scale beside AdamW), AdamW for the rest."""

    momentum: float = knob(0.95, at_least=0, below=1)  # its decay
    nesterov: bool = True
    ns_steps: int = knob(5, at_least=1, at_most=99)  # iterations of Newton-Schulz
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # precision of the iteration
    # as in torch.optim.Muon; with match_rms_adamw one lr serves both
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    # matrices that AdamW trains: those whose dotted name has one of these patterns (re.search)
    adamw: tuple[str, ...] = ("embedding", r"^head\.")
    adamw_lr: float | None = knob(None, at_least=0)  # AdamW's; null: lr
    adamw_betas: tuple[float, float] = knob((0.9, 0.95), at_least=0, below=1)
    adamw_eps: float = knob(1e-8, above=0)

    def check(self) -> Iterator[str]:
        yield from OptimizerConfig.check(self)
        yield from pattern_problems("optimizer.adamw", self.adamw)

    def is_matrix(self, name: str, shape: Shape) -> bool:
        """Whether Muon trains it: a matrix or a stack of them (experts) that matches no pattern of `adamw`."""
        return len(shape) in (2, 3) and not any(re.search(p, name) for p in self.adamw)

    def rate(self, name: str, shape: Shape) -> float:
        return self.lr if self.adamw_lr is None or self.is_matrix(name, shape) else self.adamw_lr

    def settings(self, name: str, shape: Shape, depths: Depths) -> dict[str, Any]:
        return {**OptimizerConfig.settings(self, name, shape, depths), "use_muon": self.is_matrix(name, shape)}

    def state_values(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * (1 if self.is_matrix(name, shape) else 2)

    def counts_steps(self, name: str, shape: Shape) -> bool:
        return not self.is_matrix(name, shape)

    def update_bytes(self, held: Sequence[Held], size: int) -> int:
        """Muon's direction, the gathered matrix if it is sharded, and the iteration's temporaries; AdamW needs none."""
        matrices = [h for h in held if self.is_matrix(h.name, h.shape)]
        return max((self._of_matrix(h, before, size) for before, h in _after(matrices)), default=0)

    def _of_matrix(self, h: Held, before: int, size: int) -> int:
        low, wanted = (2 if self.ns_dtype == "bfloat16" else 4), h.n * size if self.nesterov else 0
        n, side = (math.prod(h.shape) if self._is_gathered(h) else h.n), min(h.shape[-2:])
        if len(h.shape) == 3 and h.own[-2:] != h.shape[-2:]:  # matrices are cut: each rank computes some of them
            shares = math.prod(h.shape) // h.n
            n = math.ceil(h.shape[0] / shares) * math.prod(h.shape[-2:])
        squares = math.ceil(n / math.prod(h.shape[-2:])) * side**2 * low
        gathered = n * size if h.own[-2:] != h.shape[-2:] else 0
        iteration = max(2 * n * low + 2 * squares, n * low + n * size)
        return before * size + wanted + gathered + iteration

    def update_sent(self, held: Sequence[Held], size: int) -> dict[str, int]:
        """Matrices are gathered. (The exchange of a stack whose matrices are cut is not counted.)"""
        found = sum(math.prod(h.shape) * size for h in held if self.is_matrix(h.name, h.shape) and self._is_gathered(h))
        return {"all_gather": found} if found else {}

    def _is_gathered(self, h: Held) -> bool:
        """Whether a sharded matrix is gathered; a stack is not."""
        return len(h.shape) == 2 and h.own != h.shape


def _after(held: Sequence[Held]) -> list[tuple[int, Held]]:
    """Each parameter, after the number of elements of the previous one."""
    return list(zip([0, *(h.n for h in held)], held, strict=False))


# ------------------------------------------------------------------------------------------------------------ scheduler


@config
class SchedulerConfig:
    """The rate as a share of optimizer.lr: linear warm-up, then the option's own shape down to min_lr_ratio."""

    type: str
    warmup_steps: int = knob(0, at_least=0)  # of linear warm-up
    min_lr_ratio: float = knob(0.0, at_least=0, at_most=1)  # the lowest rate, as a share of optimizer.lr


@config
class InverseSqrtConfig(SchedulerConfig):
    # the share is 1 up to this step, then sqrt(timescale / step); null: warmup_steps
    timescale: int | None = knob(None, at_least=1)

    def check(self) -> Iterator[str]:
        if (steps := self.timescale) is not None and steps < (low := self.warmup_steps):
            yield f"`scheduler.timescale` must be at least {low} (warmup_steps), but is {steps} instead."


@config
class WSDConfig(SchedulerConfig):
    decay_steps: int | None = knob(None, at_least=0)  # number of last steps that decay; null: decay_ratio of the run
    decay_ratio: float = knob(0.1, at_least=0, at_most=1)  # share of the run, where decay_steps is null
    decay_type: Literal["linear", "1-sqrt", "cosine"] = "1-sqrt"


# ------------------------------------------------------------------------------------------------------------------ ema


@config
class EMAConfig:
    """An exponential moving average of the weights."""

    decay: float | None = knob(None, at_least=0, below=1)  # null: no average
    every_n_steps: int = knob(1, at_least=1)  # between updates of the average
    validate: bool = False  # use the averaged weights to validate, sample and choose the best checkpoint

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
