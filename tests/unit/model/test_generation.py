import pytest
import torch

from tests.models import ids, replace, seeded, shake, tiny
from txtrain.model import options
from txtrain.model.config import Sampling
from txtrain.model.generation import generate
from txtrain.model.sampling import Chooser

MIXED = options.AttentionConfig(type="gqa", n_kv_heads=2, window=(4, None))


@pytest.fixture(scope="module", params=["rope", "learned", "alibi", "relative", "sinusoidal", "none"])
def model(request):
    position = {
        "rope": options.RoPEConfig,
        "learned": options.LearnedConfig,
        "alibi": options.AlibiConfig,
        "relative": options.RelativeConfig,
        "sinusoidal": options.SinusoidalConfig,
        "none": options.PositionConfig,
    }[request.param](type=request.param)
    return shake(seeded(tiny(position=position, attention=MIXED)))


def greedy_without_cache(model, tokens, n):
    model.eval()
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens


def test_cached_greedy_equals_one_pass_for_every_token(model):
    tokens = ids(length=9)
    assert torch.equal(generate(model, tokens, max_new_tokens=20), greedy_without_cache(model, tokens, 20))


def test_a_left_padded_row_continues_as_it_does_alone(model):
    tokens = ids(batch=3, length=9)
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, :2] = 0, 0
    together = generate(model, tokens, mask, max_new_tokens=12)
    for row, start in enumerate((5, 2, 0)):
        assert torch.equal(together[row, start:], generate(model, tokens[row : row + 1, start:], max_new_tokens=12)[0])


def test_a_row_stops_at_its_end_token_and_is_padded():
    model = shake(seeded(tiny()))
    tokens = ids(batch=4, length=5)
    free = generate(model, tokens, max_new_tokens=10)
    eos = int(free[0, 7])
    stopped = generate(model, tokens, max_new_tokens=10, eos_token_id=eos, pad_token_id=60)
    for row in range(4):
        new = free[row, 5:].tolist()
        end = new.index(eos) + 1 if eos in new else 10
        assert stopped[row, 5 : 5 + end].tolist() == new[:end]
        assert set(stopped[row, 5 + end :].tolist()) <= {60}
    configured = shake(seeded(replace(tiny(), eos_token_id=eos, pad_token_id=60)))
    assert torch.equal(generate(configured, tokens, max_new_tokens=10), stopped)
    assert torch.equal(generate(configured, tokens, max_new_tokens=10, eos_token_id=None), free)
    assert torch.equal(generate(model, tokens, max_new_tokens=10, eos_token_id=(60, eos), pad_token_id=60), stopped)


def test_generation_ends_when_all_rows_have():
    model = shake(seeded(tiny()))
    tokens = ids(batch=1, length=5)
    eos = int(generate(model, tokens, max_new_tokens=3)[0, -1])
    assert generate(model, tokens, max_new_tokens=40, eos_token_id=eos).shape[1] <= 8


def test_the_same_seed_gives_the_same_text_and_training_mode_is_kept():
    model = shake(seeded(tiny(dropout=0.5))).train()
    tokens = ids()
    before = torch.get_rng_state()
    a, b, c = (generate(model, tokens, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before), "a seeded generation leaves torch's generator alone"


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def chosen(n, logits=LOGITS, **how):
    """n rows' draws, each with a number of its own."""
    chooser = Chooser(Sampling(**how), 0, range(n), [[]] * n, 4, torch.device("cpu"))
    return chooser(logits.expand(n, -1))


def drawn(**how):
    return set(chosen(400, temperature=how.pop("temperature", 1.0), **how)[0].tolist())


def test_top_k_top_p_and_min_p_keep_what_they_say():
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_p=0.75) == {0, 1}
    assert drawn(top_p=0.85) == {0, 1, 2}
    assert drawn(min_p=0.25) == {0, 1, 2}
    assert drawn(min_p=1.0) == {0}
    assert drawn(temperature=0) == {0}
    assert drawn(temperature=0.05) == {0}


def test_sampling_frequencies_follow_the_temperature_and_log_probabilities_are_of_what_was_drawn_from():
    tokens, log_p = chosen(20000, temperature=2.0)
    expected = (LOGITS[0] / 2).log_softmax(-1)
    assert (tokens.bincount(minlength=4) / 20000 - expected.exp()).abs().max() < 0.015
    assert torch.allclose(log_p, expected[tokens])
    tokens, log_p = chosen(2000, temperature=1.0, top_k=2)
    assert torch.allclose(log_p, torch.tensor([5 / 8, 3 / 8]).log()[tokens])
    assert torch.allclose(chosen(1, temperature=0)[1], LOGITS[0, :1])
    tokens, log_p = chosen(20, LOGITS.double(), temperature=1.0)
    assert torch.allclose(log_p, LOGITS[0].double()[tokens]), "without the noise"


def test_draws_of_rows_and_positions_are_independent():
    """Correlation of the noise with that of the next row, the next position, the next seed and the next token."""
    def noise(seed, numbers, position):
        chooser = Chooser(Sampling(temperature=1.0), seed, numbers, [[]] * 64, 4096, torch.device("cpu"))
        chooser.position = position
        return chooser._gumbel_BV()

    own = noise(7, range(64), 3)
    assert abs(own.mean().item() - 0.5772) < 0.01
    assert abs(own.std().item() - 1.2825) < 0.01
    others = noise(7, range(1, 65), 3), noise(7, range(64), 4), noise(8, range(64), 3), own.roll(1, 1)
    for other in others:
        assert abs(torch.corrcoef(torch.stack((own.flatten(), other.flatten())))[0, 1].item()) < 0.01
    assert torch.equal(noise(7, range(8, 72), 3)[:8], own[8:16])


def test_mistakes_are_named():
    model, tokens = seeded(tiny(position=options.LearnedConfig(type="learned"))), ids(length=9)
    with pytest.raises(ValueError, match="at most 39 after a prompt of 9 tokens"):
        generate(model, tokens, max_new_tokens=40)
    with pytest.raises(ValueError, match="a 1 in every row"):
        generate(model, tokens, torch.cat((torch.ones(1, 9), torch.zeros(1, 9))))
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, tokens[:, :0])


TWO_STACKS = {"topology": "encoder_decoder", "position": options.RelativeConfig(type="relative"), "attention": MIXED, "pad_token_id": 0}


def test_an_encoder_and_decoder_answer_as_without_a_cache():
    model = shake(seeded(tiny(**TWO_STACKS))).eval()
    source, answer = ids(length=9), torch.zeros(2, 1, dtype=torch.long)
    for _ in range(12):
        answer = torch.cat((answer, model(source, decoder_input_ids=answer).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generate(model, source, max_new_tokens=12), answer)


def test_a_padded_source_is_answered_as_it_is_alone():
    model = shake(seeded(tiny(**TWO_STACKS))).eval()
    source = ids(length=9)
    mask = torch.ones_like(source)
    mask[0, 6:] = 0
    together = generate(model, source, mask, max_new_tokens=8)
    assert torch.equal(together[0], generate(model, source[:1, :6], max_new_tokens=8)[0])
    assert torch.equal(together[1], generate(model, source[1:], max_new_tokens=8)[0])
