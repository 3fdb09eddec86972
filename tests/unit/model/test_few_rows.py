"""Kernels for few rows: their values are torch's, and where they do not fit or cannot be had, torch computes."""

import os

import pytest
import torch
import torch.nn.functional as F

from tests.models import ids, seeded, shake, tiny
from txtrain.ground import native
from txtrain.model import few_rows as module
from txtrain.model import options
from txtrain.model.few_rows import MOST_ROWS, Kernels, few_rows, kernels
from txtrain.model.ffn.moe import Experts
from txtrain.model.generation import generate
from txtrain.model.norm.norms import RMSNorm

needs_kernels = pytest.mark.skipif(isinstance(kernels(), str), reason=f"no kernels here: {kernels()}")

MODELS = {
    "gated": tiny(),
    "biases": tiny(ffn=options.MLPConfig(type="mlp", activation="gelu"), norm=options.LayerNormConfig(type="layer"), tie_word_embeddings=False),
    "experts": tiny(ffn=options.MoEConfig(type="moe_softmax", n_experts=4, top_k=2, hidden_dim=16)),
    "latent": tiny(attention=options.MLAConfig(type="mla", kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8)),
    "unit offset, softcap": tiny(norm=options.RMSNormConfig(type="rms", unit_offset=True), logit_softcap=5.0),
}


@pytest.fixture
def calls(monkeypatch):
    """Names of what our kernels computed."""
    seen = []
    own = kernels()
    for name in ("_product", "_rms_norm"):
        made = getattr(own, name)
        monkeypatch.setattr(own, name, lambda *given, name=name, made=made: (seen.append(name), made(*given))[1])
    return seen


def values(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@needs_kernels
@pytest.mark.parametrize("n_rows", [1, 2, 7, 8, 9, 16, 17, 24, 33, MOST_ROWS])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_is_right_within_the_bound_of_its_summation(n_rows: int, threads: int, monkeypatch, calls) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.inference_mode():
        for inputs in (1, 8, 15, 64, 65, 200):
            for outputs in (1, 7, 8, 33, 100):
                x, w, b = values(n_rows, inputs), values(outputs, inputs), values(outputs)
                for bias in (None, b):
                    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
                    largest = F.linear(x.abs().double(), w.abs().double(), None if bias is None else bias.abs().double())
                    error = (kernels().linear(x, w, bias) - exact).abs()
                    # At most 64 summands, or a sixteenth of them, are added to one another; then the parts, and the bias.
                    assert (error <= (64 + 4 + 1) * 2**-24 * largest).all(), (inputs, outputs, bias is None)
    assert len(calls) == 60


@needs_kernels
def test_a_norm_is_torchs(calls) -> None:
    for size in (1, 15, 64, 200):
        for offset in (False, True):
            norm = RMSNorm(size, eps=1e-3, unit_offset=offset)
            norm.weight.data = values(size)
            x = 5 * values(3, 4, size)
            with torch.inference_mode():
                torch.testing.assert_close(kernels().normed(norm, x), norm(x), rtol=2e-6, atol=2e-6)
    assert len(calls) == 8


@needs_kernels
def test_not_a_number_and_infinity_stay_what_they_are() -> None:
    w = values(9, 40)
    for n_rows in (1, 5):
        x = values(n_rows, 40)
        x[0, 3], w[4, 7] = torch.inf, torch.nan
        with torch.inference_mode():
            ours, theirs = kernels().linear(x, w), F.linear(x, w)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@needs_kernels
def test_what_does_not_fit_is_torchs(calls) -> None:
    own, x, w = kernels(), values(3, 40), values(9, 40)
    own.linear(x, w)  # autograd is on
    with torch.inference_mode():
        own.linear(x.double(), w.double())
        own.linear(values(40, 3).t(), w)
        own.linear(x, values(40, 9).t())
        own.linear(values(MOST_ROWS + 1, 40), w)
        own.linear(values(0, 40), w)
        with torch.autocast("cpu", torch.bfloat16):
            assert own.linear(x, w).dtype is torch.bfloat16
        own.normed(RMSNorm(40).double(), x.double())
    with pytest.raises(RuntimeError, match="shape"):
        own.linear(x, values(9, 20))
    assert not calls


@needs_kernels
def test_experts_that_nobody_visits_are_not_read() -> None:
    experts = Experts(8, 16, 4, "silu")
    for p in experts.parameters():
        p.data = values(*p.shape)
    x, counts = values(5, 8), torch.tensor([2, 0, 3, 0])
    with torch.inference_mode():
        expected = experts(x, counts)
        experts.gate_proj[1], experts.down_proj[3] = torch.nan, torch.nan
        own = kernels()
        for name, rows in (("gate_proj", x), ("down_proj", values(5, 16))):
            torch.testing.assert_close(own.of_experts(experts, rows, name, counts), experts.product(rows, name, counts))
        assert expected.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("what", MODELS)
def test_a_text_is_the_one_that_torch_writes_and_the_model_stays_as_it_was(what: str, calls, monkeypatch) -> None:
    model, prompt = shake(seeded(MODELS[what])), ids(3, 9)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    ours = generate(model, prompt, max_new_tokens=12, eos_token_id=None)
    assert "_product" in calls
    assert ("_rms_norm" in calls) == ("biases" not in what)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    monkeypatch.setattr(module, "kernels", lambda: "told so")
    calls.clear()
    assert torch.equal(ours, generate(model, prompt, max_new_tokens=12, eos_token_id=None))
    assert not calls


@needs_kernels
def test_an_error_leaves_the_model_as_it_was() -> None:
    model = seeded(tiny())
    before = [set(vars(m)) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), few_rows(model):
        vars(model.blocks[0].ffn.up_proj)["forward"](1 / 0)
    assert [set(vars(m)) for m in model.modules()] == before


@needs_kernels
def test_a_library_is_compiled_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Kernels().check()
    made = list((tmp_path / "txtrain/native").iterdir())
    assert [path.suffix for path in made] == [".so"]
    monkeypatch.setattr(native.subprocess, "run", None)
    Kernels().check()


def test_processes_of_one_number_do_not_write_one_file(tmp_path, monkeypatch) -> None:
    """Containers that share a home folder: one would load what the other has half written."""
    made, copied = tmp_path / "made.so", []
    monkeypatch.setattr(native.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(native.shutil, "copyfile", lambda _, to: copied.append(to) or to.touch())
    for _ in range(2):
        native._compile("c++", tmp_path / "source.cpp", made)
    assert len(set(copied)) == 2
    assert list(tmp_path.iterdir()) == [made]


def test_without_a_compiler_or_a_place_the_reason_is_known(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = module.Path(module.__file__).with_suffix(".cpp")

    def reason() -> str:
        with pytest.raises(native.Unavailable) as e:
            native.library(source)
        return str(e.value)

    monkeypatch.setattr(native, "_processor", lambda: "avx2")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert reason() == "there is no C++ compiler"
    monkeypatch.setenv("CXX", "/bin/false")
    assert "/bin/false failed" in reason()
    os.chmod(tmp_path / "txtrain/native", 0o777)
    assert "others may write to" in reason()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "Not a directory" in reason()
    monkeypatch.undo()
    monkeypatch.setattr(native.Path, "read_text", lambda self, **_: "flags : sse2")
    assert "AVX2" in reason()


@needs_kernels
def test_kernels_that_compute_something_else_are_not_used(monkeypatch) -> None:
    monkeypatch.setattr(Kernels, "linear", lambda self, x, w, b=None: F.linear(x, w, b) + 1)
    kernels.cache_clear()
    try:
        assert kernels() == "what they compute here is wrong"
    finally:
        kernels.cache_clear()
