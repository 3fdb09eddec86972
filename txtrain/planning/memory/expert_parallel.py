"""Memory of expert parallelism, as in `txtrain.parallel.expert_parallel`: a rank has whole experts, and rows are sent
to them and back. Experts are assumed to get equally many rows."""

from __future__ import annotations

from collections.abc import Callable

from txtrain.model.trace.tape import Bytes, Gradients, Tape, Value


class DividedTape(Tape):
    """The tape of one of `parts` ranks that divide the experts. around: computes them, and may gather them before."""

    def __init__(self, size: int, parts: int, trains: Callable[[str], bool]) -> None:
        super().__init__(size, trains)
        self.parts = parts
        self.travelled = 0  # bytes of rows sent to experts and back, this rank's own included
        self.around: Callable[[Value, Callable[[Value], Value]], Value] | None = None

    def grouped(self, x: Value, inputs: int, outputs: int, experts: int, name: str = "weight") -> Value:
        return super().grouped(x, inputs, outputs, experts // self.parts, name)

    def experts(self, x: Value, dim: int, compute: Callable[[Value], Value]) -> Value:
        """Rows arrive by rank and expert, are computed by expert, and return in the order of arrival."""
        assert self.around is not None
        order = 8 * (x.n // dim)
        came = self._exchanged(x)
        y = self.around(self.picked(came, came.n, order), compute)
        back = self.picked(y, y.n, order)
        del y
        return self._exchanged(back)

    def _exchanged(self, x: Value) -> Value:
        nbytes = x.nbytes
        self.travelled += nbytes

        def backward(g: Bytes) -> Gradients:
            self.travelled += nbytes
            return (Bytes(self.meter, nbytes, self.kind),)

        return self.made([x], x.n, x.size, None, backward)
