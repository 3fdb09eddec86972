import pytest
import torch

from tests.parity.pairs import EACH_SEED, TWO_STACKS, T, difference, inputs, our_cached, pair, their_cached
from tests.parity.test_forward import padded

pytestmark = [pytest.mark.parametrize("family", TWO_STACKS), pytest.mark.parametrize("seed", EACH_SEED)]


@torch.no_grad()
@pytest.mark.parametrize("n_prompt", [1, 9])
def test_cached_decoding_reads_the_source_once_and_equals(family, seed, n_prompt, record):
    p = pair(family, seed)
    source, mask = padded(p, "right")
    target = inputs(p)["decoder_input_ids"]
    encoded = p.theirs.get_encoder()(source, attention_mask=mask)
    theirs = their_cached(p.theirs, target, n_prompt, encoder_outputs=encoded, attention_mask=mask)
    ours = our_cached(p.ours, target, n_prompt, input_ids=source, attention_mask=mask)
    record(family, "cached decoding", difference(ours, theirs))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_target_does_not_see_padding_of_the_source(family, seed, side, record):
    p = pair(family, seed)
    source, mask = padded(p, side)
    given = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": inputs(p)["decoder_input_ids"]}
    record(family, f"{side} padding", difference(p.ours(**given).logits, p.theirs(**given).logits))
    changed = p.ours(**{**given, "input_ids": source.masked_fill(mask == 0, 5)}).logits
    assert torch.equal(changed, p.ours(**given).logits)


@torch.no_grad()
def test_padding_of_the_target_equals(family, seed, record):
    p, given = pair(family, seed), inputs(pair(family, seed))
    mask = torch.ones_like(given["decoder_input_ids"])
    mask[1, -5:] = 0
    given["decoder_attention_mask"] = mask
    record(family, "right padding", difference(p.ours(**given).logits[mask.bool()], p.theirs(**given).logits[mask.bool()]))


@torch.no_grad()
def test_vectors_in_place_of_the_sources_tokens_equal(family, seed, record):
    p = pair(family, seed)
    x = torch.randn(3, T, p.ours.config.dim, generator=torch.Generator().manual_seed(seed))
    given = {"inputs_embeds": x, "decoder_input_ids": inputs(p)["decoder_input_ids"]}
    record(family, "inputs_embeds", difference(p.ours(**given).logits, p.theirs(**given).logits))
