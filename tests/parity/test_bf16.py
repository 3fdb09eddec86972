import itertools

import pytest
import torch

from tests.cases import some
from tests.parity.every import EVERY, pair
from tests.parity.pairs import DECODERS, SEEDS, difference, inputs, logits_of, tokens
from tests.parity.test_deepseek import eager
from txtrain.hf.load import load_pretrained


def in_bf16(given):
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.items()}


def their_runs(p):
    """Runs of transformers in bfloat16: eager, SDPA where the class has it, and autocast over weights in float32."""

    def loaded(attention):
        model = type(p.theirs).from_pretrained(p.folder, dtype=torch.bfloat16, attn_implementation=attention)
        return eager(model.eval())(**in_bf16(inputs(p)))

    runs = [loaded("eager"), *([loaded("sdpa")] if p.theirs._supports_sdpa else [])]
    with torch.autocast("cpu", torch.bfloat16):
        return [logits_of(out) for out in (*runs, p.theirs(**inputs(p)))]


@torch.no_grad()
@pytest.mark.parametrize("family", some(EVERY, ("gpt2", "gemma2", "bert", "vit", "transformer")))
def test_bf16_differs_by_no_more_than_two_runs_of_theirs(family, record):
    ours, theirs = [], []
    for seed in SEEDS:
        p = pair(family, seed)
        runs = their_runs(p)
        here = logits_of(load_pretrained(p.folder, dtype=torch.bfloat16)(**in_bf16(inputs(p))))
        assert here.dtype is torch.bfloat16
        ours.append(min(difference(here, run) for run in runs))
        theirs.append(max(difference(a, b) for a, b in itertools.combinations(runs, 2)))
    assert max(theirs) > 0
    record(family, "bf16 logits", max(ours) / max(theirs), allowed=1.0)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS[2:])
def test_bf16_is_bitwise_theirs_with_the_same_kernel(family, monkeypatch):
    monkeypatch.setattr("txtrain.model.stack.choose_kernel", lambda mask, **_: "plain")
    for seed in SEEDS:
        p, ids = pair(family, seed), tokens(pair(family, seed))
        theirs = type(p.theirs).from_pretrained(p.folder, dtype=torch.bfloat16, attn_implementation="eager").eval()(ids).logits
        assert torch.equal(load_pretrained(p.folder, dtype=torch.bfloat16)(ids).logits, theirs)
