import copy

import pytest
import torch
import transformers
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from tests.cases import some
from tests.parity.every import EVERY, pair
from tests.parity.pairs import difference
from txtrain.hf.trainer import build_model

pytest.importorskip("accelerate")


class Tokenizer:
    """What the collators of transformers ask of a tokenizer."""

    pad_token_id, pad_token, padding_side = 3, "<pad>", "right"
    mask_token_id, mask_token = 2, "<mask>"

    def __init__(self, vocab_size=0):
        self.vocab_size = vocab_size

    def __len__(self):
        return self.vocab_size

    def pad(self, examples, **kwargs):
        length = max(len(e["input_ids"]) for e in examples)
        fill = {"input_ids": self.pad_token_id, "token_type_ids": 0}
        made = {name: torch.tensor([e[name] + [fill[name]] * (length - len(e[name])) for e in examples]) for name in fill if name in examples[0]}
        made["attention_mask"] = torch.tensor([[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples])
        beside = {name: torch.tensor([e[name] for e in examples]) for name in examples[0] if name in ("labels", "next_sentence_label")}
        return transformers.BatchEncoding({**made, **beside})

    def convert_tokens_to_ids(self, token):
        return {self.mask_token: self.mask_token_id, self.pad_token: self.pad_token_id}[token]

    def get_special_tokens_mask(self, ids, already_has_special_tokens=True):
        return [int(i < 4) for i in ids]


def rows(p, n=40):
    """Of different lengths, so that the mean of the micro-batches' means is not the mean over the tokens."""
    generator = torch.Generator().manual_seed(0)
    config = p.ours.config
    if config.embedding.type == "patch":
        size = (config.embedding.n_channels, config.embedding.image_size, config.embedding.image_size)
        return [{"pixel_values": torch.randn(size, generator=generator), "labels": i % 2} for i in range(n)]
    made = [{"input_ids": torch.randint(4, p.vocab_size, (3 + 3 * i % 17,), generator=generator).tolist()} for i in range(n)]
    if config.topology == "encoder_decoder":
        return [{**row, "labels": row["input_ids"][: 2 + 5 * i % 11]} for i, row in enumerate(made)]
    if config.topology == "encoder":
        made = [{**row, "token_type_ids": [int(t > len(row["input_ids"]) // 2) for t in range(len(row["input_ids"]))]} for row in made]
    if getattr(config.head, "next_sentence", False):
        made = [{**row, "next_sentence_label": i % 2} for i, row in enumerate(made)]
    return made


def collator(p):
    """The one that the users of this kind of model take."""
    config, tokenizer = p.ours.config, Tokenizer(p.vocab_size)
    if config.embedding.type == "patch":
        return default_data_collator
    if config.topology == "encoder_decoder":
        return DataCollatorForSeq2Seq(tokenizer)
    if config.topology == "encoder":
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0)
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def train(model, data, collator, folder, accumulation=2):
    """The loss of every micro-batch, unrounded, and the trainer."""
    transformers.set_seed(0)
    losses = []
    model.register_forward_hook(lambda model, args, out: losses.append(out.loss.item()))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
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
        if not any((config.dropout, config.output_dropout, config.attention.dropout, config.ffn.dropout)):
            return pair(family, seed)
    raise AssertionError(f"no {family} without dropout among the draws")


# The loss of these classes is the mean of each micro-batch, whatever number of targets the Trainer tells them of: only without
# accumulation do they train on the mean over the targets, as ours always do.
MEANS = ("bert", "bert_mlm", "t5", "t5_v1_1", "transformer")


@pytest.mark.parametrize("family", some(EVERY, ("gemma2", "bert_mlm", "vit", "t5")))
def test_trainer_of_transformers_gives_the_losses_of_their_model(family, tmp_path, record):
    p = without_dropout(family)
    accumulation = 1 if family in MEANS else 2
    theirs, _ = train(copy.deepcopy(p.theirs), rows(p), collator(p), tmp_path, accumulation)
    model = copy.deepcopy(p.ours)
    if family == "transformer" and model.head.bias is not None:
        model.head.bias.requires_grad_(False)  # Marian's is a buffer in transformers, which never trains it
    ours, trainer = train(model, rows(p), collator(p), tmp_path, accumulation)
    assert len(ours) == 10 * accumulation
    moved = max((after - before).abs().max() for after, before in zip(trainer.model.parameters(), p.ours.parameters(), strict=True))
    assert moved > 1e-3, f"the weights moved by {moved} only: nothing is compared after the first step"
    record(family, "losses of the Trainer", difference(torch.tensor(ours), torch.tensor(theirs)))


@pytest.mark.parametrize("family", ["bert_mlm", "t5", "vit"])
def test_micro_batches_of_a_model_built_here_add_up_to_the_mean_over_the_targets(family, tmp_path):
    """Nothing but the model tells the trainer of version 5 which labels are targets: of a causal one the first of a row is none (version 4
    counts it all the same).
    """
    p = without_dropout(family)
    model = build_model(p.ours.config)
    data = rows(p, 4)
    made = collator(p)(data)  # masks included: the collator of masked words draws others at each call
    whole = model(**made).loss.item()
    data = [{name: x[i] for name, x in made.items()} for i in range(4)]
    losses, _ = train(model, data, default_data_collator, tmp_path)
    assert sum(losses[:2]) == pytest.approx(whole, rel=1e-5)


def test_trainer_of_transformers_evaluates_and_predicts(tmp_path):
    p = without_dropout("llama2")
    theirs, ours = (train(copy.deepcopy(model), rows(p), collator(p), tmp_path)[1] for model in (p.theirs, p.ours))
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
