"""Memory and messages of one process' step, counted."""

from __future__ import annotations

from txtrain.config import Train
from txtrain.memory.batch import batch_of, nbytes_of
from txtrain.memory.model import Traced
from txtrain.memory.tape import Tape


def count(config: Train, micro: int) -> Tape:
    t = Tape()
    every = config.trainer.activation_checkpointing
    seen = [0]

    def around(block, inputs):
        i, seen[0] = seen[0], seen[0] + 1
        if every == "none" or (isinstance(every, int) and i % every):
            return block(t, *inputs)
        return t.checkpoint(block, inputs, every == "selective")

    loss = Traced(config.model, batch_of(config, micro), t, around, "cpu").loss()
    t.after_forward = t.meter.now
    t.backward(loss)
    return t
