import numpy as np
import pytest
import torch

import txtrain
from tests.models import ids, seeded, shake, tiny
from tests.unit.objectives.conftest import draws, tokenised
from txtrain.checkpoint.load import open_weights
from txtrain.model import options
from txtrain.model.generation import generate
from txtrain.model.position.config import AlibiConfig
from txtrain.objectives.prefix_lm import PrefixLM
from txtrain.objectives.questions import read_by
from txtrain.parallel.deepspeed_engine import Read
from txtrain.training.module import LitModule

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


@pytest.mark.parametrize("changes", [{}, {"attention": options.AttentionConfig(type="gqa", n_kv_heads=2, window=(4, None))}, {"position": AlibiConfig(type="alibi")}])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_a_prompt_is_read_as_the_prefix_that_it_was_in_training(changes, how):
    """Each new token has the largest logit of a forward whose prefix is the prompt; beside shorter prompts too."""
    model = shake(seeded(tiny(**changes))).eval()
    model.prefix_prompts = True
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :7] = 0
    together = generate(model, tokens, mask, max_new_tokens=6, eos_token_id=None, **how)
    for row, n in enumerate((5, 2, 9)):
        alone = tokens[row : row + 1, 9 - n :]
        found = generate(model, alone, max_new_tokens=6, eos_token_id=None, **how)
        assert torch.equal(found[0], together[row, 9 - n :])
        if not how:
            prefix = torch.arange(n + 5)[None] < n
            assert torch.equal(model(found[:, :-1], prefix_mask=prefix).logits[0, n - 1 :].argmax(-1), found[0, n:])
    model.prefix_prompts = False
    assert not torch.equal(generate(model, tokens, mask, max_new_tokens=6, eos_token_id=None, **how), together)


def test_a_run_says_how_its_model_reads_prompts(config, tmp_path):
    """In its samples, from its checkpoint, and where another run begins with it."""
    run = txtrain.train(config("prefix_lm", "trainer.max_steps=1")).run_dir
    assert txtrain.load_pretrained(run).prefix_prompts
    assert LitModule(config("prefix_lm")).model.prefix_prompts
    assert open_weights(run).model.prefix_prompts
    after = config("prefix_lm", "objective=causal_lm", f"init_from={run}", f"run_dir={tmp_path / 'after'}", "trainer.max_steps=1")
    assert not txtrain.load_pretrained(txtrain.train(after).run_dir).prefix_prompts


def test_questions_are_read_from_both_sides_where_the_model_has_learned_to():
    model = shake(seeded(tiny())).eval()
    batch = {"input_ids": ids(2, 10)[:, None], "labels": ids(2, 10)[:, None].clone()}
    batch["labels"][:, :, :6] = -100
    assert set(read_by(model, batch, False)) == {"input_ids", "labels"}
    model.prefix_prompts = True
    read = read_by(model, batch, False)
    assert torch.equal(read["prefix_mask"], (torch.arange(10) < 6).expand(2, 10))
    seen = model(**read).logits[0, 6:]
    assert not torch.allclose(seen, model(batch["input_ids"][:, 0]).logits[0, 6:], atol=1e-4)


def test_questions_are_read_alike_through_what_a_strategy_calls_the_model():
    """DeepSpeed's engine stands around the model; a function, or a module of somebody else, has learned no prefix."""
    model = seeded(tiny())
    model.prefix_prompts = True
    batch = {"input_ids": ids(2, 10)[:, None], "labels": ids(2, 10)[:, None]}
    assert "prefix_mask" in read_by(Read(None, model), batch, False)
    assert "prefix_mask" not in read_by(Read(None, model), {**batch, "attention_mask": batch["labels"]}, True)
    assert "prefix_mask" not in read_by(lambda **given: None, batch, False)
