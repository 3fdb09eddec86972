"""Adapters beside peft: folders that each of the two writes and the other loads, with equal logits and gradients."""

import copy
import dataclasses as dc
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import txtrain
from tests.cases import some
from tests.parity import pairs, test_classes, test_deepseek
from tests.parity.pairs import difference, inputs, logits_of
from txtrain.checkpoint.load import open_model
from txtrain.errors import ConfigError
from txtrain.hf.lora_config import Lora, LoraConfig
from txtrain.hf.peft import WEIGHTS, save_adapter
from txtrain.model.adapter import factor_of
from txtrain.model.head.config import ClassHeadConfig
from txtrain.model.lora import Pair, adapter_of, kept
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
    return p, shaken(model, number), config


@torch.no_grad()
def shaken(model, seed):
    """Random values in all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for q in (q for q in model.parameters() if q.requires_grad):
        q.copy_(torch.randn(q.shape, generator=generator) * 0.1)
    return model.eval()


def apart(a, b):
    """A float, so that a failure does not print two models."""
    return difference(a, b)


def write(model, config, folder, adapter=None, base="base", of=lambda t: t):
    """of: what is written of the tensors that are saved whole."""
    shapes, named = {name: tuple(t.shape) for name, t in model.state_dict().items()}, dict(model.named_parameters())
    whole = {name: of(named.get(name, t)) for name, t in kept(model).items() if factor_of(name) is None}
    save_adapter(adapter or adapter_of(model), model.config, shapes, folder, base, rslora=config.rslora, whole=whole)


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
    for name in {n.matrix for n in map(factor_of, named) if n}:
        a, b = (named[f"{name}.lora_{k}.weight" if f"{name}.lora_{k}.weight" in named else f"{name}_lora_{k}"] for k in "AB")
        gradients[name] = Pair(a.grad, b.grad, scaling[name].scaling)
        ones[name] = Pair(torch.ones_like(a), torch.ones_like(b), scaling[name].scaling)
    write(model, config, tmp_path / "gradients", gradients, of=lambda t: t.grad)
    write(model, config, tmp_path / "ones", ones, of=torch.ones_like)
    wanted, there = load_file(tmp_path / "gradients" / WEIGHTS), load_file(tmp_path / "ones" / WEIGHTS)
    found = {name.replace(".default", "").replace(".modules_to_save", ""): q.grad for name, q in theirs.named_parameters() if q.requires_grad}
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max() for g in found.values())
    for name, gradient in found.items():
        off = ((gradient * there[name] - wanted[name]).abs().max() / largest).item()
        assert off < 10 * ALLOWED, f"{name}: {off:.1e}"


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
    theirs = shaken(peft.get_peft_model(copy.deepcopy(p.theirs), peft.LoraConfig(r=4, lora_alpha=10, lora_dropout=0.0, **knobs)), 1)
    theirs.save_pretrained(tmp_path)
    wanted = logits_of(theirs(**inputs(p)))
    assert apart(logits_of(p.theirs(**inputs(p))), wanted) > 1e-3
    assert apart(logits_of(txtrain.load_pretrained(p.folder, adapter=tmp_path)(**inputs(p))), wanted) < ALLOWED


HEADS = {  # family -> where PEFT saves the new head
    "llama2": {"score"}, "gpt2": {"score"}, "bert": {"classifier"}, "vit": {"classifier"}, "deepseek_r1": {"score"}, "t5": {"classification_head.dense", "classification_head.out_proj"},
}


def labelled(family, folder):
    """A folder without a head of classes, transformers' model of it with a new one of three, and ours with the same values but the head's."""
    p = pair_of(family)
    copy.deepcopy(p.theirs.vit if family == "vit" else p.theirs.bert if family == "bert" else p.theirs).save_pretrained(folder)  # it writes its name into the config
    more = {"num_labels": 3, "attn_implementation": "eager"} | ({} if family == "vit" else {"pad_token_id": test_classes.PAD})
    more |= {"eos_token_id": test_classes.END} if family == "t5" else {}
    theirs = test_deepseek.eager(getattr(transformers, test_classes.CLASSES[family]).from_pretrained(folder, **more).eval())
    body = txtrain.load_pretrained(folder)
    model = txtrain.build_model(dc.replace(body.config, head=ClassHeadConfig(type="class", n_classes=3, label_names=("a", "b", "c"))))
    model.load_state_dict(body.state_dict(), strict=False)
    return theirs, model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", some(HEADS, ("bert", "llama2")))
def test_a_new_head_beside_the_adapter_goes_out_and_comes_in(tmp_path, family):
    base, ours, back, peft_s = (tmp_path / name for name in ("base", "ours", "back", "peft"))
    theirs, model = labelled(family, base)
    batch = test_classes.rows(theirs, "right", 0)
    config = LoraConfig(type="lora", r=3, lora_alpha=7.0, target_modules=ALL)
    transform(model, [Lora(config, model.config)])
    wanted = shaken(model, 3)(**batch).logits
    write(model, config, ours, base=str(base))
    said = json.loads((ours / "adapter_config.json").read_text())
    pooler = {"bert": {"bert.pooler.dense"}}.get(family, set())
    assert (set(said["modules_to_save"]), said["task_type"]) == (HEADS[family] | pooler, None if family == "vit" else "SEQ_CLS")
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), ours).eval()
    assert apart(in_peft(**batch).logits, wanted) < ALLOWED
    for again in (txtrain.load_pretrained(ours), txtrain.load_pretrained(base, adapter=ours)):
        assert apart(again(**batch).logits, wanted) < ALLOWED
        assert again.config.head.label_names == ("a", "b", "c")
    in_peft.save_pretrained(back)
    assert load_file(back / WEIGHTS).keys() == load_file(ours / WEIGHTS).keys()

    of = {"task_type": None if family == "vit" else "SEQ_CLS", "modules_to_save": sorted(HEADS[family])}
    unknown_to_peft = {"vit": ["q_proj", "v_proj"], "deepseek_r1": ["kv_b_proj", "o_proj"]}
    of |= {"target_modules": unknown_to_peft[family]} if family in unknown_to_peft else {}
    learner = shaken(peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=10, **of)), 1)
    learner.base_model.model.config.name_or_path = str(base)
    learner.save_pretrained(peft_s)
    learner.double()  # T5's logits in float32 are up to 1.3e-6 from these, by rounding that depends on the processor
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    for again in (txtrain.load_pretrained(peft_s), txtrain.load_pretrained(base, adapter=peft_s)):
        assert apart(again.double()(**batch).logits, learner(**batch).logits) < ALLOWED


WHOLE = [
    ("llama2", False, ("embed_tokens", "head")), ("llama2", True, ("embedding.token",)), ("gpt2", True, ("wte", "wpe")), ("gpt2", False, ("c_attn", "ln_f")),
    ("deepseek_r1", False, ("mlp.experts", "mlp.gate")), ("bert_mlm", False, ("cls", "word_embeddings")), ("vit", False, ("vit.embeddings",)),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", some(WHOLE, WHOLE[:2]))
def test_embeddings_heads_experts_and_norms_are_saved_whole(tmp_path, case):
    family, tied, modules = case
    p = next(p for p in (test_deepseek.pair(s) if family == "deepseek_r1" else pairs.pair(family, s) for s in range(20)) if p.ours.config.tie_word_embeddings == tied)
    config = LoraConfig(type="lora", r=3, target_modules="all-linear", modules_to_save=modules)
    model = copy.deepcopy(p.ours)
    transform(model, [Lora(config, model.config)])
    wanted = logits_of(shaken(model, 3)(**inputs(p)))
    without = {"mlp.experts": ".experts", "c_attn": "q_proj"}.get(modules[0], "none")  # what is saved whole has no adapter
    assert not any(without in name for name in adapter_of(model))
    write(model, config, tmp_path, base=str(p.folder))
    assert apart(logits_of(peft.PeftModel.from_pretrained(copy.deepcopy(p.theirs), tmp_path).eval()(**inputs(p))), wanted) < ALLOWED
    for again in (txtrain.load_pretrained(tmp_path), txtrain.load_pretrained(p.folder, adapter=tmp_path)):
        assert apart(logits_of(again(**inputs(p))), wanted) < ALLOWED


def test_what_peft_cannot_hold_or_has_trained_apart_is_refused(tmp_path):
    p = next(p for p in (pairs.pair("llama2", s) for s in range(20)) if p.ours.config.tie_word_embeddings)
    for ensure in (False, True):
        knobs = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensure}
        theirs = shaken(peft.get_peft_model(copy.deepcopy(p.theirs), peft.LoraConfig(r=4, **knobs)), 1)
        theirs.save_pretrained(tmp_path / str(ensure))
    again = txtrain.load_pretrained(p.folder, adapter=tmp_path / "True")
    assert apart(logits_of(again(**inputs(p))), logits_of(theirs(**inputs(p)))) < ALLOWED
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        txtrain.load_pretrained(p.folder, adapter=tmp_path / "False")
    for modules, told in ((("lm_head",), "it is the embedding's"), (("q_prj",), r"Did you mean q_proj\?")):
        with pytest.raises(ConfigError, match=told):
            transform(copy.deepcopy(p.ours), [Lora(LoraConfig(type="lora", modules_to_save=modules), p.ours.config)])
    for family, modules, told in (("gpt2", ("q_proj",), "lacks blocks.0.attention.k_proj"), ("t5", ("shared",), "would part it")):
        _, model, config = adapted(family, 0, target_modules=ALL, modules_to_save=modules)
        with pytest.raises(ConfigError, match=told):
            write(model, config, tmp_path / family)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "`use_dora` must be unset"),
        ({"bias": "all"}, "`bias` must be unset"),
        ({"peft_type": "IA3"}, "`peft_type` must be LORA"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
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
