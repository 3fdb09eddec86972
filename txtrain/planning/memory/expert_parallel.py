"""Expert parallelism in bytes, applied from outside as `txtrain.parallel.expert_parallel` divides a mixture: a process has whole experts, and rows travel
to them and back. All experts are taken to be visited alike, so that as many rows come as go."""

from __future__ import annotations

from collections.abc import Callable

from txtrain.model.trace.tape import Bytes, Gradients, Tape, Value


class DividedTape(Tape):
    """A tape of one of `parts` processes that divide each mixture's experts. around: is called to compute them, and may gather them first."""

    def __init__(self, size: int, parts: int, trains: Callable[[str], bool]) -> None:
        super().__init__(size, trains)
        self.parts = parts
        self.travelled = 0  # bytes of rows to experts and back, those of this process' own among them
        self.around: Callable[[Value, Callable[[Value], Value]], Value] | None = None

    def grouped(self, x: Value, inputs: int, outputs: int, experts: int, name: str = "weight") -> Value:
        return super().grouped(x, inputs, outputs, experts // self.parts, name)

    def experts(self, x: Value, dim: int, compute: Callable[[Value], Value]) -> Value:
        """Rows come by process, and within it by expert; computed by expert, they go back in the order in which they came."""
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
