import pytest
import torch

from txtrain.config.hardware import PUBLISHED, key_of, named
from txtrain.config.schema_of_plan import PlanConfig
from txtrain.monitor.throughput import Machine, Meter, Peak, memory, peak


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
    assert meter.rates() == pytest.approx((150 / 5, 9 / 5, 9 / 5))
    assert meter.rates() == (0.0, 0.0, 0.0), "nothing was counted since the last call"


def test_what_is_computed_again_counts_for_the_hardware_alone():
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    meter.start()
    now[0] += 2.0
    meter.count(tokens=50, flops=3.0, again=1.0)
    assert meter.rates() == (25.0, 1.5, 2.0)


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


NAMES = {  # as torch.cuda.get_device_name gives them; bfloat16 (of a V100 and a T4 float16), float32
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 19.5),
    "NVIDIA H100 80GB HBM3": (989, 67),
    "NVIDIA H100 PCIe": (756, 51),
    "NVIDIA H100 NVL": (835.5, 60),
    "NVIDIA H200": (989, 67),
    "NVIDIA H200 NVL": (835.5, 60),
    "NVIDIA GH200 480GB": (990, 67),
    "NVIDIA B200": (2250, 75),
    "NVIDIA GB200": (2500, 80),
    "NVIDIA L4": (121, 30.3),
    "NVIDIA L40": (181, 90.5),
    "NVIDIA L40S": (362, 91.6),
    "NVIDIA A10": (125, 31.2),
    "NVIDIA A10G": (70, 35),
    "NVIDIA A30": (165, 10.3),
    "NVIDIA A40": (149.7, 37.4),
    "Tesla V100-SXM2-32GB": (125, 15.7),
    "Tesla V100-PCIE-16GB": (112, 14),
    "Tesla T4": (65, 8.1),
    "NVIDIA RTX A6000": (154.8, 38.7),
    "NVIDIA GeForce RTX 3090": (71, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
    "AMD Instinct MI210": (181, 45.3),
    "AMD Instinct MI250": (181, 45.25),
    "AMD Instinct MI250X": (191.5, 47.85),
    "AMD Instinct MI300X": (1307.4, 163.4),
    "AMD Instinct MI300A": (980.6, 122.6),
    "AMD Instinct MI325X": (1307.4, 163.4),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_of_a_known_device_is_its_makers(name):
    found = named(name)
    assert found is not None
    dtype = "float16" if found.bfloat16 is None else "bfloat16"
    assert (found.flops(dtype), found.flops("float32")) == pytest.approx([n * 1e12 for n in NAMES[name]])
    assert found.source.startswith(("NVIDIA ", "AMD "))


def test_every_published_device_is_found_by_a_name_of_torch():
    assert {id(named(name)) for name in NAMES} == {id(a) for a in PUBLISHED.values()}


def test_figures_are_dense_and_of_one_kind():
    for name, a in PUBLISHED.items():
        assert a.float32 <= (a.tf32 or a.float32) <= a.float16, name
        assert a.bfloat16 in (None, a.float16), name
        if a.tf32:  # half of what bfloat16 does; what a maker rounds away is less than 3 %
            assert a.tf32 == pytest.approx(a.float16 / 2, rel=0.03), name


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H20", "CPU"],
)
def test_what_is_like_a_known_device_is_measured(name):
    assert named(name) is None


def test_a_v100_has_no_bfloat16_to_be_compared_with():
    assert PUBLISHED["V100"].flops("bfloat16") is None


def test_memory_is_the_fullest_moment_of_the_process():
    before = memory(torch.device("cpu"))
    held = torch.ones(40 << 20, dtype=torch.uint8)
    after = memory(torch.device("cpu"))
    assert 10 << 20 < before <= after
    del held
    assert memory(torch.device("cpu")) >= after, "a peak does not go down"


def test_a_peak_that_was_measured_while_something_else_had_the_device_is_measured_again():
    disturbed = Machine("CPU", Peak(1e9, "measured: then"), measure=lambda: Peak(8e9, "measured: now"))
    assert disturbed.reaching(1e9) == disturbed
    assert disturbed.reaching(2e9).peak == Peak(8e9, "measured: now")
    slower = disturbed._replace(measure=lambda: Peak(0.5e9, "measured: now"))
    assert slower.reaching(2e9).peak.flops == 1e9, "a peak is never lowered"
    for _ in range(10):
        slower = slower.reaching(2e9)
    assert slower.tries == 0, "each takes time"
    published = Machine("H100", Peak(989e12, "published: data sheet"))
    assert published.reaching(2e15) == published
    assert Machine.of(torch.device("cpu"), torch.float32).measure is not None


SPELLINGS = {
    "h100": "H100",
    "a100_80gb": "A100",
    "A100-80GB": "A100",
    "a100 pcie": "A100",
    "rtx 4090": "RTX_4090",
    "rtx4090": "RTX_4090",
    "h100-pcie": "H100_PCIe",
    "H100 80GB HBM3": "H100",
    "NVIDIA H200-NVL": "H200_NVL",
    "mi300x": "MI300X",
    "gh200": "GH200",
}


@pytest.mark.parametrize("spelling", [*SPELLINGS, *PUBLISHED])
def test_case_and_separators_of_a_device_do_not_matter(spelling):
    config = PlanConfig(device=spelling)
    assert config.device == SPELLINGS.get(spelling, spelling)
    assert not list(config.check())


@pytest.mark.parametrize("spelling", ["h1000", "rtx 4090 laptop", "a100x", "nvidia", "80gb", ""])
def test_a_device_of_another_name_is_not_taken_for_one_that_is_known(spelling):
    assert key_of(spelling) is None
