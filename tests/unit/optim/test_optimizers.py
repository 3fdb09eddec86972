"""Each optimizer against the formulas of its paper, written out for one parameter, and against others' where there are any."""

import math
import re

import pytest
import torch
from torch import nn

from tests.cases import some
from tests.training import rows, tiny, weights
from txtrain.checkpoint import format as checkpoint
from txtrain.errors import ConfigError
from txtrain.optim.config import AdafactorConfig, AdamConfig, GroupConfig, LionConfig, MuonConfig
from txtrain.optim.groups import parameter_groups, set_rates
from txtrain.optim.muon import orthogonalised
from txtrain.registry import make
from txtrain.training.run import train

SHAPES = {"wide.weight": (4, 6), "tall.weight": (7, 3), "experts": (2, 3, 5), "norm.weight": (5,), "embedding.weight": (8, 4)}
RATES = (0.5, 1.0, 1.0, 0.7, 0.3)  # the schedule of five steps


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def stepped(config, dtype=torch.float64):
    """The parameters after five steps with gradients that were drawn."""
    parameters = {name: nn.Parameter(value) for name, value in draw(0, dtype).items()}
    optimizer = make("optimizer", config, params=parameter_groups(parameters.items(), config))
    for step, share in enumerate(RATES, start=1):
        for name, grad in draw(step, dtype).items():
            parameters[name].grad = grad
        set_rates(optimizer, share)
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


def expected(rule, config):
    """rule(p, g, t, rate, decay, memory) -> the next p, by the paper."""
    values, memories = draw(0), {name: {} for name in SHAPES}
    for step, share in enumerate(RATES, start=1):
        for name, grad in draw(step).items():
            decay = config.weight_decay if name in ("wide.weight", "tall.weight", "experts") else 0.0
            values[name] = rule(name, values[name], grad, step, config.lr * share, decay, memories[name])
    return values


def assert_equal(got, want, **tolerance):
    for name in SHAPES:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_lion_is_the_sign_of_its_interpolated_momentum():
    config = LionConfig(type="lion", lr=0.01, weight_decay=0.3, betas=(0.8, 0.95))

    def rule(name, p, g, t, rate, decay, memory):
        m = memory.get("m", torch.zeros_like(p))
        memory["m"] = 0.95 * m + 0.05 * g
        return p - rate * (torch.sign(0.8 * m + 0.2 * g) + decay * p)

    assert_equal(stepped(config), expected(rule, config), rtol=1e-12, atol=1e-12)


def adam_rule(p, g, t, rate, decay, memory, betas=(0.9, 0.95), eps=1e-8):
    m = memory["m"] = betas[0] * memory.get("m", torch.zeros_like(p)) + (1 - betas[0]) * g
    v = memory["v"] = betas[1] * memory.get("v", torch.zeros_like(p)) + (1 - betas[1]) * g**2
    return p * (1 - rate * decay) - rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_moves_matrices_by_their_orthogonalised_momentum_and_the_rest_by_adamw(adjust_lr_fn, nesterov):
    config = MuonConfig(type="muon", lr=0.02, weight_decay=0.3, nesterov=nesterov, ns_dtype="float32", adjust_lr_fn=adjust_lr_fn)

    def polynomial(x):  # a quintic of the singular values: by a decomposition, where the optimizer multiplies matrices
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        s = s / s.square().sum(-1, keepdim=True).sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return u * s.unsqueeze(-2) @ v

    def rule(name, p, g, t, rate, decay, memory):
        if name in ("norm.weight", "embedding.weight"):
            return adam_rule(p, g, t, rate, decay, memory)
        m = memory["m"] = 0.95 * memory.get("m", torch.zeros_like(p)) + 0.05 * g
        rows, columns = p.shape[-2:]
        scale = math.sqrt(max(1, rows / columns)) if adjust_lr_fn == "original" else 0.2 * math.sqrt(max(rows, columns))
        return p * (1 - rate * decay) - rate * scale * polynomial(0.95 * m + 0.05 * g if nesterov else m)

    assert_equal(stepped(config), expected(rule, config), rtol=1e-4, atol=1e-5)  # the iteration is in float32
    assert_equal(stepped(config, torch.float32), {n: p.float() for n, p in expected(rule, config).items()}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_muon_equals_torchs_on_matrices(adjust_lr_fn):
    config = MuonConfig(type="muon", lr=0.02, weight_decay=0.3, adjust_lr_fn=adjust_lr_fn)
    got = stepped(config, torch.float32)
    for name in ("wide.weight", "tall.weight"):
        p = nn.Parameter(draw(0, torch.float32)[name])
        theirs = torch.optim.Muon([p], lr=0.02, weight_decay=0.3, adjust_lr_fn=adjust_lr_fn)
        for step, share in enumerate(RATES, start=1):
            p.grad = draw(step, torch.float32)[name]
            theirs.param_groups[0]["lr"] = 0.02 * share
            theirs.step()
        torch.testing.assert_close(got[name], p.detach(), rtol=0, atol=1e-4)  # both in bfloat16; a step is 0.02


@pytest.mark.parametrize("shape", [(6, 6), (3, 50), (50, 3), (4, 5, 7)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalised(x, 5, dtype))
        assert 0.4 < values.min() < values.max() < 1.4, (dtype, values)
    assert not orthogonalised(torch.zeros(3, 4), 5, torch.float32).any(), "no direction in a gradient of zero"


ADAFACTOR = {
    "as T5": AdafactorConfig(type="adafactor", lr=0.05, clip_threshold=0.7),
    "momentum and decay": AdafactorConfig(type="adafactor", lr=0.05, beta1=0.9, weight_decay=0.3),
    "absolute": AdafactorConfig(type="adafactor", lr=0.05, scale_parameter=False),
    "relative": AdafactorConfig(type="adafactor", lr=0.6, relative_step=True),
    "relative, scaled": AdafactorConfig(type="adafactor", lr=0.6, relative_step=True, groups=(GroupConfig(pattern="wide", lr_scale=0.1), GroupConfig(pattern="norm", lr_scale=2.0))),
}


def adafactor_rule(config):
    def rms(x):
        return x.square().mean().sqrt()

    def rule(name, p, g, t, rate, decay, memory):
        beta2, squared = 1 - t**-config.beta2_decay, g**2 + config.eps[0]
        if p.ndim >= 2:
            row = memory["row"] = beta2 * memory.get("row", 0) + (1 - beta2) * squared.mean(-1)
            col = memory["col"] = beta2 * memory.get("col", 0) + (1 - beta2) * squared.mean(-2)
            second = row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None]
        else:
            second = memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * squared
        update = g / second.sqrt()
        update = update / max(1.0, rms(update) / config.clip_threshold)
        rate = min(rate, 1 / math.sqrt(t)) if config.relative_step else rate
        rate = rate * next((group.lr_scale for group in config.groups if group.pattern in name), 1.0)
        rate = rate * max(config.eps[1], rms(p)) if config.scale_parameter else rate
        update = memory["m"] = rate * update if config.beta1 is None else config.beta1 * memory.get("m", 0) + (1 - config.beta1) * rate * update
        return p * (1 - decay * rate) - update

    return rule


@pytest.mark.parametrize("case", ADAFACTOR)
def test_adafactor_is_the_papers(case):
    config = ADAFACTOR[case]
    want = {name: p.float() for name, p in expected(adafactor_rule(config), config).items()}
    assert_equal(stepped(config, torch.float32), want, rtol=2e-5, atol=2e-6)


def test_adafactor_keeps_rows_and_columns_in_float32_and_no_matrix():
    config = ADAFACTOR["as T5"]
    p = nn.Parameter(torch.ones(40, 30, dtype=torch.bfloat16))
    optimizer = make("optimizer", config, params=parameter_groups([("w", p)], config))
    p.grad = torch.randn(40, 30).bfloat16()
    optimizer.step()
    assert {name: (tuple(t.shape), t.dtype) for name, t in optimizer.state[p].items()} == {
        "step": ((), torch.float32),
        "row": ((40,), torch.float32),
        "col": ((30,), torch.float32),
    }


@pytest.mark.parametrize(("given", "named"), [("adamw optimizer.eps=0", "optimizer.eps"), ("muon optimizer.adamw_eps=0", "optimizer.adamw_eps"), ("adafactor optimizer.eps=[0,1e-3]", "optimizer.eps[0]")])
def test_an_epsilon_of_zero_is_refused(given, named, tmp_path):
    """A row without a gradient would be NaN after the first step: 0/0."""
    with pytest.raises(ConfigError, match=rf"`{re.escape(named)}` must be above 0, but is 0"):
        tiny(tmp_path, *f"optimizer={given}".split())


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_equals_the_one_that_trained_t5_in_transformers(beta1):
    theirs_of = pytest.importorskip("transformers.optimization").Adafactor
    config = AdafactorConfig(type="adafactor", lr=0.05, beta1=beta1, weight_decay=0.1, no_decay=())
    got = stepped(config, torch.float32)
    parameters = {name: nn.Parameter(value) for name, value in draw(0, torch.float32).items()}
    theirs = theirs_of(parameters.values(), lr=0.05, beta1=beta1, weight_decay=0.1, relative_step=False, scale_parameter=True, warmup_init=False)
    for step, share in enumerate(RATES, start=1):
        for name, grad in draw(step, torch.float32).items():
            parameters[name].grad = grad
        theirs.param_groups[0]["lr"] = 0.05 * share
        theirs.step()
    assert_equal(got, {name: p.detach() for name, p in parameters.items()}, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("kind", "reference"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_adam_is_torchs_and_fused(kind, reference):
    config = AdamConfig(type=kind, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    values = []
    for build in (lambda p: make("optimizer", config, params=[{"params": p, "weight_decay": 0.2}]), lambda p: reference(p, 0.1, (0.8, 0.9), 1e-6, 0.2)):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = build([parameter])
        for _ in range(3):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5])
            optimizer.step()
        values.append(parameter.detach())
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    assert make("optimizer", config, params=[{"params": [nn.Parameter(torch.ones(3))]}]).defaults["fused"] is True


RUNS = {
    "lion": ("optimizer=lion", "optimizer.lr=3e-3"),
    "adafactor": ("optimizer=adafactor", "optimizer.lr=0.2"),
    "adafactor with momentum": ("optimizer=adafactor", "optimizer.lr=0.2", "optimizer.beta1=0.9", "trainer.precision=bf16-true"),
    "muon": ("optimizer=muon", "optimizer.adamw_lr=0.003", "data.micro_batch_size=4"),
    "muon of experts": ("optimizer=muon", "model/ffn=moe"),
    "groups": ("optimizer.groups=[{pattern: embedding, lr_scale: 0.1, weight_decay: 0.5}]", "scheduler=inverse_sqrt"),
}


@pytest.mark.parametrize("case", some(RUNS, ("muon",)))
def test_it_learns_and_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, case):
    def config(run, steps):
        return tiny(tmp_path, "scheduler=constant", "scheduler.warmup_steps=4", *RUNS[case], f"run_dir={tmp_path / run}", f"trainer.max_steps={steps}")

    train(config("whole", 12))
    train(config("parts", 5))
    train(config("parts", 12))
    whole = rows(tmp_path / "whole")
    assert [row for row in rows(tmp_path / "parts") if row["step"] not in "5"] == [row for row in whole if row["step"] not in "5"]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert float(whole[-1]["loss"]) < float(whole[0]["loss"]) - 0.5, [row["loss"] for row in whole]
    names = checkpoint.shapes(checkpoint.locate(tmp_path / "whole")).keys()
    assert any(name.startswith("optimizer.") for name in names)
