import numpy as np
import pytest
import torch

from tests.unit.objectives.conftest import draws, tokenised
from txtrain.errors import ConfigError
from txtrain.objectives.base import build_objective
from txtrain.objectives.masked_lm import MaskedLM
from txtrain.objectives.masking import Masking
from txtrain.objectives.sentence_pairs import ELSEWHERE, FOLLOWS, SentencePairs
from txtrain.training.data_module import DataModule
from txtrain.training.module import LitModule

WORDS = "some words of several lengths and punctuation, which stands alone; 17 numbers too "
DOCUMENTS = [f"{i} {WORDS * (1 + i % 4)}" for i in range(60)]


def masked(tmp_path, seq_len: int = 64, **knobs):
    """All samples of the text: (tokenizer, plain ids, input_ids, labels)."""
    objective = MaskedLM(**knobs)
    text = tokenised(tmp_path, DOCUMENTS, objective.special_tokens, seq_len)
    rows = objective.samples(text)
    n = len(rows)
    batch = rows.batch(np.arange(n), draws(n))
    plain = rows.rows.batch(np.arange(n), draws(n))["input_ids"]
    return text.tokenizer, plain, batch["input_ids"], batch["labels"]


def test_the_shares_are_the_papers(tmp_path):
    tokenizer, plain, ids, labels = masked(tmp_path)
    special = torch.isin(plain, torch.tensor(sorted(tokenizer.special_ids())))
    chosen = labels != -100
    n = int((~special).sum())
    share = chosen.sum() / n
    assert abs(float(share) - 0.15) < 4 * (0.15 * 0.85 / n) ** 0.5, share
    is_mask = ids[chosen] == tokenizer.id_of("[MASK]")
    changed = ids[chosen] != labels[chosen]
    k = int(chosen.sum())
    for got, wanted in ((is_mask.float().mean(), 0.8), ((changed & ~is_mask).float().mean(), 0.1), ((~changed).float().mean(), 0.1)):
        assert abs(float(got) - wanted) < 4 * (wanted * (1 - wanted) / k) ** 0.5 + 1 / 257, (float(got), wanted)


def test_only_chosen_tokens_change_and_labels_are_what_they_were(tmp_path):
    tokenizer, plain, ids, labels = masked(tmp_path, probability=0.4)
    chosen = labels != -100
    assert torch.equal(ids[~chosen], plain[~chosen])
    assert torch.equal(labels[chosen], plain[chosen])
    assert not np.isin(plain[chosen].numpy(), list(tokenizer.special_ids())).any()
    random = ids[chosen & (ids != plain) & (ids != tokenizer.id_of("[MASK]"))]
    assert not np.isin(random.numpy(), list(tokenizer.special_ids())).any()
    assert len(random.unique()) > 50


def test_a_whole_word_is_chosen_or_none_of_it(tmp_path):
    tokenizer, plain, _, labels = masked(tmp_path, whole_word=True, probability=0.3)
    letters = torch.tensor([chr(i).isalnum() if i < 128 else False for i in range(tokenizer.vocab_size)])
    inside = letters[plain[:, 1:]] & letters[plain[:, :-1]]
    chosen = labels != -100
    assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside])
    assert 0.2 < float(chosen.float().mean()) < 0.35
    apart = letters[plain[:, 1:]] != letters[plain[:, :-1]]
    assert bool((chosen[:, 1:][apart] != chosen[:, :-1][apart]).any()), "words are drawn one by one"


def test_a_share_of_one_masks_everything_that_is_chosen(tmp_path):
    tokenizer, _, ids, labels = masked(tmp_path, mask_share=1.0, random_share=0.0)
    assert bool((ids[labels != -100] == tokenizer.id_of("[MASK]")).all())


def test_every_token_of_the_stream_is_in_one_sample(tmp_path):
    _, plain, _, _ = masked(tmp_path)
    text = tokenised(tmp_path / "again", DOCUMENTS, ("[MASK]",), 64)
    assert plain.flatten().tolist() == text.tokens.ids[: plain.numel()].tolist()


# --------------------------------------------------------------------------------------------------------------------- pairs


@pytest.fixture
def pairs(tmp_path):
    text = tokenised(tmp_path, DOCUMENTS, ("[CLS]", "[SEP]", "[MASK]"), 40)
    return text.tokenizer, SentencePairs(text.tokens, text.tokenizer, 40)


def segments(tokenizer, batch, i: int) -> tuple[str, str]:
    ids, types, mask = (batch[name][i].tolist() for name in ("input_ids", "token_type_ids", "attention_mask"))
    n = sum(mask)
    middle = types.index(1)
    assert (ids[0], ids[middle - 1], ids[n - 1]) == (tokenizer.id_of("[CLS]"), tokenizer.id_of("[SEP]"), tokenizer.id_of("[SEP]"))
    assert types == [0] * middle + [1] * (n - middle) + [0] * (40 - n)
    assert mask == [1] * n + [0] * (40 - n)
    return tokenizer.decode(ids[1 : middle - 1]), tokenizer.decode(ids[middle : n - 1])


def test_half_of_the_pairs_follow_and_half_are_of_another_document(pairs):
    tokenizer, rows = pairs
    n = len(rows)
    labels = []
    for seed in range(6):
        batch = rows.batch(np.arange(n), draws(n, seed))
        document = np.searchsorted(rows.first_row, np.arange(n), side="right") - 1
        for i in range(n):
            first, second = segments(tokenizer, batch, i)
            assert first
            assert second
            label = int(batch["next_sentence_label"][i])
            own = first + second in DOCUMENTS[document[i]]
            if label == FOLLOWS:
                assert own, (first, second)
            else:
                assert any(second in DOCUMENTS[d] for d in range(len(DOCUMENTS)) if d != document[i])
            labels.append(label)
    share = np.mean(labels)
    assert abs(share - 0.5) < 4 * 0.5 / len(labels) ** 0.5, share
    assert {FOLLOWS, ELSEWHERE} == set(labels)


def test_the_length_of_a_pair_does_not_tell_whether_it_follows(pairs):
    _, rows = pairs
    n = len(rows)
    lengths = {FOLLOWS: [], ELSEWHERE: []}
    for seed in range(6):
        batch = rows.batch(np.arange(n), draws(n, seed))
        for length, label in zip(batch["attention_mask"].sum(1).tolist(), batch["next_sentence_label"].tolist(), strict=True):
            lengths[label].append(length)
    assert abs(np.mean(lengths[FOLLOWS]) - np.mean(lengths[ELSEWHERE])) < 1.5


def test_chunks_cover_their_documents(pairs):
    tokenizer, rows = pairs
    batch = rows.batch(np.arange(len(rows)), draws(len(rows)))
    follows = [i for i in range(len(rows)) if batch["next_sentence_label"][i] == FOLLOWS]
    document = np.searchsorted(rows.first_row, np.arange(len(rows)), side="right") - 1
    for i in follows:
        text = "".join(segments(tokenizer, batch, i))
        begin = (i - rows.first_row[document[i]]) * rows.room
        assert text == DOCUMENTS[document[i]][begin : begin + rows.room]


def test_one_document_is_too_few(tmp_path):
    text = tokenised(tmp_path, [WORDS], ("[CLS]", "[SEP]", "[MASK]"), 40)
    with pytest.raises(ConfigError, match=r"objective\.next_sentence.* must be false with a training text of 1 document:"):
        SentencePairs(text.tokens, text.tokenizer, 40)


def test_padding_is_never_masked(pairs):
    tokenizer, rows = pairs
    batch = rows.batch(np.arange(len(rows)), draws(len(rows)))
    filled = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 65, batch["input_ids"])}  # a letter as padding
    made = Masking(tokenizer, 0.9, 0.8, 0.1, False)(filled, draws(len(rows)))
    assert bool((made["labels"][batch["attention_mask"] == 0] == -100).all())


@pytest.mark.parametrize("kind", ["masked_lm", "masked_lm with pairs"])
def test_validation_tells_what_the_logits_of_all_positions_would(kind, config):
    module = LitModule(config(kind))
    module.configure_model()
    model, objective = module.model.eval(), module.objective
    data = DataModule(module.config)
    batch = next(iter(data.val_dataloader()))
    shapes = []

    def called(**given):
        out = model(**given)
        shapes.append(tuple(out.logits.shape))
        return out

    with torch.no_grad():
        found = objective.validate(called, batch)
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "token_type_ids") if name in batch}).logits
    chosen = batch["labels"] != -100
    n = int(chosen.sum())
    assert shapes == [(n, 400)], "of the targets alone"
    right, count = found["masked_accuracy"]
    assert (int(right), int(count)) == (int((logits.argmax(-1) == batch["labels"])[chosen].sum()), n)
    loss = found[objective.term][0]
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits[chosen], batch["labels"][chosen], reduction="sum")), rel=1e-5)


def test_the_head_decides_whether_there_are_pairs(config):
    with_pairs, without = build_objective(config("masked_lm with pairs")), build_objective(config("masked_lm"))
    assert (set(with_pairs.weights), set(without.weights)) == ({"mlm_loss", "nsp_loss"}, {"loss"})
    assert with_pairs.columns == ("mlm_loss", "nsp_loss", "val_mlm_loss", "val_nsp_loss", "masked_accuracy", "nsp_accuracy")
    with pytest.raises(ConfigError, match=r"objective\.next_sentence.*null"):
        config("masked_lm", "objective.next_sentence=true")
    assert set(build_objective(config("masked_lm with pairs", "objective.next_sentence=false")).weights) == {"loss"}
