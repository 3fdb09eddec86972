import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.model.beam_search import beam_search
from txtrain.objectives.base import build_objective
from txtrain.objectives.score_sums import STATISTICS
from txtrain.objectives.seq2seq import Seq2Seq
from txtrain.training.data_module import DataModule
from txtrain.training.module import LitModule


@pytest.fixture
def case(config):
    made = config("seq2seq")
    module = LitModule(made)
    module.configure_model()
    (batch,) = itertools.islice(DataModule(made).train_dataloader(), 1)
    return module.model.eval(), batch


def test_label_smoothing_is_torchs_over_the_global_batch(case):
    model, batch = case
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).logits
    reference = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, label_smoothing=0.1)
    objective = Seq2Seq(label_smoothing=0.1)
    n = objective.denominators(batch)
    assert int(n["loss"]) == int((batch["labels"] != -100).sum())
    whole = objective(model, batch, n)["loss"]
    assert torch.allclose(whole, reference, rtol=1e-6)
    halves = [objective(model, {k: v[part] for k, v in batch.items()}, n)["loss"] for part in (slice(0, 3), slice(3, 8))]
    assert torch.allclose(sum(halves), reference, rtol=1e-6)


def test_validation_is_without_smoothing(case):
    model, batch = case
    smooth, plain = Seq2Seq(label_smoothing=0.3), Seq2Seq()
    total, count = smooth.validate(model, batch)["loss"]
    assert torch.equal(total / count, plain(model, batch, plain.denominators(batch))["loss"])
    assert not torch.allclose(smooth(model, batch, smooth.denominators(batch))["loss"], total / count)


def test_padding_changes_nothing(case):
    model, batch = case
    objective = Seq2Seq()
    wider = {
        "input_ids": F.pad(batch["input_ids"], (0, 5), value=3),
        "attention_mask": F.pad(batch["attention_mask"], (0, 5)),
        "labels": F.pad(batch["labels"], (0, 4), value=-100),
    }
    losses = [objective(model, b, objective.denominators(b))["loss"] for b in (batch, wider)]
    assert torch.allclose(*losses, rtol=1e-5)


def test_answers_end_before_their_end_token(case, monkeypatch):
    model, batch = case
    batch = {name: x[:2] for name, x in batch.items()}
    made = torch.tensor([[0, 5, 6, 256, 256], [0, 5, 6, 7, 8]])
    monkeypatch.setattr("txtrain.objectives.seq2seq.generate", lambda *args, **kwargs: made)
    assert Seq2Seq().answered(model, batch, 256) == [[5, 6], [5, 6, 7, 8]]


def test_beams_answer_what_the_beam_search_finds_and_may_be_stopped(case):
    model, batch = case
    objective = Seq2Seq(num_beams=3, length_penalty=1.0)
    answers = objective.answered(model, batch, 256)
    for answer, source, mask in zip(answers, batch["input_ids"], batch["attention_mask"], strict=True):
        source = source[mask != 0][None]
        row = beam_search(model, source, None, 3, 1.0, max_new_tokens=source.shape[1] + 50, eos_token_id=256)[0, 1:].tolist()
        assert answer == (row[: row.index(256)] if 256 in row else row)
    assert answers != Seq2Seq().answered(model, batch, 256)
    calls = itertools.count()

    def stop():
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objective.answered(model, batch, 256, stop)
    assert next(calls) == 3


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_is_as_long_as_its_own_source_allows(num_beams, case):
    """At most 50 tokens more, whatever the batch is padded to."""
    model, _ = case
    source = torch.arange(2 * 12).view(2, 12) % 60 + 4
    batch = {"input_ids": source, "attention_mask": (torch.arange(12) < torch.tensor([[3], [12]])).long()}
    objective = Seq2Seq(num_beams=num_beams)
    answers = objective.answered(model, batch, 256)
    assert [len(answer) for answer in answers] == [53, 62], "this model ends no text"
    alone = {"input_ids": source[:1, :3], "attention_mask": torch.ones(1, 3)}
    assert objective.answered(model, alone, 256) == answers[:1]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_decoding_for_a_score_is_stopped_between_two_tokens(num_beams, case, config):
    data, calls = DataModule(config("seq2seq")), itertools.count()
    data.prepare()
    objective = Seq2Seq(num_beams=num_beams, scores=("exact_match",), n_decoded=4)

    def stop():
        if next(calls) == 2:
            raise KeyboardInterrupt

    objective.check = stop
    with pytest.raises(KeyboardInterrupt):
        objective.examine(case[0], data, 4)
    assert next(calls) == 3


def test_scores_are_those_of_known_answers():
    tokenizer = byte_tokenizer()
    said = [tokenizer.encode(t) for t in ("the cat sat on the mat today", "a dog barked at the old tree")]
    other = [said[0], tokenizer.encode("something else entirely was said here")]
    objective = Seq2Seq(scores=tuple(STATISTICS))

    def scores(answers):
        tables = {name: of(answers, said, tokenizer) for name, of in STATISTICS.items()}
        return objective.figures({name: table.sum(0).numpy() for name, table in tables.items()})

    same, found = scores(said), scores(other)
    for name, best in (("exact_match", 1.0), ("bleu", 100.0), ("chrf", 100.0)):
        assert same[name] == pytest.approx(best)
        assert 0 < found[name] < best
    assert found["exact_match"] == 0.5


def test_the_data_choose_the_scores_unless_the_objective_does(config):
    assert build_objective(config("seq2seq")).metrics == ("exact_match",)
    assert build_objective(config("seq2seq", "objective.scores=[bleu,chrf]")).metrics == ("bleu", "chrf")
    assert build_objective(config("seq2seq", "objective.n_decoded=0")).metrics == ()


def test_decoding_looks_at_so_many_pairs_spread_over_validation(config, monkeypatch):
    made = config("seq2seq")
    data = DataModule(made)
    data.prepare()
    seen = []

    def perfect(self, model, batch, eos_id):
        seen.append(batch)
        return [row[row != -100].tolist()[:-1] for row in batch["labels"]]

    monkeypatch.setattr(Seq2Seq, "answered", perfect)
    assert Seq2Seq(scores=("exact_match",), n_decoded=10).examine(SimpleNamespace(), data, 4) == {"exact_match": 1.0}
    assert [len(b["labels"]) for b in seen] == [4, 4, 2]
    assert torch.cat([b["sample_index"] for b in seen]).tolist() == [i * data.n_val // 10 for i in range(10)]
