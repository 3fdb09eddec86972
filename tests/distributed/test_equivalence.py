"""One process is the reference: however the steps are made, the losses, validation losses and gradient norms are the same."""

import pytest

from tests.distributed.equivalence import KINDS, WAYS, Runs

LATER = ("compiled", "bf16", "deepspeed", "checkpointing full", "on 4", "two copies")  # in names: in the slow half; ZeRO's own tests have its stages
EVERYWHERE = {  # of every kind, by the number of processes
    1: ("activation checkpointing, every 2nd block, and accumulation", "documents apart and padded, beside packed"),
    2: ("ddp, accumulation", "fsdp"),
}


def cells(n, kinds, ways=WAYS):
    return [(way, kind) for kind in kinds for way in ways if WAYS[way].n == n and kind in WAYS[way].kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("equivalence"))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_decoders_steps_are_the_same_however_they_are_made(runs, n):
    runs.compare(cells(n, ["decoder"], [way for way in WAYS if not any(word in way for word in LATER)]))


@pytest.mark.parametrize("n", EVERYWHERE)
def test_so_are_those_of_every_kind_of_model(runs, n):
    runs.compare(cells(n, [kind for kind in KINDS if kind != "decoder"], EVERYWHERE[n]))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_the_same_for_every_kind(runs, kind, n):
    runs.compare(cells(n, [kind]))
