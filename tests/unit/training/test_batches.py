"""What a batch goes through between the loader and the objective."""

import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from txtrain.training.batches import as_bits, from_bits


def test_numbers_that_are_learned_or_compared_pass_lightnings_rounding() -> None:
    exact = {name: torch.tensor([1001.5, -0.1]) for name in ("labels", "reference_log_probs", "teacher_log_probs")}
    batch = {**exact, "pixel_values": torch.tensor([1001.5]), "input_ids": torch.tensor([3])}
    given = from_bits(HalfPrecision("bf16-true").convert_input(as_bits(batch)))
    assert all(torch.equal(given[name], x) for name, x in exact.items())
    assert given["pixel_values"].dtype is torch.bfloat16
    assert torch.equal(given["input_ids"], batch["input_ids"])
    assert as_bits({"labels": torch.tensor([3])}).keys() == {"labels"}
