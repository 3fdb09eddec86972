import itertools

import pytest
import torch

from tests.models import ids, seeded, shake, tiny
from txtrain.model import options
from txtrain.model.beam_search import beam_search
from txtrain.model.generation import generate

EOS = 3
TWO_STACKS = {"topology": "encoder_decoder", "position": options.RelativeConfig(type="relative"), "vocab_size": 7, "eos_token_id": EOS, "pad_token_id": 0}


def two_stacks(**changes):
    return shake(seeded(tiny(**TWO_STACKS | changes)), seed=3).eval()


def log_probability(model, source, answer):
    """Of an answer [T] (start token first), by one pass without a cache."""
    logits = model(source[None], decoder_input_ids=answer[None, :-1]).logits[0].log_softmax(-1)
    return logits.gather(1, answer[1:, None]).sum().item()


def penalised(log_p, length, alpha=0.6):
    return log_p / ((5 + length) / 6) ** alpha


@pytest.mark.slow
def test_with_beams_enough_it_finds_the_best_of_all_answers():
    model, source = two_stacks(), ids(batch=3, length=6, vocab=7)
    found = beam_search(model, source, num_beams=7**3, max_new_tokens=4)
    for row in range(3):
        best = max(
            (penalised(log_probability(model, source[row], torch.tensor([0, *words, EOS])), n + 1), (*words, EOS))
            for n in range(4)
            for words in itertools.product([w for w in range(7) if w != EOS], repeat=n)
        )
        answer = found[row].tolist()[1:]
        assert tuple(answer[: answer.index(EOS) + 1]) == best[1]


def test_one_beam_is_greedy():
    model, source = two_stacks(vocab_size=31), ids(batch=4, length=6, vocab=31)
    greedy = generate(model, source, max_new_tokens=12)
    found = beam_search(model, source, num_beams=1, max_new_tokens=12)
    assert torch.equal(found, greedy[:, : found.shape[1]])


def test_a_row_is_answered_as_it_is_alone():
    model, source = two_stacks(vocab_size=31), ids(batch=4, length=8, vocab=31)
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    together = beam_search(model, source, mask, num_beams=3, max_new_tokens=10)
    for row in range(4):
        alone = beam_search(model, source[row : row + 1, : int(mask[row].sum())], num_beams=3, max_new_tokens=10)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert set(together[row, len(alone) :].tolist()) <= {0}


def test_a_wider_beam_never_scores_less_than_its_own_greedy_answer():
    model, source = two_stacks(vocab_size=31), ids(batch=6, length=8, vocab=31)
    wide = beam_search(model, source, num_beams=8, length_penalty=0.0, max_new_tokens=10)
    greedy = generate(model, source, max_new_tokens=10)

    def score(row, answer):
        answer = answer.tolist()
        end = answer.index(EOS, 1) + 1 if EOS in answer[1:] else None
        return (end is not None, log_probability(model, source[row], torch.tensor(answer[:end])))

    for row in range(6):
        ended, best = score(row, wide[row])
        greedy_ended, greedy_score = score(row, greedy[row])
        assert not greedy_ended or (ended and best >= greedy_score - 1e-4)


def test_a_decoder_alone_searches_after_its_prompt():
    model = shake(seeded(tiny(eos_token_id=EOS, vocab_size=31))).eval()
    prompt = ids(length=5, vocab=31)
    assert torch.equal(beam_search(model, prompt, num_beams=3, max_new_tokens=6)[:, :5], prompt)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_beams"):
        beam_search(two_stacks(), ids(vocab=7), num_beams=0)
    with pytest.raises(ValueError, match="eos_token_id"):
        beam_search(two_stacks(eos_token_id=None), ids(vocab=7))
    encoder = seeded(tiny(topology="encoder", head=options.MLMHeadConfig(type="mlm")))
    with pytest.raises(ValueError, match="encoder alone"):
        generate(encoder, ids())
