"""Properties that hold for every legal combination of the axes."""

import pytest
import torch
from hypothesis import given, settings

from tests.models import ids, model_configs, moved, seeded, shake
from txtrain.model.config import ModelConfig
from txtrain.model.transformer import Transformer

COMBINATIONS = settings(max_examples=30, deadline=None, derandomize=True)
MORE = settings(max_examples=1000, deadline=None)


def forward_and_backward(config: ModelConfig) -> None:
    model = seeded(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params
    tokens = ids()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    assert out.logits.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert p.grad.isfinite().all(), f"{name}: gradient not finite"
    full, chunked = out.loss.item(), model(tokens, labels=tokens, return_logits=False).loss.item()
    assert chunked == pytest.approx(full, rel=1e-5)


def precise(config: ModelConfig) -> Transformer:
    """In double precision: without norms activations may grow until float32's rounding alone passes any bound."""
    return shake(seeded(config)).eval().double()


def independent_of_the_future(config: ModelConfig) -> None:
    model = precise(config)
    tokens = ids()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % config.vocab_size
    a, b = model(tokens).logits, model(changed).logits
    leak = moved(config, a[:, :9], b[:, :9])
    assert leak == 0, f"leak: {leak:.2e}"
    assert not torch.equal(a[:, 9:], b[:, 9:])


def packing_equals_documents_apart(config: ModelConfig) -> None:
    model = precise(config)
    tokens, cut = ids(), 7
    documents = torch.tensor([0] * cut + [1] * (tokens.shape[1] - cut)).expand_as(tokens)
    packed = model(tokens, document_ids=documents).logits
    apart = torch.cat((model(tokens[:, :cut]).logits, model(tokens[:, cut:]).logits), dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


def padding_changes_nothing(config: ModelConfig) -> None:
    model = precise(config)
    tokens, pad = ids(), 5
    alone = model(tokens).logits
    junk = torch.full((2, pad), 3)
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(junk)
    right = model(torch.cat((tokens, junk), 1), attention_mask=torch.cat((ones, zeros), 1)).logits
    torch.testing.assert_close(right[:, : tokens.shape[1]], alone, rtol=1e-4, atol=1e-4)
    mask = torch.cat((zeros, ones), 1)
    left = model(torch.cat((junk, tokens), 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(left[:, pad:], alone, rtol=1e-4, atol=1e-4)
    assert left.isfinite().all()


def cache_equals_one_pass(config: ModelConfig) -> None:
    model = precise(config)
    tokens = ids()
    whole = model(tokens).logits
    past, pieces = None, []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 11), *((i, i + 1) for i in range(11, 16))):
            out = model(tokens[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


PROPERTIES = [forward_and_backward, independent_of_the_future, packing_equals_documents_apart, padding_changes_nothing, cache_equals_one_pass]
each_property = pytest.mark.parametrize("holds", PROPERTIES, ids=lambda f: f.__name__)


@each_property
def test_every_legal_combination(holds):
    given(config=model_configs)(COMBINATIONS(lambda config: holds(config)))()


@pytest.mark.slow
@each_property
def test_every_legal_combination_many_draws(holds):
    given(config=model_configs)(MORE(lambda config: holds(config)))()
