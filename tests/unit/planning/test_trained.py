"""What is frozen costs no gradient: FLOPs, memory and messages as the real model shows them, over random choices of `freeze`."""

import dataclasses as dc
import functools
import re
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import txtrain
from tests.models import ids, seeded
from tests.unit.planning.test_memory import CUT, FAMILIES, HALF, SHARDED, agree, composed
from txtrain.errors import ConfigError
from txtrain.model import flops, stack
from txtrain.model.ffn import moe
from txtrain.model.transform import Freeze, transform
from txtrain.planning import figures, trained
from txtrain.planning.memory.count import memory

PATTERNS = ("embedding", "attention", "ffn", r"blocks\.0", r"blocks\.1", "norm", "head", "bias", "q_proj", "weight$", "encoder", "experts", "position")
DRAWN = st.sets(st.sampled_from(PATTERNS), min_size=1, max_size=4)


once = functools.cache(composed)


def frozen(family, patterns, *overrides):
    """The configuration with those of the patterns that the family has; None where nothing would be trained, or all."""
    config = once(family, *overrides)
    names = [p.name for p in trained._traced(config, config.lengths).parameters]
    found = tuple(p for p in sorted(patterns) if any(re.search(p, name) for name in names))
    return dc.replace(config, freeze=found) if found and not any(Freeze(found).problems(names)) else None


@pytest.mark.parametrize(("family", "checkpointing"), [*((family, "full") for family in FAMILIES), ("t5", 4), ("deepseek_r1", 2)])
def test_the_tape_multiplies_as_the_closed_forms_say(family, checkpointing):
    config = dc.replace(once(family), trainer=dc.replace(once(family).trainer, activation_checkpointing=checkpointing))
    tape, n = trained._traced(config, config.lengths), config.data.global_batch_size
    forward = flops.forward_by_part(config.model, *config.lengths, dense=False, training=True, target_share=config.objective.target_share)
    again = config.model.recomputed_flops(*config.lengths, checkpointing=checkpointing)
    allowed = 1e-3  # the number of positions that BERT predicts is whole
    assert tape.forward_flops / n == pytest.approx(sum(forward.values()), rel=allowed)
    assert tape.backward_flops / n == pytest.approx(flops.training_flops(forward) - sum(forward.values()), rel=allowed)
    assert tape.recomputed / n == pytest.approx(again)
    parts = dict.fromkeys(config.model.n_params_by_part(), 0)
    for p in tape.parameters:
        parts[trained.part_of(p.name)] += p.n
    assert parts == config.model.n_params_by_part()


@pytest.mark.parametrize("share", [True, False])
def test_two_stacks_have_the_parameters_of_the_embeddings_that_they_read(share):
    config = once("t5", "model.embedding.norm=true", "model.embedding.n_types=2", f"model.share_embeddings={share}".lower())
    traced = [(p.name, p.shape) for p in trained._traced(config, config.lengths).parameters]
    assert sorted(traced) == sorted((name, tuple(p.shape)) for name, p in seeded(config.model).named_parameters())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sampled_from(["gpt2", "llama2", "gemma2", "deepseek_r1"]), DRAWN)
def test_the_backward_multiplies_for_what_is_trained_alone(family, patterns):
    """As torch counts it on the real model, attention by the plain formula."""
    sizes = ("model.dim=32", "model.n_heads=2", "model.vocab_size=61", "data.seq_len=12", "model.max_seq_len=12", "data.global_batch_size=3")
    config = frozen(family, patterns, *sizes, *(["model.attention.window=null"] if family == "gemma2" else []))
    if config is None:
        return
    model = seeded(config.model)
    transform(model, config.transforms)
    plain = (mock.patch.object(stack, "choose_kernel", return_value="plain"), mock.patch.object(moe, "_grouped_mm_takes", return_value=False))
    with plain[0], plain[1], FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids(3, 12))
        forward = counter.get_total_flops()
        sum(x.sum() for x in [out.logits, *(out.mtp_logits or ())]).backward()
    backward = counter.get_total_flops() - forward
    assert 3 * trained.work(config, config.lengths, config.trains).once - forward == pytest.approx(backward, rel=1e-9), config.freeze


def test_below_the_lowest_trained_parameter_there_is_no_backward():
    whole, top = (txtrain.plan(dc.replace(once("llama2"), freeze=patterns)) for patterns in ((), ("embedding", "blocks")))
    head = top.flops_by_part["head"]
    assert top.flops_per_sample == sum(top.flops_by_part.values()) + 2 * head, "final_norm below the head takes a gradient"
    assert whole.flops_per_sample == 3 * sum(whole.flops_by_part.values())
    assert top.n_trained_params == sum(top.trained_by_part.values()) < whole.n_trained_params == whole.n_params
    assert top.trained_by_part.keys() == {"head", "norms"}
    assert top.memory_by_part["optimizer"] == 2 * 4 * top.n_trained_params + 4 * 2, "two moments, and two counters of steps"


def test_what_is_frozen_of_a_users_own_is_counted_as_built():
    own = ["an ffn of your own"]
    with mock.patch.object(trained, "untraced", return_value=own), mock.patch.object(figures, "untraced", return_value=own):
        found = txtrain.plan(dc.replace(once("llama2"), freeze=("ffn",)))
    assert "ffn" not in found.trained_by_part
    assert "as if nothing were frozen" in found.flops_missing


def test_a_mistyped_pattern_is_told():
    with pytest.raises(ConfigError, match="Did you mean"):
        txtrain.plan(dc.replace(once("llama2"), freeze=("atention",)))


def test_counted_equals_simulated_on_one_process():
    agree(dc.replace(once("gpt2"), freeze=("embedding", "blocks.0")), 1)


ONE = ((), (HALF, "trainer.activation_checkpointing=full"), ("trainer.activation_checkpointing=selective", "data.micro_batch_size=2"))
SEVERAL = [(1, more) for more in ONE] + [
    (4, ("strategy=ddp",)),
    (4, SHARDED),
    (2, ("strategy=fsdp", "data.micro_batch_size=1")),
    (2, ("strategy=fsdp", "strategy.reshard_after_forward=false")),
    *CUT,
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "overrides"), SEVERAL)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from(FAMILIES), DRAWN)
def test_counted_equals_simulated_whatever_is_frozen(world, overrides, family, patterns):
    if (config := frozen(family, patterns, *overrides)) is not None:
        agree(config, world)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["[experts]", "[embedding,'blocks.0','blocks.1.attention',norm]"])
def test_counted_equals_simulated_where_experts_are_divided(freeze):
    config = composed("deepseek_r1", "strategy=fsdp", "strategy.ep_size=2", f"freeze={freeze}")
    agree(config, 2)
    assert memory(config, 2).communicated["all_to_all"] < memory(composed("deepseek_r1", "strategy=fsdp", "strategy.ep_size=2"), 2).communicated["all_to_all"]
