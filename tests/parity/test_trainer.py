import copy

import pytest
import torch
import transformers
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, default_data_collator

from tests.parity.pairs import DECODERS, difference, pair

pytest.importorskip("accelerate")


class Tokenizer:
    """What the collator for language modelling asks of a tokenizer."""

    pad_token_id, mask_token, pad_token, padding_side = 3, None, "<pad>", "right"

    def pad(self, examples, **kwargs):
        length = max(len(e["input_ids"]) for e in examples)
        rows = [e["input_ids"] + [self.pad_token_id] * (length - len(e["input_ids"])) for e in examples]
        masks = [[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples]
        return transformers.BatchEncoding({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)})


def rows(p, n=40):
    """Of different lengths, so that the mean of the micro-batches' means is not the mean over the tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(4, p.vocab_size, (3 + 3 * i % 17,), generator=generator).tolist()} for i in range(n)]


def train(model, data, collator, folder):
    """The loss of every micro-batch, unrounded, and the trainer."""
    transformers.set_seed(0)
    losses = []
    model.register_forward_hook(lambda model, args, out: losses.append(out.loss.item()))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:6], data_collator=collator)
    trainer.train()
    return losses, trainer


def without_dropout(family):
    """Theirs and ours draw their dropout in another order."""
    for seed in range(50):
        config = pair(family, seed).ours.config
        if config.dropout == 0 and config.attention.dropout == 0:
            return pair(family, seed)
    raise AssertionError(f"no {family} without dropout among the draws")


COLLATOR = DataCollatorForLanguageModeling(Tokenizer(), mlm=False)


@pytest.mark.parametrize("family", DECODERS)
def test_trainer_of_transformers_gives_the_losses_of_their_model(family, tmp_path, record):
    p = without_dropout(family)
    theirs, _ = train(copy.deepcopy(p.theirs), rows(p), COLLATOR, tmp_path)
    ours, trainer = train(copy.deepcopy(p.ours), rows(p), COLLATOR, tmp_path)
    assert len(ours) == 20
    moved = (trainer.model.embedding.token.weight - p.ours.embedding.token.weight).abs().max()
    assert moved > 1e-3, f"the weights moved by {moved} only: nothing is compared after the first step"
    record(family, "losses of the Trainer", difference(torch.tensor(ours), torch.tensor(theirs)))


def test_trainer_of_transformers_evaluates_and_predicts(tmp_path):
    p = without_dropout("llama2")
    theirs, ours = (train(copy.deepcopy(model), rows(p), COLLATOR, tmp_path)[1] for model in (p.theirs, p.ours))
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    here, there = ours.predict(rows(p)[:6]).predictions, theirs.predict(rows(p)[:6]).predictions
    assert here.shape == there.shape, "after the loss, the logits are all that the trainer finds"
    assert abs(here - there).max() < 1e-3


def test_default_collator_trains(tmp_path):
    p = pair("gpt2", 0)
    data = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, -100, 8], "attention_mask": [1, 1, 1, 1]}] * 4
    losses, _ = train(copy.deepcopy(p.ours), data, default_data_collator, tmp_path)
    assert losses[-1] < losses[0]


def test_a_config_gives_the_trainer_what_it_asks_for_and_stays_a_value():
    config = pair("gpt2", 0).ours.config
    assert '"dim"' in config.to_json_string()
    config.use_cache = False
    config.get_text_config().eos_token_id = 7
    assert config.eos_token_id != 7
    with pytest.raises(AttributeError):
        config.dim = 3
