"""DeepSpeed's ZeRO, stages 1 and 2, as of 0.19.8: a group's parameters lie end to end in one buffer, of which each process updates a piece
in float32; gradients are copied into a bucket, and what of them it updates into a buffer of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from txtrain.memory.copies import FLOAT32, Copies
from txtrain.memory.tape import Bytes, Parameter
from txtrain.memory.updates import Held, grouped
from txtrain.parallel.config import BUCKET, Layout

if TYPE_CHECKING:
    from txtrain.config import Train

ALIGNED = 2  # elements, times the processes, up to which a group is filled


class Partitions(Copies):
    def __init__(self, config: Train, layout: Layout) -> None:
        super().__init__(config, layout)
        self.stage: int = config.strategy.stage
        groups = [[h.n for h in group] for group in grouped(config.optimizer, self.held)]
        filled = ALIGNED * layout.shard
        self.flat = [math.ceil(sum(sizes) / filled) * filled for sizes in groups]
        self.mine = [n // layout.shard for n in self.flat]
        # The first process copies the gradient of a parameter whole where it updates a part of it.
        self.copied = sum(_touched(sizes, n) for sizes, n in zip(groups, self.mine, strict=True))
        self.bucket: Bytes | None = None
        self.filled = 0
        self.large: Parameter | None = None
        self.kept: Bytes | None = None
        self.t.arrived = self._arrived

    # -------------------------------------------------------------------------------------------------------------- states

    def states(self) -> dict[str, int]:
        values = self.config.optimizer.state_values("", (1,))
        assert values is not None, "what ZeRO takes is elementwise"
        return {"parameters": self.t.size * sum(self.flat), "optimizer": FLOAT32 * (1 + values) * sum(self.mine)}

    def update(self) -> dict[str, int]:
        made = max(self.config.optimizer.update_bytes([Held("", (n,), (n,))], FLOAT32) for n in self.mine)
        return {"gradients": FLOAT32 * self.copied, "temporaries": FLOAT32 * max(self.mine) + made}

    def communicated(self) -> dict[str, int]:
        reductions = self.n_micro_batches if self.stage == 2 else 1
        return {"all_reduce": FLOAT32 * reductions * sum(h.n for h in self.held), "all_gather": self.t.size * sum(self.flat)}

    # ------------------------------------------------------------------------------------------------------------ the step

    def before(self) -> None:
        if self.stage == 1:
            super().before()
        else:
            self.earlier = self.t.bytes(self.copied, FLOAT32, "gradients")

    def _arrived(self, p: Parameter) -> None:
        if self.bucket is None:
            self.bucket = self.t.bytes(BUCKET, FLOAT32, "reduced")
        if self.stage == 2:
            self._copy(p)

    def _copy(self, p: Parameter) -> None:
        """A gradient enters the bucket; one that is larger than it stays where it is until it is reduced."""
        if self.filled + p.n > BUCKET:
            self._reduce()
        self.filled += p.n
        if p.n > BUCKET:
            self.large = p
        else:
            p.gradient = None

    def _reduce(self) -> None:
        if self.filled:
            self.t.bytes(self.filled if self.large is None else self._side_by_side(self.large.n), FLOAT32, "reduced")
            if self.kept is None:
                self.kept = self.t.bytes(self.copied, FLOAT32, "gradients")
        if self.large is not None:
            self.large.gradient = None
            self.large = None
        self.filled = 0

    def _side_by_side(self, n: int) -> int:
        """Elements of a large gradient that are copied end to end at a time: slices of one process each, until they are more than a bucket."""
        piece = min(n, max(self.mine))
        several = BUCKET // piece + 1
        return min(n, several * piece) if several > 1 else 0

    def after_backward(self) -> None:
        if self.stage == 1:
            self.earlier = None
            for p in self.t.parameters:
                self._copy(p)
        self._reduce()


def _touched(sizes: list[int], first: int) -> int:
    """Elements of the parameters that begin within the first so many."""
    total = 0
    for n in sizes:
        if total >= first:
            break
        total += n
    return total
