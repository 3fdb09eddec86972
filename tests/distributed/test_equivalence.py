"""One process is the reference: however the steps are made, the losses, validation losses and gradient norms are the same."""

import pytest

from tests.distributed.equivalence import KINDS, WAYS, Runs

SHARED = ("ddp, accumulation", "fsdp")  # of every kind in the default run


def cells(n, kinds, ways=WAYS):
    return [(way, kind) for kind in kinds for way in ways if WAYS[way].n == n and kind in WAYS[way].kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("equivalence"))


def quick(n, zero=False):
    """Of the decoder all that needs no compiler; ZeRO's own tests have its stages."""
    return [way for way in WAYS if "compiled" not in way and "bf16" not in way and ("deepspeed" in way) == zero]


def test_a_decoder_in_one_process_equals_itself(runs):
    runs.compare(cells(1, ["decoder"], quick(1)))


def test_every_kind_of_model_in_one_process_equals_itself(runs):
    ways = ("activation checkpointing, every 2nd block, and accumulation", "documents apart and padded, beside packed", "loss by chunks of 5 tokens")
    runs.compare(cells(1, [k for k in KINDS if k != "decoder"], ways))


def test_a_decoder_in_two_processes_equals_one(runs):
    runs.compare(cells(2, ["decoder"], quick(2)))


def test_every_kind_of_model_in_two_processes_equals_one(runs):
    runs.compare(cells(2, [k for k in KINDS if k != "decoder"], SHARED))


def test_a_decoder_in_four_processes_equals_one(runs):
    runs.compare(cells(4, ["decoder"], quick(4)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_equals_one_process(runs, kind, n):
    runs.compare(cells(n, [kind]))
