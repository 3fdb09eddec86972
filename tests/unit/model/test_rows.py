"""What a row becomes depends on the row alone: not on neighbours, padding, batches, or which process writes it."""

import pytest
import torch
import transformers
from transformers.generation import logits_process

import txtrain
from tests.models import ids, seeded, shake, tiny
from txtrain.errors import ConfigError
from txtrain.model import options
from txtrain.model.config import Sampling
from txtrain.model.decoding import Text, rows_of
from txtrain.model.generation import Decoding, continue_rows, generate
from txtrain.model.sampling import processed, seen_in

KINDS = {
    "gqa and windows": {"attention": options.AttentionConfig(type="gqa", n_kv_heads=2, window=(4, None))},
    "learned": {"position": options.LearnedConfig(type="learned")},
    "mla": {"attention": options.MLAConfig(type="mla")},
    "moe": {"ffn": options.MoEConfig(type="moe", n_experts=4, top_k=2)},
    "two stacks": {"topology": "encoder_decoder", "position": options.RelativeConfig(type="relative"), "pad_token_id": 0},
}
HOW = {"greedy": {"temperature": 0}, "sampled": {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5}}
PROMPTS = [ids(1, length, seed=length)[0].tolist() for length in (9, 1, 4, 12, 2, 7, 5, 5)]
EOS = 7


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request):
    return shake(seeded(tiny(**KINDS[request.param])))


def written(model, prompts=PROMPTS, row_index=None, batch_size=None, decode=None, ends=(EOS, 3, 11), **how):
    job = Decoding(Sampling(max_new_tokens=16, **how), ends, batch_size, decode)
    return continue_rows(model, prompts, job, row_index)


def texts(rows):
    return [row.ids.tolist() for row in rows]


@pytest.mark.parametrize(("how", "dtype"), [("greedy", torch.float32), pytest.param("sampled", torch.float32, marks=pytest.mark.slow), ("sampled", torch.float64)])
def test_a_row_is_what_it_is_alone_in_any_batch_and_on_any_process(model, how, dtype):
    model, how = model.to(dtype), HOW[how]
    together = written(model, **how)
    assert how is HOW["greedy"] or len({len(row.ids) for row in together}) > 3, "rows leave one after the other"
    for batch_size in (1, 3):
        assert texts(written(model, batch_size=batch_size, **how)) == texts(together)
    second = written(model, PROMPTS[5:], row_index=range(5, 8), **how)  # as the process that has the last rows
    assert texts(second) == texts(together[5:])
    for row, alone in zip(together, (written(model, [p], row_index=[i], **how)[0] for i, p in enumerate(PROMPTS)), strict=True):
        assert row.ended == alone.ended
        torch.testing.assert_close(row.log_probs, alone.log_probs, rtol=1e-4, atol=1e-4)
    model.float()


def test_samples_of_a_prompt_are_rows_of_their_own(model):
    how = HOW["sampled"]
    several = texts(written(model, n=3, **how))
    assert len({tuple(row) for row in several}) > len(PROMPTS) * 2
    repeated = [p for p in PROMPTS for _ in range(3)]
    assert several == texts(written(model, repeated, **how)) == texts(written(model, n=3, batch_size=4, **how))
    assert texts(written(model, PROMPTS[2:4], row_index=[2, 3], n=3, **how)) == several[6:12]


def test_log_probabilities_are_those_that_training_computes(model):
    how = {"temperature": 1.3, "seed": 5}
    for prompt, row in zip(PROMPTS, written(model, **how), strict=True):
        if model.encoder is None:
            whole = torch.tensor([prompt + row.ids.tolist()])
            log_p = model(whole).logits[0, len(prompt) - 1 : -1]
        else:
            answer = torch.tensor([[0, *row.ids.tolist()]])
            log_p = model(torch.tensor([prompt]), decoder_input_ids=answer[:, :-1]).logits[0]
        expected = (log_p / 1.3).log_softmax(-1).gather(1, row.ids[:, None])[:, 0]
        torch.testing.assert_close(row.log_probs, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_row_that_ends_is_told_from_one_that_is_cut(model):
    for row in written(model, **HOW["sampled"]):
        assert row.ended == (int(row.ids[-1]) in (EOS, 3, 11))
        assert row.ended or len(row.ids) == 16
        assert len(row.ids) == len(row.log_probs)


def test_finished_rows_leave_the_cache(monkeypatch):
    model, held = shake(seeded(tiny())), []
    inner = Text.next_logits
    monkeypatch.setattr(Text, "next_logits", lambda self: held.append(len(self.new)) or inner(self))
    rows = written(model, n=8, **HOW["sampled"])
    open_at = [sum(len(row.ids) > t for row in rows) for t in range(len(held))]
    assert held[0] == len(PROMPTS), "each prompt is read once"
    assert all(now <= max(1, open_ * 8 // 7 + 1) for now, open_ in zip(held[1:], open_at[1:], strict=True))
    assert len(set(held)) < 16


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(model):
    def decode(tokens):
        return "".join(chr(64 + token) for token in tokens)

    free = written(model, ends=(), **HOW["sampled"])
    stop = decode(free[0].ids[5:8].tolist())
    stopped = written(model, ends=(), decode=decode, stop=(stop, "never"), **HOW["sampled"])
    for a, b in zip(free, stopped, strict=True):
        text = decode(a.ids.tolist())
        end = text.find(stop) + 3 if stop in text else len(text)
        assert b.ids.tolist() == a.ids.tolist()[:end]
        assert b.ended == (stop in text)


def test_padding_on_either_side_and_its_tokens_change_nothing(model):
    rows = [[0] * 3 + p for p in PROMPTS]
    width = max(map(len, rows))
    left = torch.tensor([[9] * (width - len(r)) + r for r in rows])
    right = torch.tensor([r + [5] * (width - len(r)) for r in rows])
    mask_left = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    how = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1, "eos_token_id": EOS, "repetition_penalty": 1.5}
    a, b = generate(model, left, mask_left, **how), generate(model, right, mask_left.flip(1), **how)
    begin = 1 if model.encoder is not None else width
    assert torch.equal(a[:, begin:], b[:, begin:])
    for row, alone in zip(a[:, begin:].tolist(), texts(written(model, rows, ends=(EOS,), temperature=1.0, seed=1, repetition_penalty=1.5)), strict=True):
        assert row[: len(alone)] == alone[: len(row)]
    if model.encoder is None:
        assert torch.equal(b[:, :width], right), "the prompt comes back as it was given"


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("seed", range(6))
def test_processed_logits_are_those_of_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 40, generator=generator) * 3
    logits[0, :20] = logits[0, 20:]  # ties
    rows = torch.randint(0, 40, (5, 6), generator=generator)
    how = Sampling(
        repetition_penalty=[1.0, 1.3, 0.8][seed % 3], temperature=[0.7, 1.0, 2.5][seed % 3], top_k=[None, 7, 100][seed % 3],
        top_p=[None, 0.8, 0.3, 1.0][seed % 4], min_p=[None, 0.05, 0.5][seed % 3],
    )
    theirs = logits_process.LogitsProcessorList([logits_process.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)])
    theirs.append(logits_process.TemperatureLogitsWarper(how.temperature))
    if how.top_k is not None:
        theirs.append(logits_process.TopKLogitsWarper(how.top_k))
    if how.top_p is not None:
        theirs.append(logits_process.TopPLogitsWarper(how.top_p))
    if how.min_p is not None:
        theirs.append(logits_process.MinPLogitsWarper(how.min_p))
    assert torch.equal(processed(logits, how, seen_in(rows.tolist(), 40, logits.device)), theirs(rows, logits.clone()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small Llama of transformers, and the same in ours."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )
    theirs, folder = transformers.LlamaForCausalLM(config).eval(), tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, txtrain.load_pretrained(folder)


WIDTH = max(map(len, PROMPTS))
LEFT = torch.tensor([[0] * (WIDTH - len(p)) + p for p in PROMPTS])
MASK = torch.tensor([[0] * (WIDTH - len(p)) + [1] * len(p) for p in PROMPTS])


def same(ours, theirs, width):
    """Up to the end token: what follows is padding."""
    for a, b in zip(ours[:, width:].tolist(), theirs[:, width:].tolist(), strict=True):
        assert a[: (a.index(EOS) + 1) if EOS in a else None] == b[: (b.index(EOS) + 1) if EOS in b else None]


def test_greedy_text_is_that_of_transformers(pair):
    theirs, ours = pair
    same(generate(ours, LEFT, MASK, max_new_tokens=30), theirs.generate(LEFT, attention_mask=MASK, max_new_tokens=30, do_sample=False), WIDTH)
    row = torch.tensor(PROMPTS[:1])  # of a padded one transformers penalises the padding token too
    how = {"max_new_tokens": 30, "repetition_penalty": 1.4}
    same(generate(ours, row, **how), theirs.generate(row, do_sample=False, **how), row.shape[1])


@pytest.mark.parametrize(("num_beams", "n", "penalty"), [(2, 1, 1.0), (4, 3, 1.0), (3, 2, 1.2)])
def test_beams_are_those_of_transformers(pair, num_beams, n, penalty):
    theirs, ours = pair
    rows = [torch.tensor([p]) for p in PROMPTS] if penalty != 1 else [LEFT]
    for row in rows:
        mask = MASK if row is LEFT else torch.ones_like(row)
        how = {"max_new_tokens": 12, "num_beams": num_beams, "repetition_penalty": penalty}
        expected = theirs.generate(row, attention_mask=mask, do_sample=False, num_return_sequences=n, **how)
        same(generate(ours, row, mask, n=n, **how), expected, row.shape[1])
        assert torch.equal(generate(ours, row, mask, n=n, batch_size=num_beams * 3, **how), generate(ours, row, mask, n=n, **how))


def test_beams_with_several_end_tokens_are_those_of_transformers(pair):
    """Three of the four best first tokens end: among 2 K candidates there would be one beam that goes on."""
    theirs, ours = pair
    for prompt in ([17, 53, 53], [28, 9, 18], [40, 47, 34]):
        row = torch.tensor([prompt])
        ends = ours(row).logits[0, -1].topk(4).indices.tolist()[1:]
        how = {"max_new_tokens": 6, "num_beams": 2, "pad_token_id": 60}
        expected = theirs.generate(row, do_sample=False, num_return_sequences=2, eos_token_id=ends, **how)
        found = generate(ours, row, n=2, eos_token_id=tuple(ends), **how)
        assert torch.equal(found, expected[:, : found.shape[1]])


def test_log_probabilities_of_beams_are_the_models_own(pair):
    _, ours = pair
    for i, row in enumerate(written(ours, n=2, num_beams=3, ends=(EOS,))):
        prompt = PROMPTS[i // 2]
        log_p = ours(torch.tensor([prompt + row.ids.tolist()])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(row.log_probs, log_p.gather(1, row.ids[:, None])[:, 0].detach(), rtol=1e-4, atol=1e-4)
        assert row.ended == (int(row.ids[-1]) == EOS)


def test_dtype_is_that_of_one_call(pair):
    _, ours = pair
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    seen = []
    for dtype in ("bfloat16", torch.float64):
        hook = ours.register_forward_hook(lambda module, args, out: seen.append(out.logits.dtype))
        generate(ours, LEFT, MASK, max_new_tokens=2, dtype=dtype)
        hook.remove()
    assert set(seen) == {torch.bfloat16, torch.float64}
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"stop": ["x"]}, "`tokenizer` must be given"),
        ({"stop": [""]}, "`stop` must be"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"row_index": [1]}, "`row_index` must be 8 integers"),
        ({"strategy": "fsdp"}, "`strategy` must be the strategy"),
        ({"dtype": "float23"}, "`dtype` must be one of"),
        ({"num_beams": 2, "temperature": 1.0}, "`temperature` must be 0 with num_beams=2"),
        ({"num_beams": 2, "top_k": 3}, "`top_k` must be null with num_beams=2"),
        ({"num_beams": 2, "n": 3}, "`n` must be at most num_beams"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0"),
    ],
)
def test_a_mistake_is_named(pair, how, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        generate(pair[1], LEFT, MASK, **how)


def test_rows_without_padding_come_back():
    assert rows_of(LEFT, MASK) == PROMPTS
