import numpy as np
import torch

from tests.models import ids, seeded, shake, tiny
from tests.unit.objectives.conftest import draws, tokenised
from txtrain.objectives.prefix_lm import PrefixLM

DOCUMENTS = ["abcdefghij" * 5 for _ in range(30)]


def samples(tmp_path, two_stacks: bool):
    text = tokenised(tmp_path, DOCUMENTS, (), 24)
    rows = PrefixLM(two_stacks).samples(text)
    n = len(rows)
    return rows.batch(np.arange(n), draws(n)), rows.rows.batch(np.arange(n), draws(n))


def test_one_stack_sees_the_prefix_and_predicts_the_rest(tmp_path):
    batch, plain = samples(tmp_path, False)
    prefix = batch["prefix_mask"]
    lengths = prefix.sum(1)
    assert torch.equal(prefix, torch.arange(24) < lengths[:, None])
    assert (int(lengths.min()), int(lengths.max())) == (1, 23)
    assert bool((batch["labels"][prefix] == -100).all())
    assert torch.equal(batch["labels"][~prefix], plain["labels"][~prefix])
    assert torch.equal(batch["input_ids"], plain["input_ids"])


def test_two_stacks_divide_the_text(tmp_path):
    batch, plain = samples(tmp_path, True)
    for text, documents, i in zip(plain["input_ids"].tolist(), plain["document_ids"].tolist(), range(len(plain["input_ids"])), strict=True):
        real, written = batch["attention_mask"][i] != 0, batch["labels"][i] != -100
        assert batch["input_ids"][i][real].tolist() + batch["labels"][i][written].tolist() == text
        assert batch["document_ids"][i][real].tolist() + batch["decoder_document_ids"][i][written].tolist() == documents
        assert bool(real.any())
        assert bool(written.any())


def test_a_later_token_of_the_prefix_changes_what_an_earlier_one_says():
    """The prefix is read from both sides; what follows it is not."""
    model = shake(seeded(tiny())).eval()
    tokens = ids(1, 10)
    prefix = torch.arange(10)[None] < 6
    plain = model(tokens, prefix_mask=prefix).logits
    for changed, seen_at in ((5, range(10)), (8, range(8, 10))):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 61
        differs = (model(other, prefix_mask=prefix).logits - plain).abs().amax(-1)[0] > 1e-6
        assert differs.nonzero().flatten().tolist() == list(seen_at)
