import pytest
import torch

from tests.parity.pairs import EACH_SEED, difference, inputs, labelled, logits_of, pair
from tests.parity.test_forward import with_padding

every_bert = pytest.mark.parametrize("family", ["bert", "bert_mlm"])
every_seed = pytest.mark.parametrize("seed", EACH_SEED)


@torch.no_grad()
@every_bert
@every_seed
@pytest.mark.parametrize("side", ["left", "right"])
def test_real_tokens_do_not_see_padding(family, seed, side, record):
    p = pair(family, seed)
    for found in with_padding(p, side, token_type_ids=inputs(p)["token_type_ids"]):
        record(family, f"{side} padding", found)


@torch.no_grad()
@every_bert
@every_seed
def test_vectors_in_place_of_tokens_and_no_segments_equal(family, seed, record):
    p = pair(family, seed)
    x = torch.randn(2, 9, p.ours.config.dim, generator=torch.Generator().manual_seed(seed))
    record(family, "inputs_embeds", difference(logits_of(p.ours(inputs_embeds=x)), logits_of(p.theirs(inputs_embeds=x))))


@torch.no_grad()
@every_seed
def test_loss_of_sentences_is_added_to_that_of_masked_words(seed, record):
    p, given = pair("bert", seed), labelled(pair("bert", seed))
    both = p.ours(**given).loss
    sentences = {"next_sentence_label": given.pop("next_sentence_label")}
    words = p.ours(**given).loss
    del given["labels"]
    assert torch.allclose(words + p.ours(**given, **sentences).loss, both)
    record("bert", "loss", difference(both, p.theirs(**labelled(p)).loss))


@torch.no_grad()
@every_seed
def test_images_of_another_resolution_equal(seed, record):
    """Rows and columns of patches differ from each other too."""
    p = pair("vit", seed)
    e = p.ours.config.embedding
    pixels = torch.randn(2, e.n_channels, 5 * e.patch_size, 7 * e.patch_size, generator=torch.Generator().manual_seed(seed))
    record("vit", "another resolution", difference(p.ours(pixel_values=pixels).logits, p.theirs(pixels, interpolate_pos_encoding=True).logits))


def test_accumulated_batches_add_up_to_the_loss_of_both_kinds():
    """As `transformers.Trainer` accumulates: num_items_in_batch is of all of them."""
    model = pair("bert", 0).ours.eval()
    ids = torch.arange(32).view(4, 8) % 20 + 5
    labels = ids.masked_fill(torch.arange(8) % 4 != 1, -100)  # as many words in each row
    given = {"input_ids": ids, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    whole = model(**given, num_items_in_batch=8).loss
    parts = [model(**{name: value[i : i + 1] for name, value in given.items()}, num_items_in_batch=8).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    assert whole != model(**{**given, "next_sentence_label": 1 - given["next_sentence_label"]}, num_items_in_batch=8).loss
