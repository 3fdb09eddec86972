import pytest
import torch
import torch.nn.functional as F

import txtrain
from tests.models import ids, seeded, shake, tiny
from tests.unit.planning.zero_memory import Watched
from txtrain.model import options
from txtrain.model.head import heads
from txtrain.model.head import loss as head_loss


def reference(x, weight, targets, denominator, softcap, smoothing=0.0):
    logits = (x @ weight.T).float()
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    how = {"ignore_index": -100, "reduction": "sum", "label_smoothing": smoothing}
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **how) / denominator


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_elements", [1, 97 * 5, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_loss_equals_the_whole_with_gradients(monkeypatch, softcap, chunk_elements, dtype, smoothing):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 1)
    monkeypatch.setattr(head_loss, "CACHED_ELEMENTS", 97 * 4)  # a chunk is worked on in parts
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 16, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(97, 16, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, 97, (2, 9), generator=g)
    targets[0, 3:6] = -100
    denominator = torch.tensor(11.0)
    lm_head = heads.LMHead(16, 97, tied=True, softcap=softcap)
    got = lm_head.loss(x, weight, targets, denominator, smoothing)
    expected = reference(x, weight, targets, denominator, softcap, smoothing)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # the loss itself is float32
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(got * 3, (x, weight)), torch.autograd.grad(expected * 3, (x, weight)), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_the_gradient_of_many_chunks_is_that_of_float32(monkeypatch):
    """Chunks whose gradients point one way, as with frequent words: in bfloat16 their sum stops to grow at 256."""
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 100)  # the sum is added to by parts
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 4)
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 4 * 1024, 16, generator=g) * 0.5 + 1).bfloat16()
    weight = torch.randn(97, 16, generator=g).bfloat16()
    targets = torch.randint(0, 9, (1, 4 * 1024), generator=g)

    def gradient(dtype):
        of = weight.to(dtype).requires_grad_()
        loss = heads.LMHead(16, 97, tied=True, softcap=None).loss(x.to(dtype), of, targets, torch.tensor(4096.0))
        return torch.autograd.grad(loss, of)[0].float()

    wanted = gradient(torch.float32)
    assert float((gradient(torch.bfloat16) - wanted).norm() / wanted.norm()) < 0.01


def test_a_frozen_side_gets_no_gradient_and_costs_none():
    x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(11, 8)
    loss = heads.LMHead(8, 11, tied=True, softcap=None).loss(x, weight, torch.tensor([[1, 2, 3, -100]]), torch.tensor(3.0))
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[0, 3].abs().max() == 0


def test_a_kept_graph_gives_its_gradients_again_and_another_copies_no_matrix():
    x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)

    def loss():
        return heads.LMHead(8, 5000, tied=True).loss(x, weight, torch.tensor([[1, 2, 3, -100]]), torch.tensor(3.0)) * 2

    kept = loss()
    first, second = (torch.autograd.grad(kept, (x, weight), retain_graph=again) for again in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    del kept, first, second
    with Watched() as watched:
        loss().backward()
    assert watched.peak - watched.held < 2 * weight.nbytes  # its gradient, and the logits of a chunk


def test_labels_are_shifted_by_one():
    assert heads.LMHead(8, 11, tied=True).targets(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]


def test_nothing_to_predict_gives_zero_not_nan():
    x, weight = torch.randn(1, 2, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = heads.LMHead(8, 11, tied=True, softcap=None).loss(x, weight, torch.full((1, 2), -100), torch.tensor(5.0))
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight)))


def test_autocast_computes_logits_in_bf16_and_the_loss_in_float32():
    x, weight = torch.randn(1, 6, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    targets = torch.randint(0, 31, (1, 6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = heads.LMHead(16, 31, tied=True, softcap=None).loss(x, weight, targets, torch.tensor(6.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(x, weight, targets, 6.0, None).item(), rel=2e-2)
    assert [g.dtype for g in torch.autograd.grad(loss, (x, weight))] == [torch.float32] * 2


# ------------------------------------------------------------------------------------- log-probability of each label

MODELS = {
    "decoder": tiny(),
    "soft cap, tied": tiny(logit_softcap=3.0, tie_word_embeddings=True),
    "encoder": tiny(topology="encoder", head=options.MLMHeadConfig(type="mlm")),
    "two stacks": tiny(
        topology="encoder_decoder", pad_token_id=0, head=options.LMHeadConfig(type="lm", bias=True, scale=True)
    ),
}


def labelled(name, dtype):
    """A model, ids of which the last three of row 1 are padding, and labels of which some are -100."""
    model = shake(seeded(MODELS[name])).to(dtype).eval()
    tokens, mask = ids(length=12), torch.ones(2, 12)
    mask[1, 9:] = 0
    labels = ids(length=10 if name == "two stacks" else 12, seed=1)
    labels[0, 3:6] = labels[1, 9:] = -100
    return model, {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def gathered(model, inputs, temperature=1.0):
    """From all logits at once: what `log_probs` must equal."""
    labels = inputs["labels"]
    log_probs = (model(**inputs).logits / temperature).log_softmax(-1)
    found = torch.zeros(labels.shape, dtype=log_probs.dtype)
    for b, t in (labels != -100).nonzero().tolist():
        at = t - 1 if model.head.shift else t
        if at >= 0:
            found[b, t] = log_probs[b, at, labels[b, t]]
    return found


@pytest.mark.parametrize("chunk_elements", [61 * 5, 1 << 22])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_all_logits_with_gradients(monkeypatch, name, dtype, tolerance, chunk_elements, temperature):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 1)
    model, inputs = labelled(name, dtype)
    found = []

    def loss_of(head, x_BTD, embedding_VD):
        found.append(head.log_probs(x_BTD, embedding_VD, inputs["labels"], temperature))
        return x_BTD.new_zeros(())

    model(**inputs, return_logits=False, loss_of=loss_of)
    got, expected = found[0], gathered(model, inputs, temperature)
    if temperature == 1:
        assert torch.equal(txtrain.log_probs(model, **inputs), got)
    assert got.dtype == dtype
    assert (got[inputs["labels"] == -100] == 0).all()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    weights = torch.randn(got.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))  # each token its own
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (got, expected))
    largest = max(b.abs().max() for b in theirs if b is not None)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= tolerance * largest


def test_the_loss_is_the_mean_of_log_probs():
    model, inputs = labelled("decoder", torch.float32)
    n_targets = (inputs["labels"][:, 1:] != -100).sum()
    loss = model(**inputs, return_logits=False).loss
    assert (-txtrain.log_probs(model, **inputs).sum() / n_targets).item() == pytest.approx(loss.item(), rel=1e-6)


def test_no_label_gives_zeros_and_no_gradient():
    model, inputs = labelled("encoder", torch.float32)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    got = txtrain.log_probs(model, **inputs)
    got.sum().backward()
    assert (got == 0).all()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_a_large_vocabulary_never_hold_all_logits(monkeypatch, temperature):
    """256 tokens of 131,072: 128 MiB of logits; a chunk of them is 4 MiB."""
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 1 << 20)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 1)
    n_tokens, n = 256, 1 << 17
    x, weight = torch.randn(1, n_tokens, 4, requires_grad=True), torch.randn(n, 4, requires_grad=True)
    with Watched() as watched:
        head = heads.LMHead(4, n, tied=True)
        log_probs = head.log_probs(x, weight, torch.arange(n_tokens)[None], temperature)
        log_probs.sum().backward()
    assert log_probs.shape == (1, n_tokens)
    peak = watched.peak - watched.held
    assert peak < n_tokens * n * 4 / 5, f"{peak / 2**20:.0f} MiB"


def test_log_probs_refuse_what_has_none():
    tokens = ids()
    classes = seeded(tiny(head=options.ClassHeadConfig(type="class", n_classes=5, pooling="last")))
    decoder = seeded(tiny())
    for model, labels, said in (
        (classes, tokens, "`model` must be .* head over the vocabulary, but is class instead"),
        (torch.nn.Linear(2, 2), tokens, "`model` must be .* but is Linear instead"),
        (decoder, tokens[0], r"`labels` must have the shape \[B, T\]"),
        (decoder, tokens[:, :5], r"`labels` must have the shape \[2, 16\], but has \[2, 5\]"),
        (decoder, tokens.float(), "`labels` must be of int64"),
        (decoder, tokens + 61, "`labels` must be from 0 to 60"),
        (decoder, tokens - 99, "`labels` must be from 0 to 60"),
    ):
        with pytest.raises(txtrain.ConfigError, match=said):
            txtrain.log_probs(model, tokens, labels)
    with pytest.raises(txtrain.ConfigError, match="`attention_mask` must have"):
        txtrain.log_probs(decoder, tokens, tokens, attention_mask=torch.ones(2, 3))
