import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.objectives.conftest import draws, tokenised
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.objectives.span_corruption import Corruption, SpanCorruption, _filled, _segments
from txtrain.objectives.spans import Lengths

DOCUMENTS = [f"Document {i} tells what number {i} is, and nothing else. " * (1 + i % 3) for i in range(40)]


def reassembled(source: list[int], target: list[int], sentinels: list[int]) -> list[int]:
    """The text before: each sentinel of the source replaced by what the target says behind it."""
    dropped: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            dropped[token] = []
            last = token
        else:
            dropped[last].append(token)
    assert list(dropped) == sentinels[: len(dropped)]
    assert all(dropped.values()), "no span is empty"
    return [t for token in source[:-1] for t in dropped.get(token, [token])]


@settings(max_examples=80, deadline=None)
@given(
    n_tokens=st.integers(4, 60), density=st.sampled_from([0.05, 0.15, 0.5, 0.8]), mean=st.sampled_from([1.0, 3.0, 10.0]), seed=st.integers(0, 99)
)
def test_input_and_target_make_the_text_again(n_tokens, density, mean, seed):
    lengths = Lengths.of(n_tokens, density, mean)
    text = np.random.default_rng(seed).integers(0, 50, (5, n_tokens))
    sentinels = [100 - k for k in range(lengths.n_spans)]
    made = Corruption(lengths, np.array(sentinels), eos_id=99)({"input_ids": torch.from_numpy(text)}, draws(5, seed))
    assert made["input_ids"].shape == (5, lengths.input_length)
    assert made["labels"].shape == (5, lengths.target_length)
    for row, source, target in zip(text.tolist(), made["input_ids"].tolist(), made["labels"].tolist(), strict=True):
        assert (source[-1], target[-1], source[0] in sentinels, target[0]) == (99, 99, False, sentinels[0])
        assert reassembled(source, target, sentinels) == row


@pytest.mark.parametrize("seq_len", [4, 16, 32, 256, 512])
def test_a_text_is_as_long_as_what_becomes_of_it_allows(seq_len):
    lengths = Lengths.fitting(seq_len, 0.15, 3.0)
    assert lengths is not None
    assert max(lengths.input_length, lengths.target_length) <= seq_len
    longer = Lengths.of(lengths.n_tokens + 1, 0.15, 3.0)
    assert max(longer.input_length, longer.target_length) > seq_len
    if seq_len == 512:  # the paper's code: 568 tokens to 512, of which 114 are the target
        assert (lengths.n_tokens, lengths.input_length, lengths.target_length) == (568, 512, 114)


def test_every_partition_is_as_likely_as_any_other():
    counts: dict[tuple[int, ...], int] = {}
    parts = _segments(draws(6000), "x", 6, 3)
    assert (parts.sum(1) == 6).all()
    assert parts.min() == 1
    for part in map(tuple, parts.tolist()):
        counts[part] = counts.get(part, 0) + 1
    assert len(counts) == 10
    chi2 = sum((c - 600) ** 2 / 600 for c in counts.values())
    assert chi2 < 27.9, chi2  # 9 degrees of freedom: 0.1 %


def test_density_and_mean_length_are_those_asked_for(tmp_path):
    objective = SpanCorruption()
    text = tokenised(tmp_path, DOCUMENTS, objective.special_tokens, 128)
    rows = objective.samples(text)
    batch = rows.batch(np.arange(len(rows)), draws(len(rows)))
    sentinels = [text.tokenizer.id_of(f"<extra_id_{k}>") for k in range(100)]
    assert sentinels == sorted(sentinels, reverse=True)
    assert sentinels[0] == text.tokenizer.vocab_size - 1, "the first sentinel is the last token"
    labels = batch["labels"]
    n_dropped = int((~np.isin(labels.numpy(), sentinels)).sum() - len(labels))
    n_text = len(rows) * rows.rows.seq_len
    assert abs(n_dropped / n_text - 0.15) < 0.01
    assert abs(n_dropped / np.isin(labels.numpy(), sentinels).sum() - 3) < 0.2
    stream = text.tokens.ids[:n_text].astype(int).tolist()
    again = [t for s, d in zip(batch["input_ids"].tolist(), labels.tolist(), strict=True) for t in reassembled(s, d, sentinels)]
    assert again == stream, "every token of the stream is in one sample"


def test_tokens_keep_their_document_on_either_side(tmp_path):
    objective = SpanCorruption(density=0.4, mean_length=6.0)
    text = tokenised(tmp_path, [f"{chr(97 + i % 26)}" * 9 for i in range(60)], objective.special_tokens, 64)
    rows = objective.samples(text)
    n = len(rows)
    batch, plain = rows.batch(np.arange(n), draws(n)), rows.rows.batch(np.arange(n), draws(n))
    for side, documents in (("input_ids", "document_ids"), ("labels", "decoder_document_ids")):
        for i in range(n):
            letters = {int(d): set() for d in plain["document_ids"][i]}
            for token, d in zip(plain["input_ids"][i].tolist(), plain["document_ids"][i].tolist(), strict=True):
                letters[d].add(token)
            for token, d in zip(batch[side][i].tolist()[:-1], batch[documents][i].tolist()[:-1], strict=True):
                assert token > 256 or token in letters[d]
        assert bool((batch[documents].diff(dim=1) >= 0).all())


def test_sentinels_must_be_enough(config):
    with pytest.raises(ConfigError, match=r"objective\.n_sentinels.*at least 2, the spans of a sequence of 32 tokens, but is 1 instead"):
        config("span_corruption", "objective.n_sentinels=1")


def test_a_text_is_shown_with_its_gaps_filled_up_to_the_last_filling():
    words = byte_tokenizer().with_specials(("<extra_id_0>", "<extra_id_1>", "<extra_id_2>"))
    first, second, third = gaps = [words.id_of(f"<extra_id_{k}>") for k in range(3)]
    source = [*words.encode("Thank "), first, *words.encode(" me to "), second, *words.encode(" party "), third, *words.encode(" week")]
    fill = {first: "you for", second: "your", third: "last"}

    def shown(*named):
        return _filled(source, [*words.encode("lost"), *(i for gap in named for i in (gap, *words.encode(fill[gap])))], gaps, words)

    assert shown(first, second, third) == "Thank «you for» me to «your» party «last»"
    assert shown(first) == "Thank «you for»"
    assert shown(second) == "Thank <extra_id_0> me to «your»"
    assert shown() == "Thank <extra_id_0> me to <extra_id_1> party <extra_id_2> week"
