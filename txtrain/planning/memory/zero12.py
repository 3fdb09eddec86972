"""DeepSpeed's ZeRO, stages 1 and 2, as of 0.19.8.

A group's parameters are one flat buffer, of which each rank updates its partition in float32. Gradients are copied into
a bucket, and those of the rank's partition into a buffer of its own. With bfloat16 stage 1 is another optimizer: every
rank accumulates all gradients in float32, and reduces them after the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate

from txtrain.config.schema import Train
from txtrain.model.trace.tape import Bytes, Parameter
from txtrain.optim.config import Held
from txtrain.parallel.config import BUCKET, Layout
from txtrain.planning.memory.optimizer import grouped
from txtrain.planning.memory.replicated import FLOAT32, Copies

ALIGNED = 2  # groups are padded to a multiple of this times the number of ranks
SUMMED = 500_000_000  # groups are reduced together once they have more elements


class Partitions(Copies):
    def __init__(self, config: Train, layout: Layout) -> None:
        super().__init__(config, layout)
        self.stage: int = config.strategy.stage
        laid = grouped(config.optimizer, self.trained)
        groups = [[h.n for h in group] for group in laid]
        filled = ALIGNED * layout.shard
        self.flat = [math.ceil(sum(sizes) / filled) * filled for sizes in groups]
        self.mine = [n // layout.shard for n in self.flat]
        ends = [accumulate(sizes) for sizes in groups]
        # parameter -> its group, and its end in that
        self.place = {
            h.name: (g, end) for g, (group, own) in enumerate(zip(laid, ends, strict=True))
            for h, end in zip(group, own, strict=True)
        }
        self.half = self.t.size == 2
        # In float32 the first rank copies the whole gradient of a parameter of which it updates a part.
        self.copied = (
            sum(self.mine) if self.half else sum(_touched(sizes, n) for sizes, n in zip(groups, self.mine, strict=True))
        )
        self.bucket: Bytes | None = None
        self.filled = 0
        self.inside: list[Parameter] = []
        self.large: Parameter | None = None
        self.kept: Bytes | None = None
        self.kept_of: dict[int, Bytes] = {}
        self.earlier: Bytes | None = None
        self.t.arrived = self._arrived

    # ----------------------------------------------------------------------------------------------------------- states

    def states(self) -> dict[str, int]:
        values = self.config.optimizer.state_values("", (1,))
        assert values is not None, "what ZeRO takes is elementwise"
        shares = (
            sum(math.ceil(p.n / self.layout.shard) for p in self.pieces if not p.edge and self.config.keeps(p.name))
            if self.half and self.device == "cpu" else 0
        )
        parameters = self.t.size * (sum(self.flat) + self.n_frozen) + FLOAT32 * shares
        return {"parameters": parameters, "optimizer": FLOAT32 * (1 + values) * sum(self.mine)}

    def update(self) -> dict[str, int]:
        made = max(self.config.optimizer.update_bytes([Held("", (n,), (n,))], FLOAT32) for n in self.mine)
        side_by_side = 0 if self.half else FLOAT32 * max(self.mine)  # bfloat16's are flat already
        return {"gradients": FLOAT32 * self.copied, "temporaries": side_by_side + made}

    def communicated(self) -> dict[str, int]:
        reductions = self.n_micro_batches if self.stage == 2 else 1
        return {
            "all_reduce": FLOAT32 * reductions * sum(h.n for h in self.trained),
            "all_gather": self.t.size * sum(self.flat)
        }

    # --------------------------------------------------------------------------------------------------------- the step

    def before(self) -> None:
        if self.stage == 1:
            super().before()
        else:
            self.earlier = self.t.bytes(self.copied, FLOAT32, "gradients")

    def _arrived(self, p: Parameter) -> None:
        if self.bucket is None:
            self.bucket = self.t.bytes(BUCKET, kind="reduced")
        if self.stage == 2:
            self._copy(p)

    def _copy(self, p: Parameter) -> None:
        """Copy a gradient into the bucket; one larger than the bucket stays where it is until it is reduced."""
        if self.filled + p.n > BUCKET:
            self._reduce()
        self.filled += p.n
        self.inside.append(p)
        if p.n > BUCKET:
            self.large = p
        else:
            p.gradient = None

    def _reduce(self) -> None:
        if self.half:
            self._keep()
        for n, several in self._slices():
            together = self.t.bytes(n if several else 0, kind="reduced")
            self.t.bytes(n if self.half else 0, FLOAT32, "reduced")  # bfloat16 is reduced in float32
            del together
        if not self.half and self.kept is None and any(self._is_mine(*self.place[p.name], p) for p in self.inside):
            self.kept = self.t.bytes(self.copied, FLOAT32, "gradients")
        if self.large is not None:
            self.large.gradient = None
            self.large = None
        self.filled = 0
        self.inside.clear()

    def _keep(self) -> None:
        """Allocate this rank's gradients of a group with the first of them, unless earlier micro-batches have."""
        for p in self.inside if self.earlier is None else ():
            g, end = self.place[p.name]
            if g not in self.kept_of and self._is_mine(g, end, p):
                self.kept_of[g] = self.t.bytes(self.mine[g], FLOAT32, "gradients")

    def _is_mine(self, group: int, end: int, p: Parameter) -> bool:
        """Whether the first rank updates a part of it."""
        return end - p.n < self.mine[group]

    def _slices(self) -> Iterator[tuple[int, bool]]:
        """Elements that are sent at a time, until they fill a bucket; and whether in several slices, which are copied
        into one buffer: of one partition each, but of each parameter if bfloat16 is added to the rank's own."""
        n, several, last = 0, 0, None
        for p in self.inside:
            g, end = self.place[p.name]
            at = end - p.n
            while at < end:
                partition = at // self.mine[g]
                until = min(end, (partition + 1) * self.mine[g])
                several += partition != last or (self.half and not partition)
                n, at, last = n + until - at, until, partition
                if n > BUCKET:
                    yield n, several > 1
                    n, several = 0, 0
        if n:
            yield n, several > 1

    def after_backward(self) -> None:
        if self.stage == 1:
            self.earlier = None
            for p in self.t.parameters:
                if p.edge:
                    self._copy(p)
        self._reduce()


class Accumulated(Partitions):
    """Stage 1 with bfloat16."""

    def __init__(self, config: Train, layout: Layout) -> None:
        super().__init__(config, layout)
        self.t.arrived = None

    def states(self) -> dict[str, int]:
        return super().states() | {"gradients": FLOAT32 * sum(self.flat)}

    def update(self) -> dict[str, int]:
        made = super().update()["temporaries"]
        return {"gradients": self.t.size * sum(h.n for h in self.trained), "temporaries": made}

    def before(self) -> None:
        self.earlier = self.t.bytes(sum(h.n for h in self.trained), kind="gradients")
        self.t.accumulates = True

    def after_backward(self) -> None:
        self.t.bytes(max(h.n for h in self.trained), FLOAT32)  # gradients are added one after the other
        together = 0
        for n in self.flat:
            together += n
            if together > SUMMED or n is self.flat[-1]:
                self.t.bytes(together, FLOAT32, "reduced")
                together = 0


def _touched(sizes: list[int], first: int) -> int:
    """Elements of the parameters that begin within the first `first` elements."""
    total = 0
    for n in sizes:
        if total >= first:
            break
        total += n
    return total
