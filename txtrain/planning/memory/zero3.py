"""DeepSpeed's ZeRO, stage 3, as of 0.19.8.

Each parameter is sharded evenly over the ranks. A block's parameters are gathered when it is called, and further ones
prefetched in the order of the previous step; they are released unless they are read again within a distance.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain

from txtrain.config.schema import Train
from txtrain.model.trace.tape import Bytes, Group, Parameter, Value
from txtrain.optim.config import Held
from txtrain.parallel.config import BUCKET, Layout
from txtrain.planning.memory.optimizer import grouped
from txtrain.planning.memory.replicated import FLOAT32, Block, Copies

# DeepSpeed's defaults, in elements
AHEAD = 50_000_000  # prefetched at each call of a module, at least
LIVE = 1_000_000_000  # gathered at most, with those prefetched
DISTANCE = 1_000_000_000  # to a parameter's next use, from which on it is released in between
UPDATED = 1_000_000_000  # updated at a time

OPENING, CLOSING = 3, 2  # modules called before and after the blocks, without the outermost two

Place = tuple[int, int]  # of a parameter: its block, or ROOT, and its index there
ROOT = -1


class Gathering:
    """Parameters being gathered in one buffer, until they are read."""

    def __init__(self, places: Sequence[Place], buffer: Bytes) -> None:
        self.places, self.buffer = places, buffer


class Gathered(Copies):
    def __init__(self, config: Train, layout: Layout) -> None:
        super().__init__(config, layout)
        self.names = dict(chain(((ROOT, self.root),), enumerate(self.groups)))
        self.steps = self._called()
        self.queue: deque[tuple[Place, int]] = deque(
            (place, at) for at, places in enumerate(self.steps) for place in places
        )
        self.there: dict[Place, Bytes] = {}
        self.coming: dict[Place, Gathering] = {}
        self.next_use: dict[Place, int] = {}  # as far as prefetching has looked ahead
        self.at = 0  # index of the call
        self.n_there = 0
        self.bucket: list[Parameter] = []
        self.t.arrived = self._arrived

    def _called(self) -> list[list[Place]]:
        """Parameters that modules read, by call, forward and backward. The outermost reads all outside the blocks."""
        back = [
            [(number, i) for i in range(len(group.parameters))] for number, group in enumerate(self.groups)
            if self.goes_back[number]
        ]
        root = [(ROOT, i) for i in range(len(self.root.parameters))]
        blocks = [[(number, i) for i in range(len(group.parameters))] for number, group in enumerate(self.groups)]
        nothing: list[list[Place]] = [[]]
        return [
            root, root, *nothing * OPENING, *blocks, *nothing * CLOSING, root, *nothing * CLOSING, *reversed(back),
            *nothing * OPENING
        ]

    @property
    def _turn(self) -> int:
        """The index of the backward's first call."""
        return 2 + OPENING + len(self.groups) + CLOSING

    # ----------------------------------------------------------------------------------------------------------- states

    def own(self, p: Parameter) -> tuple[int, ...]:
        return (math.ceil(p.n / self.layout.shard),)

    def states(self) -> dict[str, int]:
        values = self.config.optimizer.state_values("", (1,))
        assert values is not None, "what ZeRO takes is elementwise"
        n = sum(h.n for h in self.trained)
        kept = (self._held(p).n for p in self.pieces if not p.edge and self.config.keeps(p.name))
        shares = FLOAT32 * sum(kept) if self.t.size != FLOAT32 and self.device == "cpu" else 0
        parameters = self.t.size * (n + self.n_frozen) + shares
        return {
            "parameters": parameters, "optimizer": FLOAT32 * (1 + values) * n, "gradients": FLOAT32 * n,
            "reduced": FLOAT32 * BUCKET
        }

    def update(self) -> dict[str, int]:
        """The larger of: absolute values, for the check for overflow; the gradients of a group in one buffer."""
        held = self.trained
        largest = max(
            min(sum(h.n for h in group), UPDATED + max(h.n for h in group))
            for group in grouped(self.config.optimizer, held)
        )
        made = FLOAT32 * largest + self.config.optimizer.update_bytes([Held("", (largest,), (largest,))], FLOAT32)
        return {"temporaries": max((FLOAT32 + 1) * sum(h.n for h in held), made)}

    def communicated(self) -> dict[str, int]:
        return dict(self.t.sent)

    # -------------------------------------------------------------------------------------------------------- gathering

    def _parameter(self, place: Place) -> Parameter:
        return self.names[place[0]].parameters[place[1]]

    def _padded(self, p: Parameter) -> int:
        return math.ceil(p.n / self.layout.shard) * self.layout.shard

    def _gather(self, places: Sequence[Place]) -> None:
        if not places:
            return
        n = sum(self._padded(self._parameter(place)) for place in places)
        self.t.sent["all_gather"] += n * self.t.size
        self.n_there += sum(self._parameter(place).n for place in places)
        made = Gathering(places, self.t.bytes(n, kind="gathered"))
        self.coming |= dict.fromkeys(places, made)

    def _take(self, place: Place) -> None:
        """Parameters gathered together are copied out together; a single one stays in its buffer."""
        made = self.coming.get(place)
        if made is None:
            return
        for each in made.places if place not in self.there else ():
            alone = len(made.places) == 1
            self.there[each] = made.buffer if alone else self.t.bytes(self._parameter(each).n, kind="gathered")
        del self.coming[place]

    def _call(self) -> None:
        """The call of the next module."""
        places = self.steps[self.at]
        self._gather([place for place in places if place not in self.there and place not in self.coming])
        for place in places:
            self._take(place)
        new = {place for place in places if self.next_use.get(place, -1) < self.at}
        while self.queue and new:
            place, at = self.queue.popleft()
            self.next_use[place] = at
            new.discard(place)
        self._gather(self._ahead())
        self.at += 1

    def _ahead(self) -> list[Place]:
        room, n = min(LIVE - self.n_there, AHEAD), 0
        chosen: dict[Place, None] = {}
        while self.queue and n < room:
            place, at = self.queue.popleft()
            self.next_use[place] = max(self.next_use.get(place, -1), at)
            if place not in self.there and place not in self.coming and place not in chosen:
                chosen[place] = None
                n += self._parameter(place).n
        return list(chosen)

    def _give_back(self, number: int) -> None:
        """Release the parameters of the block called last. The first call of the backward counts as reading all."""
        again, passed = set(), 0
        for at in range(self.at, len(self.steps)):
            if passed >= DISTANCE:
                break
            if at == self._turn:
                return
            again.update(self.steps[at])
            passed += sum(self._parameter(place).n for place in self.steps[at])
        for i, p in enumerate(self.groups[number].parameters):
            place = (number, i)
            unused = place not in again and self.next_use.get(place, -1) <= self.at
            if unused and self.there.pop(place, None) is not None:
                self.n_there -= p.n

    # --------------------------------------------------------------------------------------------------------- the step

    def step(self, micro: int, several: bool) -> None:
        for _ in range(2 + OPENING):
            self._call()
        super().step(micro, several)

    def before(self) -> None:
        """Gradients of earlier micro-batches are sharded, and counted in `states`."""

    def around(self, block: Block, inputs: Sequence[Value]) -> Value:
        t, number = self.t, self.seen
        self.seen += 1
        self._call()
        x, *others = inputs
        del inputs
        if x.edge is None and any(p.edge for p in self.groups[number].parameters):
            x = t.detached(x)
        x = t.hook(x, lambda: self._done(number))
        live = t.group = self.groups[number].live = Group()
        # A product saves a transposed view of its matrix, which outlives the parameter's release; not if recomputed.
        t.lies = lambda p: self.there[number, live.parameters.index(p)] if len(p.shape) > 1 else None
        x = self.computed(number, block, [x, *others])
        t.group, t.lies = t.root, None
        for p in live.parameters:
            p.storage = None
        self._give_back(number)
        return t.hook(x, self._call)

    def after_forward(self) -> None:
        for _ in range(CLOSING + 1 + CLOSING):
            self._call()

    def _arrived(self, p: Parameter) -> None:
        if p.group is self.t.root:
            self._add(p)

    def _done(self, number: int) -> None:
        """Called after a block's backward."""
        for p in self.groups[number].live.parameters:
            self._add(p)
        self._give_back(number)

    def _add(self, p: Parameter) -> None:
        """Copy a gradient into the bucket; one larger than the bucket stays where it is until it is reduced."""
        if p.gradient is None:
            return
        n = sum(other.n for other in self.bucket)
        if self.bucket and n + p.n > BUCKET:
            self._reduce()
            n = 0
        self.bucket.append(p)
        if n + p.n <= BUCKET:
            p.gradient = None

    def _reduce(self) -> None:
        n = sum(map(self._padded, self.bucket))
        large = [
            self.t.bytes(p.n, FLOAT32, "reduced") for p in self.bucket if p.gradient is not None
            and self.t.size != FLOAT32
        ]
        divides = len(self.bucket) == 1 and n == self.bucket[0].n
        together = None if divides else self.t.bytes(n, FLOAT32, "reduced")
        self.t.sent["reduce_scatter"] += n * FLOAT32
        if self.device == "cpu":  # gloo sums a copy of what it scatters
            self.t.bytes(n, FLOAT32, "reduced")
        del large, together
        for p in self.bucket:
            p.gradient = None
        self.bucket.clear()

    def after_backward(self) -> None:
        if self.bucket:
            self._reduce()
        self.there.clear()
        self.coming.clear()
