"""Each scaling of rotary positions, in both spellings of config.json, in every family that rotates; in float64, where only formulas differ.

The older spelling (transformers 4.57: `rope_theta`, `rope_scaling`) and the newer one (5: `rope_parameters`) are read by transformers itself too.
"""

import json

import pytest
import torch
import transformers

from tests.models import shake
from tests.parity.pairs import Pair, by_their_names, difference, our_cached, their_cached, tokens
from tests.parity.test_deepseek import as_in_a_folder, eager
from tests.parity.test_forward import labels_of
from txtrain.config.compose import compose_job
from txtrain.config.loader import make_loader
from txtrain.config.overrides import parse
from txtrain.config.schema import Train
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained
from txtrain.hf.trainer import build_model

ALLOWED = 1e-6
LENGTH = 16  # max_position_embeddings; what is read has 24
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LENGTH, "pad_token_id": 0, "eos_token_id": 2,
}
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 12, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 7,
}
FAMILIES = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 9}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma2": (transformers.Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "deepseek_r1": (transformers.DeepseekV3Config, DEEPSEEK),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn_attention_factor": {**YARN, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn_mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_truncate": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 2.0, "beta_slow": 0.1, "truncate": False},
    "yarn_upside_down": {**YARN, "truncate": False},  # the ramp would end before it begins
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 3.0},
}
LATER = {"yarn_truncate", "yarn_upside_down"}  # 4.57 reads no `truncate`
QUICK = {("deepseek_r1", "yarn_mscale"), ("gemma", "dynamic"), ("mistral", "yarn")}
CASES = [
    pytest.param(
        family, scaling, spelling,
        marks=() if (family == "llama2" and (spelling == "older") == j % 2) or (family, scaling) in QUICK else pytest.mark.slow,
    )
    for i, family in enumerate(FAMILIES)
    for j, scaling in enumerate(SCALINGS)
    for spelling in (("older", "newer") if family == "llama2" else (("older", "newer")[(i + j) % 2],))
    if not (scaling in LATER and transformers.__version__ < "5")
]


def spelt(folder, scaling, spelling):
    """config.json as that version of transformers wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        config.pop(name, None)
    if spelling == "older":
        config |= {"rope_theta": 500.0, "rope_scaling": scaling}
    else:
        config["rope_parameters"] = {**scaling, "rope_theta": 500.0}
    path.write_text(json.dumps(config))
    return folder


def pair_in(folder, family, scaling, spelling):
    cls, more = FAMILIES[family]
    torch.manual_seed(3)
    kind = transformers.AutoModelForCausalLM
    model = shake(kind.from_config(cls(**SHAPE, **more)).eval(), 3)
    model.save_pretrained(folder)
    spelt(folder, scaling, spelling)
    theirs = eager(kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)).eval()
    return Pair(theirs, load_pretrained(folder, dtype=torch.float64), folder)


def gradients(model, ids):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(model(input_ids=ids, labels=labels_of(ids)).loss, parameters.values(), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize(("family", "scaling", "spelling"), CASES)
def test_logits_gradients_and_cached_decoding_equal(family, scaling, spelling, tmp_path, record):
    p = pair_in(tmp_path, family, SCALINGS[scaling], spelling)
    ids = tokens(p)
    plain = pair_in(tmp_path / "plain", family, {"rope_type": "default"}, "newer")
    with torch.no_grad():
        assert difference(p.ours(ids).logits, plain.ours(ids).logits) > 1e-4, "the scaling changes nothing: nothing is compared"
        for n_prompt in (1, 11):  # before what dynamic scaling leaves behind, which is state there
            record(family, "rotary scaling, cached", difference(our_cached(p.ours, ids, n_prompt), their_cached(p.theirs, ids, n_prompt)), ALLOWED)
            p.theirs(ids[:, :4])  # back to the unscaled frequencies
        record(family, "rotary scaling, logits", difference(p.ours(ids).logits, p.theirs(ids).logits), ALLOWED)
    theirs, ours = as_in_a_folder(gradients(p.theirs, ids)), by_their_names(p, gradients(p.ours, ids))
    largest = max(g.abs().max() for g in theirs.values())
    for name, gradient in theirs.items():
        record(family, "rotary scaling, gradients", ((gradient - ours[name]).abs().max() / largest).item(), ALLOWED)
    with torch.no_grad():
        save_pretrained(p.ours, tmp_path / "again")
        again = type(p.theirs).from_pretrained(tmp_path / "again", attn_implementation="eager", dtype=torch.float64).eval()
        record(family, "rotary scaling, exported", difference(eager(again)(ids).logits, p.ours(ids).logits), ALLOWED)


@torch.no_grad()
def test_static_ntk_leaves_as_a_larger_base(tmp_path, record):
    """transformers knows no such type: another rope_theta gives the same angles."""
    overrides = ["model=llama2", "model.position.scaling.rope_type=ntk", "model.position.scaling.factor=4", "model.n_layers=1", "model.dim=32"]
    config = compose_job("train", Train, parse(overrides), make_loader())[0].config.model
    model = shake(build_model(config)).double().eval()
    save_pretrained(model, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["rope_theta"] == pytest.approx(10_000.0 * 4 ** (8 / 6))
    assert said["rope_scaling"] is None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
    ids = torch.arange(24)[None]
    record("llama2", "rotary scaling, exported", difference(model(ids).logits, theirs(ids).logits), ALLOWED)
