"""One process is the reference: however the steps are made, the losses, validation losses and gradient norms are the same."""

import pytest

from tests.distributed.equivalence import KINDS, WAYS, Runs


def cells(n, kinds, ways=WAYS):
    return [(way, kind) for kind in kinds for way in ways if WAYS[way].n == n and kind in WAYS[way].kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("equivalence"))


def test_a_decoders_steps_in_one_process_are_the_same_however_they_are_made(runs):
    """All that needs no compiler. More of several processes is in test_tensor.py and test_deepspeed.py."""
    runs.compare(cells(1, ["decoder"], [way for way in WAYS if "compiled" not in way]))


def test_a_decoders_steps_in_two_processes_are_the_same(runs):
    ways = "ddp, accumulation", "fsdp, accumulation", "fsdp, each micro-batch reduced", "fsdp, offload, accumulation"
    runs.compare(cells(2, ["decoder"], ways))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_the_same_for_every_kind(runs, kind, n):
    runs.compare(cells(n, [kind]))
