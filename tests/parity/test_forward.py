from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parity.pairs import (
    DECODERS,
    EACH_SEED,
    FAMILIES,
    Pair,
    by_their_names,
    difference,
    inputs,
    labelled,
    logits_of,
    our_cached,
    pair,
    their_cached,
    tokens,
)
from txtrain.hf.name_map import respelt

every_family, every_decoder = pytest.mark.parametrize("family", FAMILIES), pytest.mark.parametrize("family", DECODERS)
every_seed = pytest.mark.parametrize("seed", EACH_SEED)


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[0, : ids.shape[1] // 2] = -100
    labels[-1, -3:] = -100
    return labels


def padded(p: Pair, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 24, 19 and 10 real tokens."""
    ids, mask = tokens(p), torch.ones(3, 24, dtype=torch.long)
    for row, n in ((1, 5), (2, 14)):
        mask[row, slice(None, n) if side == "left" else slice(-n, None)] = 0
    return ids, mask


def with_padding(p: Pair, side: str, **beside: torch.Tensor) -> Iterator[float]:
    """Differences of the real tokens' logits, positions counted over the padding and from the mask."""
    ids, mask = padded(p, side)
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **beside}
        yield difference(*(_of_tokens(model(**given))[mask.bool()] for model in (p.ours, p.theirs)))


def _of_tokens(out: Any) -> torch.Tensor:
    return out.prediction_logits if hasattr(out, "prediction_logits") else out.logits


@torch.no_grad()
@every_family
@every_seed
def test_logits_equal(family, seed, record):
    p = pair(family, seed)
    record(family, "logits", difference(logits_of(p.ours(**inputs(p))), logits_of(p.theirs(**inputs(p)))))


@torch.no_grad()
@every_family
@every_seed
def test_loss_with_labels_equals(family, seed, record):
    p = pair(family, seed)
    theirs = p.theirs(**labelled(p)).loss
    for return_logits in (True, False):
        record(family, "loss", difference(p.ours(**labelled(p), return_logits=return_logits).loss, theirs))


def their_gradients(p: Pair) -> dict[str, torch.Tensor]:
    """By the names that files have. The bias of an untied BERT that version 5 does not read has none."""
    parameters = {respelt(name, p.hf.renamed): x for name, x in p.theirs.named_parameters() if x.requires_grad}
    gradients = torch.autograd.grad(p.theirs(**labelled(p)).loss, parameters.values(), allow_unused=True)
    assert {name for name, g in zip(parameters, gradients, strict=True) if g is None} <= {"cls.predictions.bias"}
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


@every_family
@every_seed
def test_gradient_of_every_parameter_equals(family, seed, record):
    p = pair(family, seed)
    theirs = their_gradients(p)
    parameters = dict(p.ours.named_parameters())
    ours = torch.autograd.grad(p.ours(**labelled(p)).loss, parameters.values())
    ours = by_their_names(p, dict(zip(parameters, ours, strict=True)))
    # The first is a buffer there; of the others one is the other's second name.
    assert theirs.keys() ^ ours.keys() <= {"final_logits_bias", "cls.predictions.bias", "cls.predictions.decoder.bias"}
    largest = max(g.abs().max() for g in theirs.values())
    for name, gradient in theirs.items():
        if name.endswith(("key.bias", "k_proj.bias")) and p.ours.config.position.type != "rope":
            assert max(gradient.abs().max(), ours[name].abs().max()) < 1e-5 * largest, "the same is added to all scores of a query: only rounding is left"
            continue
        assert gradient.abs().max() > 0, f"{name} has no gradient: nothing is compared"
        record(family, "gradients", difference(ours[name], gradient))


@torch.no_grad()
@every_decoder
@every_seed
@pytest.mark.parametrize("n_prompt", [1, 11])
def test_cached_decoding_equals(family, seed, n_prompt, record):
    p, ids = pair(family, seed), tokens(pair(family, seed))
    theirs = p.theirs(ids).logits if family == "gpt1" else their_cached(p.theirs, ids, n_prompt)
    record(family, "cached decoding", difference(our_cached(p.ours, ids, n_prompt), theirs))


@torch.no_grad()
@every_decoder
@every_seed
@pytest.mark.parametrize("side", ["left", "right"])
def test_real_tokens_do_not_see_padding(family, seed, side, record):
    for found in with_padding(pair(family, seed), side):
        record(family, f"{side} padding", found)


@torch.no_grad()
@every_decoder
@every_seed
def test_vectors_in_place_of_tokens_equal(family, seed, record):
    p = pair(family, seed)
    x = torch.randn(2, 9, p.ours.config.dim, generator=torch.Generator().manual_seed(seed))
    theirs_scales = family.startswith("gemma") and not hasattr(p.theirs.get_input_embeddings(), "embed_scale")
    given = x / p.ours.config.dim**0.5 if theirs_scales else x
    record(family, "inputs_embeds", difference(p.ours(inputs_embeds=x).logits, p.theirs(inputs_embeds=given).logits))
