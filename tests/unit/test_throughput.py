import pytest
import torch

from txtrain.throughput import Machine, Meter, peak


def test_the_meter_counts_training_and_not_what_is_between():
    now = [0.0]
    meter = Meter(seconds=100.0, clock=lambda: now[0])
    meter.start()
    for _ in range(2):
        now[0] += 2.0
        meter.count(tokens=50, flops=3.0)
    now[0] += 1000.0  # a validation
    meter.start()
    now[0] += 1.0
    meter.count(tokens=50, flops=3.0)
    assert meter.seconds == 105.0
    assert meter.rates() == pytest.approx((150 / 5, 9 / 5))
    assert meter.rates() == (0.0, 0.0), "nothing was counted since the last call"


def test_an_unknown_device_is_measured_and_says_so():
    found = peak(torch.device("cpu"), torch.float32)
    assert found.source.startswith("measured: 512-cube matmul, float32, ")
    assert 1e9 < found.flops < 1e14
    assert peak(torch.device("cpu"), torch.float32) is found, "measured twice"
    assert "FLOP/s, measured" in str(Machine.of(torch.device("cpu"), torch.float32))


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    peak.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
