"""Every kernel equals the plain formula, values and gradients; the plain formula equals a loop."""

import itertools
import math

import pytest
import torch

from tests.cases import some
from txtrain.model.attention import kernels
from txtrain.model.attention.kernel_choice import choose_kernel
from txtrain.model.attention.mask import Mask, prepare

B, N, K, T, H = 2, 4, 2, 12, 8
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
VALID = torch.tensor([[False] * 3 + [True] * 9, [True] * 12])
MASKS = {
    "causal": {},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "documents": {"documents_BS": DOCUMENTS},
    "documents, window": {"documents_BS": DOCUMENTS, "window": 3},
    "padding": {"valid_BS": VALID},
    "padding, window": {"valid_BS": VALID, "window": 3},
    "bidirectional": {"causal": False},
    "bidirectional, padding": {"causal": False, "valid_BS": VALID},
}


def inputs(n_queries=T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, N, n_queries, H), (B, K, T, H), (B, K, T, H)]
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


def run(kernel, mask, q, k, v, bias=None, softcap=None, scale=0.3):
    prepared = prepare(mask, kernel, bias, torch.device("cpu"), q.dtype)
    return kernels.KERNELS[kernel](q, k, v, prepared, scale, softcap, 0.0)


def by_loops(mask, q, k, v, bias, softcap, scale=0.3):
    """Attention as one would write it on paper."""
    out = torch.zeros_like(q)
    shift = k.shape[2] - q.shape[2]
    for b, n, t in itertools.product(range(B), range(N), range(q.shape[2])):
        scores = {}
        for s in range(k.shape[2]):
            i = t + shift
            hidden = (mask.causal and s > i) or (mask.window is not None and i - s >= mask.window)
            hidden |= mask.documents_BS is not None and bool(mask.documents_BS[b, i] != mask.documents_BS[b, s])
            hidden |= mask.valid_BS is not None and not mask.valid_BS[b, s]
            if not hidden:
                x = (q[b, n, t] @ k[b, n * K // N, s]).item() * scale
                x = math.tanh(x / softcap) * softcap if softcap else x
                scores[s] = x + (bias[0, n, t, s].item() if bias is not None else 0.0)
        total = sum(math.exp(x) for x in scores.values())
        for s, x in scores.items():
            out[b, n, t] += math.exp(x) / total * v[b, n * K // N, s]
    return out


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n_queries", [T, 5])
def test_plain_equals_loops(name, softcap, with_bias, n_queries):
    mask = Mask(n_queries, T, **MASKS[name])
    q, k, v = (x.detach() for x in inputs(n_queries))
    bias = torch.randn(1, N, n_queries, T) if with_bias else None
    torch.testing.assert_close(run("plain", mask, q, k, v, bias, softcap), by_loops(mask, q, k, v, bias, softcap), rtol=1e-5, atol=1e-6)


def values_and_gradients(kernel, mask, bias, softcap, n_queries):
    q, k, v = inputs(n_queries)
    leaves = [q, k, v] + ([bias.requires_grad_()] if bias is not None else [])
    out = run(kernel, mask, q, k, v, bias, softcap)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out, torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n_queries", [T, 5, 1])
def test_sdpa_equals_plain_with_gradients(name, with_bias, n_queries):
    mask = Mask(n_queries, T, **MASKS[name])
    kernel = choose_kernel(mask, device_type="cpu", softcap=False, bias=with_bias, dropout=False, half=False)
    assert kernel in ("sdpa", "sdpa_masked")
    bias = torch.randn(1, N, n_queries, T, generator=torch.Generator().manual_seed(3)) if with_bias else None
    expected, expected_gradients = values_and_gradients("plain", mask, bias, None, n_queries)
    got, gradients = values_and_gradients(kernel, mask, bias, None, n_queries)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for g, e in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("varying", [True, False])
@pytest.mark.parametrize("value_size", [H, H - 2, H + 2])
@pytest.mark.parametrize("bias_rows", [0, 1, B])
@pytest.mark.parametrize("n_scores", [1, 5 * T * N])  # a piece is one head of keys, or both heads
def test_blocks_equal_plain_with_gradients(name, softcap, varying, value_size, bias_rows, n_scores, monkeypatch):
    monkeypatch.setattr("txtrain.model.attention.mask.BLOCK", 5)  # the last block is shorter
    monkeypatch.setattr("txtrain.model.attention.kernel_choice.CACHED_SCORES", n_scores)
    mask = Mask(T, T, **MASKS[name])
    g = torch.Generator().manual_seed(5)
    biases = [torch.randn(bias_rows, N, T, T, generator=g, dtype=torch.float64).requires_grad_()] if bias_rows else []
    found = []
    for kernel in ("plain", "blocks"):
        q, k, v = (x.detach().double() for x in inputs())
        leaves = [q.requires_grad_(), k.requires_grad_(), torch.cat((v, v.flip(-1)), -1)[..., :value_size].requires_grad_()]
        prepared = prepare(mask, kernel, biases[0] if biases else None, torch.device("cpu"), q.dtype, varying)
        out = kernels.KERNELS[kernel](*leaves, prepared, 0.3, softcap, 0.0)
        weights = torch.randn(out.shape, generator=g.manual_seed(5), dtype=out.dtype)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [*leaves, *biases])))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_block_reads_only_what_its_queries_may_see(monkeypatch):
    monkeypatch.setattr("txtrain.model.attention.mask.BLOCK", 4)

    def read(varying, **mask):
        return [tuple(block) for block in prepare(Mask(T, T, **mask), "blocks", None, torch.device("cpu"), torch.float32, varying).blocks]

    assert read(True) == [(0, 4, 0, 4), (4, 8, 0, 8), (8, 12, 0, 12)]
    assert read(True, window=3) == [(0, 4, 0, 4), (4, 8, 2, 8), (8, 12, 6, 12)]
    assert read(True, documents_BS=DOCUMENTS[:1]) == [(0, 4, 0, 4), (4, 8, 0, 8), (8, 12, 5, 12)], "the second begins at 5"
    assert read(True, documents_BS=DOCUMENTS[:1], window=3) == [(0, 4, 0, 4), (4, 8, 2, 8), (8, 12, 6, 12)]
    assert read(True, documents_BS=DOCUMENTS) == [(0, 4, 0, 4), (4, 8, 0, 8), (8, 12, 0, 12)], "the other row is one document"
    assert read(False, documents_BS=DOCUMENTS[:1]) == [(0, 4, 0, 4), (4, 8, 0, 8), (8, 12, 0, 12)], "compiled: equal for all batches"
    assert read(True, causal=False) == [(0, 4, 0, 12), (4, 8, 0, 12), (8, 12, 0, 12)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", some(MASKS, [*MASKS][1::3]))
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_flex_equals_plain(name, softcap, with_bias):
    """Forward only: flex attention has no backward on the CPU (see the gpu-marked test)."""
    mask = Mask(T, T, **MASKS[name])
    q, k, v = (x.detach() for x in inputs())
    bias = torch.randn(1, N, T, T) if with_bias else None
    with torch.no_grad():
        torch.testing.assert_close(run("flex", mask, q, k, v, bias, softcap), run("plain", mask, q, k, v, bias, softcap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value_size", [H, H - 2, H + 2])
def test_the_kernel_of_packed_documents_gets_heads_of_one_size(value_size, monkeypatch):
    """By a stand-in: torch has the kernel on CUDA alone."""
    q, k, v = (x.detach() for x in inputs())
    v = torch.cat((v, v.flip(-1)), -1)[..., :value_size]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    mask = Mask(T, T, **MASKS["documents"])
    torch.testing.assert_close(run("varlen", mask, q, k, v), run("plain", mask, q, k, v), rtol=1e-5, atol=1e-6)


def test_the_kernel_of_packed_documents_gets_one_dtype_under_autocast(monkeypatch):
    """It has no rule for autocast, under which the norms of q and k give float32 beside the values' bfloat16."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    q, k, v = (x.detach() for x in inputs())
    given = q, k, v.bfloat16(), Mask(T, T, **MASKS["documents"])
    with torch.autocast("cpu", torch.bfloat16):
        prepared = prepare(given[3], "varlen", None, torch.device("cpu"), torch.bfloat16)
        found = kernels.KERNELS["varlen"](*given[:3], prepared, 0.3, None, 0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), run("plain", given[3], q, k, v), rtol=0.03, atol=0.03)


def by_documents(q, k, v, begins, ends, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """The kernel's contract, one document after another: [tokens of all rows, N or K, H]."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert (q.dtype, k.dtype) == (v.dtype, v.dtype)
    found = []
    for begin, end in itertools.pairwise(begins.tolist()):
        of_one = (x[None, begin:end].transpose(1, 2) for x in (q, k, v))
        found.append(torch.nn.functional.scaled_dot_product_attention(*of_one, is_causal=True, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(found, 1).transpose(0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cuda_kernels_equal_plain_in_bf16(name, softcap, with_bias):
    device, length, size = torch.device("cuda"), 256, 64
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, length, size, generator=g).to(device, torch.bfloat16).requires_grad_() for n in (N, K, K))
    wide = {key: value.repeat_interleave(length // T + 1, 1)[:, :length].to(device) if torch.is_tensor(value) else value for key, value in MASKS[name].items()}
    mask = Mask(length, length, **wide)
    bias = torch.randn(1, N, length, length, generator=g).to(device) if with_bias else None
    kernel = choose_kernel(mask, device_type="cuda", softcap=softcap is not None, bias=with_bias, dropout=False, half=True)
    results = []
    for name_of_kernel in ("plain", kernel):
        prepared = prepare(mask, name_of_kernel, bias, device, torch.bfloat16)
        out = kernels.KERNELS[name_of_kernel](q, k, v, prepared, 0.125, softcap, 0.0)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("kernel", ["plain", "sdpa_masked", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_gives_zero_and_finite_gradients(kernel, dtype):
    mask = Mask(T, T, valid_BS=VALID)
    for bias in (None, torch.randn(1, N, T, T)):
        q, k, v = inputs(dtype=dtype)
        out = run(kernel, mask, q, k, v, bias)
        assert (out[0, :, :3] == 0).all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in gradients)
        assert (gradients[0][0, :, :3] == 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["plain", "sdpa_masked", "flex"])
def test_a_document_without_a_source_sees_nothing_of_the_others(kernel):
    """In cross-attention: a dropped span may hold all of a document."""
    queries = torch.tensor([[0] * 5 + [2] * 7, [1] * 12])
    mask = Mask(T, T, causal=False, documents_BS=DOCUMENTS, query_documents_BT=queries)
    q, k, v = (x.detach() for x in inputs())
    with torch.no_grad():
        out = run(kernel, mask, q, k, v)
    assert (out[0, :, 5:] == 0).all()
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[:1, :, :5], run("plain", Mask(5, 5, causal=False), q[:1, :, :5], k[:1, :, :5], v[:1, :, :5]), rtol=1e-5, atol=1e-6)


def kernel_of(device_type="cpu", softcap=False, bias=False, dropout=False, half=True, learned=False, length=T, **mask):
    given = {"softcap": softcap, "bias": bias or learned, "learned": learned, "dropout": dropout, "half": half}
    return choose_kernel(Mask(length, length, **mask), device_type=device_type, **given)


def test_the_kernel_follows_mask_and_device():
    assert kernel_of() == kernel_of("cuda") == "sdpa"
    assert kernel_of(window=T) == "sdpa", "a window as wide as the sequence hides nothing"
    assert kernel_of(window=3) == kernel_of(documents_BS=DOCUMENTS) == kernel_of(valid_BS=VALID) == kernel_of(bias=True) == "sdpa_masked"
    assert kernel_of("cuda", window=3) == kernel_of("cuda", valid_BS=VALID) == kernel_of("cuda", bias=True) == kernel_of("cuda", softcap=True) == "flex"
    assert kernel_of("cuda", documents_BS=DOCUMENTS) == kernel_of("cuda", documents_BS=DOCUMENTS, window=3) == "varlen"
    assert kernel_of("cuda", documents_BS=DOCUMENTS, half=False) == "flex"
    assert kernel_of(softcap=True) == kernel_of("cuda", softcap=True, dropout=True) == "plain"
    assert kernel_of("cuda", documents_BS=DOCUMENTS, dropout=True) == "sdpa_masked"
    assert kernel_of(window=3, length=512) == kernel_of(softcap=True, length=256) == kernel_of(learned=True, causal=False, length=256) == "blocks"
    assert kernel_of(bias=True, length=512) == kernel_of(learned=True) == kernel_of(window=3, length=256) == "sdpa_masked"


def test_document_offsets_lay_the_batch_end_to_end():
    prepared = prepare(Mask(T, T, documents_BS=DOCUMENTS), "varlen", None, torch.device("cpu"), torch.float32)
    assert prepared.offsets.tolist() == [0, 5, 12, 24]
