"""Adapters beside peft: folders that each of the two writes and the other loads, with equal logits and gradients."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import txtrain
from tests.cases import some
from tests.parity import pairs, test_deepseek
from tests.parity.pairs import difference, inputs, logits_of
from txtrain.checkpoint.load import open_model
from txtrain.errors import ConfigError
from txtrain.hf.lora_config import Lora, LoraConfig
from txtrain.hf.peft import WEIGHTS, save_adapter
from txtrain.model.lora import Pair, adapter_of
from txtrain.model.transform import transform

peft = pytest.importorskip("peft")

ALLOWED = 1e-6  # of the largest logit or gradient, in float32
ALL = "all-linear"
# Our names or Hugging Face's; a family's fused matrices (GPT-2's c_attn) in part and whole; everything.
TARGETS = {
    "llama2": (None, ("q_proj", "mlp.down_proj"), ALL, r".*\.layers\.1\..*"),
    "gpt2": (None, ("c_attn",), ("attn.c_proj", "q_proj"), ALL),
    "bert_mlm": (("query", "value"), ALL),
    "vit": (("query", "ffn.up_proj"), ALL),
    "t5": (("q", "wo"), ("EncDecAttention.v",), ALL),
    "transformer": (("q_proj", "fc1"), ALL),
    "deepseek_r1": (None, ("kv_b_proj", "o_proj"), ("experts.down_proj",), ("gate_up_proj",), ("shared_experts.up_proj",), ALL),
}
CASES = [(family, i) for family, targets in TARGETS.items() for i in range(len(targets))]
DEFAULT = [("gpt2", 2), ("deepseek_r1", 5), ("t5", 0)]


def pair_of(family):
    return test_deepseek.pair(0) if family == "deepseek_r1" else pairs.pair(family, 0)


def adapted(family, number, **knobs):
    """The pair, and our model with an adapter of random values."""
    p = pair_of(family)
    config = LoraConfig(type="lora", **{"r": 3, "lora_alpha": 7.0, "target_modules": TARGETS[family][number]} | knobs)
    model = copy.deepcopy(p.ours)
    transform(model, [Lora(config, model.config)])
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for q in (q for q in model.parameters() if q.requires_grad):
            q.copy_(torch.randn(q.shape, generator=generator) * 0.1)
    return p, model.eval(), config


def apart(a, b):
    """A float, so that a failure does not print two models."""
    return difference(a, b)


def write(model, config, folder, adapter=None, base="base"):
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    save_adapter(adapter or adapter_of(model), model.config, shapes, folder, base, rslora=config.rslora)


@pytest.mark.parametrize("case", some(CASES, DEFAULT))
def test_peft_loads_what_we_write_and_learns_the_same(tmp_path, case):
    family, number = case
    p, model, config = adapted(family, number, rslora=number % 2 == 1)
    write(model, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(p.theirs), tmp_path, is_trainable=True).eval()
    ours, loss = logits_of(model(**inputs(p))), logits_of(theirs(**inputs(p)))
    assert apart(ours, loss) < ALLOWED
    assert apart(ours, logits_of(p.ours(**inputs(p)))) > 1e-3, "the adapter does nothing"
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(ours.shape, generator=generator)
    (ours * direction).sum().backward()
    (loss * direction).sum().backward()
    # Our gradients and ones, laid out as theirs: off the diagonal of a fused B theirs has further ones.
    named = dict(model.named_parameters())
    scaling = adapter_of(model)
    gradients, ones = {}, {}
    for name in {n.matrix for n in map(txtrain_factor, named) if n}:
        a, b = (named[f"{name}.lora_{k}.weight" if f"{name}.lora_{k}.weight" in named else f"{name}_lora_{k}"] for k in "AB")
        gradients[name] = Pair(a.grad, b.grad, scaling[name].scaling)
        ones[name] = Pair(torch.ones_like(a), torch.ones_like(b), scaling[name].scaling)
    write(model, config, tmp_path / "gradients", gradients)
    write(model, config, tmp_path / "ones", ones)
    wanted, there = load_file(tmp_path / "gradients" / WEIGHTS), load_file(tmp_path / "ones" / WEIGHTS)
    found = {name.replace(".default", ""): q.grad for name, q in theirs.named_parameters() if q.requires_grad}
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max() for g in found.values())
    for name, gradient in found.items():
        off = ((gradient * there[name] - wanted[name]).abs().max() / largest).item()
        assert off < 10 * ALLOWED, f"{name}: {off:.1e}"


def txtrain_factor(name):
    from txtrain.model.adapter import factor_of

    return factor_of(name)


@torch.no_grad()
@pytest.mark.parametrize("case", some(CASES, [("deepseek_r1", 2)]))
def test_what_we_write_comes_back(tmp_path, case):
    p, model, config = adapted(*case)
    write(model, config, tmp_path, base=str(p.folder))
    ours = logits_of(model(**inputs(p)))
    again = txtrain.load_pretrained(p.folder, adapter=tmp_path)
    assert apart(logits_of(again(**inputs(p))), ours) < ALLOWED
    merged = txtrain.load_pretrained(tmp_path)
    assert apart(logits_of(merged(**inputs(p))), ours) < ALLOWED
    txtrain.save_pretrained(again, tmp_path / "merged")
    assert apart(logits_of(txtrain.load_pretrained(tmp_path / "merged")(**inputs(p))), ours) < ALLOWED


PEFT = [
    ("llama2", {"target_modules": ["q_proj", "gate_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.gate_proj": 3}}),
    ("llama2", {"target_modules": ["k_proj", "down_proj"], "use_rslora": True, "layers_to_transform": [1]}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    ("bert_mlm", {"target_modules": ["query", "dense"]}),
    ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    ("deepseek_r1", {"target_modules": ["kv_a_proj_with_mqa", "kv_b_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
]


@torch.no_grad()
@pytest.mark.parametrize("case", some(PEFT, [PEFT[0], PEFT[2]]))
def test_we_load_what_peft_writes(tmp_path, case):
    family, knobs = case
    p = pair_of(family)
    theirs = peft.get_peft_model(copy.deepcopy(p.theirs), peft.LoraConfig(r=4, lora_alpha=10, lora_dropout=0.0, **knobs)).eval()
    generator = torch.Generator().manual_seed(1)
    for q in (q for q in theirs.parameters() if q.requires_grad):
        q.copy_(torch.randn(q.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path)
    wanted = logits_of(theirs(**inputs(p)))
    assert apart(logits_of(p.theirs(**inputs(p))), wanted) > 1e-3
    assert apart(logits_of(txtrain.load_pretrained(p.folder, adapter=tmp_path)(**inputs(p))), wanted) < ALLOWED


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "`use_dora` must be unset"),
        ({"bias": "all"}, "`bias` must be unset"),
        ({"peft_type": "IA3"}, "`peft_type` must be LORA"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` must be unset"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "`alpha_pattern` must hold numbers by names"),
        ({"alpha_pattern": {".*" * 14 + "!": 3}}, "`alpha_pattern` must hold numbers by names"),  # would take years
        ({"alpha_pattern": {"q_proj": "3"}}, "`alpha_pattern` must hold numbers by names"),
        ({"r": "4"}, "r"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path, changes, told):
    p, model, config = adapted("llama2", 0)
    write(model, config, tmp_path, base=str(p.folder))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=told):
        txtrain.load_pretrained(p.folder, adapter=tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda name, tensor: {name: tensor.to(torch.int64)}, "the dtype of"),
        (lambda name, tensor: {name: tensor.to(torch.float8_e4m3fn)}, "the dtype of"),
        (lambda name, tensor: {name: tensor, name.removeprefix("base_model.model."): tensor.clone()}, "must hold one adapter of"),
        (lambda name, tensor: {name: tensor * 1e30}, "hold NaN or infinity"),  # merged, not by themselves
    ],
)
def test_factors_that_are_no_numbers_or_come_twice_are_refused(tmp_path, change, told):
    p, model, config = adapted("llama2", 0)
    write(model, config, tmp_path, base=str(p.folder))
    factors = load_file(tmp_path / WEIGHTS)
    save_file({n: t for name, tensor in factors.items() for n, t in change(name, tensor).items()}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=told):
        open_model(tmp_path, "init_from", finite=True)


def test_an_adapter_of_another_model_is_refused_and_one_without_its_base_says_so(tmp_path):
    _, model, config = adapted("llama2", 0)
    write(model, config, tmp_path, base="nowhere")
    with pytest.raises(ConfigError, match="is of another model"):
        txtrain.load_pretrained(pair_of("gpt2").folder, adapter=tmp_path)
    with pytest.raises(ConfigError, match="its base 'nowhere' is not there"):
        txtrain.load_pretrained(tmp_path)
