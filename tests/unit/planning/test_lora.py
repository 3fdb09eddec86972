"""What an adapter costs: its own products and bytes beside a frozen base, as the real model shows them."""

import dataclasses as dc
from unittest import mock

import pytest
from torch.utils.flop_counter import FlopCounterMode

import txtrain
from tests.cases import some
from tests.models import ids, seeded
from tests.unit.planning.test_memory import CUT, HALF, SHARDED, agree
from txtrain.model import stack
from txtrain.model.ffn import moe
from txtrain.model.transform import transform
from txtrain.planning import trained

ALL = "adapter.target_modules=all-linear"
ONE = ((), (ALL, "adapter.lora_dropout=0.1"), (ALL, HALF, "trainer.activation_checkpointing=full"), (ALL, "trainer.activation_checkpointing=selective", "data.micro_batch_size=2"))
SEVERAL = [
    *((1, more) for more in ONE),
    (4, ("strategy=ddp", ALL)),
    (4, (*SHARDED, ALL)),
    (2, ("strategy=fsdp", "data.micro_batch_size=1")),
    *((n, (*more, ALL)) for n, more in CUT),
]
CASES = [(family, world, more) for family in ("gpt2", "llama2", "t5", "deepseek_r1", "bert", "mistral") for world, more in SEVERAL]
DEFAULT = [("gpt2", 1, ONE[1]), ("mistral", 2, (*CUT[0][1], ALL)), ("deepseek_r1", 4, (*SHARDED, ALL))]


def composed(family, *overrides):
    """As `plan` composes it: an adapter's cost does not depend on the weights."""
    sizes = ("model.n_layers=2", "data.global_batch_size=4", "trainer.accelerator=cpu")
    return txtrain.compose([f"model={family}", *sizes, "adapter=lora", *overrides], verb="plan")


@pytest.mark.parametrize("case", some(CASES, DEFAULT[:1]))
def test_counted_equals_simulated(case):
    family, world, overrides = case
    without = ["adapter.lora_dropout=0"] if family == "deepseek_r1" else []
    agree(composed(family, *overrides, *without), world)


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["[experts]", "[gate_proj,q_proj]"])
def test_counted_equals_simulated_where_experts_are_divided(targets):
    agree(composed("deepseek_r1", "strategy=fsdp", "strategy.ep_size=2", f"adapter.target_modules={targets.replace('[experts]', '[experts.up_proj]')}"), 2)


@pytest.mark.parametrize("family", some(("gpt2", "llama2", "deepseek_r1"), ("deepseek_r1",)))
def test_the_forward_and_backward_multiply_as_torch_counts(family):
    sizes = ("model.dim=32", "model.n_heads=2", "model.vocab_size=61", "data.seq_len=12", "model.max_seq_len=12", "data.global_batch_size=3")
    config = composed(family, *sizes, ALL, "adapter.r=4")
    model = seeded(config.model)
    transform(model, config.transforms)
    plain = (mock.patch.object(stack, "choose_kernel", return_value="plain"), mock.patch.object(moe, "_grouped_mm_takes", return_value=False))
    with plain[0], plain[1], FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids(3, 12))
        sum(x.sum() for x in [out.logits, *(out.mtp_logits or ())]).backward()
    assert 3 * trained.work(config, config.lengths, config.trains).once == pytest.approx(counter.get_total_flops(), rel=1e-9)
    figures = txtrain.plan(config)
    assert figures.n_params == sum(p.numel() for p in model.parameters())
    assert figures.n_trained_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert figures.flops_by_part["adapter"] > 0
    whole = txtrain.plan(dc.replace(config, adapter=type(config).__dataclass_fields__["adapter"].default))
    assert "adapter" not in whole.params_by_part
