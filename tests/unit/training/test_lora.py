"""`adapter=lora`: the base stays as it was, checkpoints hold the adapter alone and name their base, and resume is exact."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import txtrain
from tests.models import ids, seeded, shake
from tests.models import tiny as tiny_model
from tests.training import rows, tiny, weights, write_labels
from txtrain.checkpoint.format import MARKER, LoadError, locate, marker_of
from txtrain.checkpoint.load import load, open_weights
from txtrain.cli.export import run_export
from txtrain.cli.main import main
from txtrain.config.composed import Composed
from txtrain.errors import ConfigError
from txtrain.hf.digest import BASE, sha256_of
from txtrain.hf.lora_config import ADAPTER_CONFIG, Lora, LoraConfig
from txtrain.model import options
from txtrain.model.adapter import factor_of
from txtrain.model.ffn import balancing
from txtrain.model.lora import adapter_of, kept, merged
from txtrain.model.transform import transform
from txtrain.training.module import LitModule
from txtrain.training.run import train

LORA = ("adapter=lora", "adapter.r=4", "adapter.lora_alpha=16", "adapter.lora_dropout=0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def base(folder):
    return train(tiny(folder, f"run_dir={folder / 'base'}", "trainer.max_steps=2")).run_dir


def run(folder, base, name, *overrides):
    more = ("trainer.max_steps=8", "scheduler=constant", "ema.decay=0.9", f"init_from={base}", f"run_dir={folder / name}")
    return train(tiny(folder, *LORA, *more, *overrides)).run_dir


@pytest.fixture(scope="module")
def whole(folder, base):
    return run(folder, base, "whole")


def test_a_checkpoint_holds_the_adapter_alone_and_names_its_base(base, whole):
    names = {name.partition(".")[2] for name in weights(whole) if name.startswith("model.")}
    assert names == {f"blocks.{i}.attention.{m}_proj.lora_{k}.weight" for i in (0, 1) for m in "qv" for k in "AB"}
    assert all(factor_of(name) or factor_of(name.rpartition(".")[0]) for name in {n.partition(".")[2] for n in weights(whole)})
    said = json.loads((locate(whole) / BASE).read_text())
    assert said == {"path": str(locate(base).resolve()), "sha256": sha256_of(locate(base))}
    facts = json.loads((whole / "run.json").read_text())
    assert facts["base"] == said
    assert facts["trained_parameters"] == 2 * 2 * (32 + 32) * 4


def test_the_plan_counts_what_the_run_has(folder, base, whole):
    facts, plan = json.loads((whole / "run.json").read_text()), txtrain.plan(tiny(folder, *LORA, f"init_from={base}"))
    assert (plan.n_params, plan.n_trained_params) == (facts["parameters"], facts["trained_parameters"])
    assert plan.trained_by_part == {"adapter": plan.n_trained_params} == {"adapter": plan.params_by_part["adapter"]}
    assert plan.flops_per_sample < txtrain.plan(tiny(folder)).flops_per_sample


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder, base, whole, capsys):
    parts = run(folder, base, "parts", "trainer.max_steps=5")
    assert "adapter lora, r=4, lora_alpha=16.0, lora_dropout=0.1; of " in " ".join(capsys.readouterr().out.split())
    assert run(folder, base, "parts") == parts
    assert weights(parts) == weights(whole)
    assert rows(parts) == rows(whole)


def test_the_base_may_move_but_not_change(folder, base, whole):
    moved, here = folder / "moved", folder / "of moved"
    shutil.copytree(base, folder / "copy")
    shutil.copytree(run(folder, folder / "copy", "of moved", "trainer.max_steps=3"), folder / "kept")
    (folder / "copy").rename(moved)
    with pytest.raises(ConfigError, match=r"its base .*copy.* is not there"):
        txtrain.load_pretrained(here)
    with pytest.raises(ConfigError, match=r"`init_from` must be .*copy"):
        run(folder, moved, "of moved", "trainer.max_steps=4")
    run(folder, moved, "of moved", "trainer.max_steps=4", "resume_allow=[init_from]")
    shard = next(locate(moved).glob("*.safetensors"))
    other = train(tiny(folder, f"run_dir={folder / 'other'}", "trainer.max_steps=2", "seed=3")).run_dir
    shutil.rmtree(locate(moved))
    shutil.copytree(locate(other), moved / "checkpoints" / "step_00000002")
    assert shard.exists()
    before = weights(here)
    with pytest.raises(LoadError, match="the adapter was trained on the weights with the hash"):
        run(folder, moved, "of moved", "trainer.max_steps=5", "resume_allow=[init_from]")
    assert weights(here) == before


@pytest.mark.parametrize("path", ["/dev/zero", "/", "http://127.0.0.1:1/x", "~root", "${oc.env:HOME}", "a" * 5000, "a\0b", "\x1b[31m", "", 3, None])
def test_a_base_that_a_stranger_names_is_a_path_and_nothing_more(folder, base, whole, path, tmp_path):
    """`generate` refuses it; a resume takes the base that init_from names, if its hash fits."""
    there = Path(shutil.copytree(whole, tmp_path / "run"))
    for file in there.glob(f"checkpoints/*/{BASE}"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"path": path}))
        (file.parent / MARKER).write_text(json.dumps(marker_of(file.parent)))
    with pytest.raises((ConfigError, LoadError), match=r"is not there|the adapter was trained on|must be text") as e:
        txtrain.load_pretrained(there)
    assert len(str(e.value)) < 600
    with pytest.raises((ConfigError, LoadError)) if path in ("/dev/zero", "/", 3, None) else contextlib.nullcontext():
        train(tiny(folder, *LORA, f"init_from={base}", "trainer.max_steps=8", "scheduler=constant", "ema.decay=0.9", f"run_dir={there}"))


def test_bases_that_name_each_other_are_refused(whole, tmp_path):
    """An adapter of PEFT need not say its base's hash: a circle has none that would have to hold itself."""
    there = Path(shutil.copytree(whole, tmp_path / "peft/run"))
    said = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(there)}
    (there.parent / ADAPTER_CONFIG).write_text(json.dumps(said))
    shutil.copy(next(locate(whole).glob("*.safetensors")), there.parent / "adapter_model.safetensors")
    for file in there.glob(f"checkpoints/*/{BASE}"):
        file.write_text(json.dumps({"path": str(there.parent), "sha256": sha256_of(there.parent)}))
        (file.parent / MARKER).write_text(json.dumps(marker_of(file.parent)))
    with pytest.raises(ConfigError, match="must have at most 16 adapters, one above another"):
        txtrain.load_pretrained(there)


@torch.no_grad()
def test_merged_equals_unmerged_and_the_base_is_untouched(folder, base, whole):
    plain, batch = txtrain.load_pretrained(base), ids(2, 16, vocab=257)
    for kind in ("model", "ema"):
        beside = txtrain.load_pretrained(base, adapter=whole, weights=kind)
        for name, p in plain.named_parameters():
            assert dict(beside.named_parameters())[name].equal(p), name
        unmerged = beside(batch).logits
        assert (unmerged - plain(batch).logits).abs().max() > 1e-2
        assert (load(whole, weights=kind).model(batch).logits - unmerged).abs().max() < 1e-6 * unmerged.abs().max() * 2
    source = open_weights(whole)
    assert source.names == frozenset(plain.state_dict())


def exported(folder, name, checkpoint, **more):
    config = txtrain.compose([f"checkpoint={checkpoint}", f"out={folder / name}", *(f"{k}={v}" for k, v in more.items())], verb="export")
    run_export(Composed(config, {}, []))
    return folder / name


@torch.no_grad()
def test_exports(folder, base, whole, capsys):
    batch = ids(2, 16, vocab=257)
    unmerged = txtrain.load_pretrained(base, adapter=whole)(batch).logits
    allowed = 2e-6 * unmerged.abs().max()
    assert (txtrain.load_pretrained(exported(folder, "merged", whole))(batch).logits - unmerged).abs().max() < allowed
    alone = exported(folder, "alone", whole, merge_adapter="false")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in alone.iterdir()}
    assert "peft needs its base as a folder of Hugging Face" in capsys.readouterr().out
    assert (txtrain.load_pretrained(base, adapter=alone)(batch).logits - unmerged).abs().max() < allowed
    assert (txtrain.load_pretrained(alone)(batch).logits - unmerged).abs().max() < allowed, "its base is where it was"
    said = json.loads((alone / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (4, 16, ["q_proj", "v_proj"])
    assert load(alone).tokenizer is not None
    with pytest.raises(ConfigError, match="has no adapter"):
        exported(folder, "none", base, merge_adapter="false")
    with pytest.warns(UserWarning, match="was trained on other weights"):
        txtrain.load_pretrained(folder / "merged", adapter=alone)


def test_a_fork_goes_on_from_the_adapter_and_a_run_from_the_merged_weights(folder, base, whole):
    forked = run(folder, base, "forked", f"fork={whole}", "trainer.max_steps=9", "adapter.lora_dropout=0")
    assert weights(forked).keys() == weights(whole).keys()
    peft = exported(folder, "peft", whole, merge_adapter="false")
    for name, where in (("run", whole), ("peft", peft)):
        still = ("trainer.max_steps=1", "optimizer.lr=0", "optimizer.weight_decay=0")
        started = train(tiny(folder, f"init_from={where}", f"run_dir={folder / f'from {name}'}", *still)).run_dir
        wanted = txtrain.load_pretrained(where).state_dict()
        found = txtrain.load_pretrained(started).state_dict()
        assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["adapter=lora"], "`init_from` must be given with adapter=lora"),
        (["adapter=lora", "adapter.target_modules=[q_prj]"], "q_prj.*Did you mean q_proj"),
        (["adapter=lora", "adapter.target_modules=[norm]"], "`adapter.target_modules\\[0\\]` must name linear layers or experts"),
        (["adapter=lora", "adapter.target_modules=[]"], "must name at least one module"),
        (["adapter=lora", "adapter.target_modules='('"], "a list or a regular expression"),
        (["adapter=lora", "adapter.r=0"], "`adapter.r` must be at least 1"),
        (["adapter.r=4"], "adapter=lora"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(folder, base, overrides, told):
    given = [*overrides, f"run_dir={folder / 'mistake'}", *([f"init_from={base}"] if len(overrides) > 1 else [])]
    with pytest.raises(ConfigError, match=told):
        train(tiny(folder, *given))
    assert not (folder / "mistake").exists()


def test_a_model_of_ones_own_and_a_whole_run_are_refused(folder, base):
    config = tiny(folder, *LORA, f"init_from={base}", f"run_dir={folder / 'own'}")
    with pytest.raises(ConfigError, match="`model` must be None with adapter=lora"):
        train(config, txtrain.build_model(config.model))
    with pytest.raises(ConfigError, match="holds a whole model"):
        run(folder, base, "own", f"fork={base}")
    assert not (folder / "own").exists()


@torch.no_grad()
def test_a_new_head_is_trained_and_saved_whole_beside_the_adapter(folder, base, capsys):
    labels = ("data=labels", f"data.path={write_labels(folder / 'labels.csv', n_classes=3)}", "data.seq_len=32")
    judge = run(folder, base, "judge", *labels)
    assert "whole head: trained and saved beside the adapter" in " ".join(capsys.readouterr().out.split())
    names = {name.partition(".")[2] for name in weights(judge) if name.startswith("model.")}
    assert {name for name in names if not factor_of(name)} == {"head.classifier.weight"}
    facts, plan = json.loads((judge / "run.json").read_text()), txtrain.plan(txtrain.compose([f"init_from={base}", *LORA, *labels], verb="plan"))
    assert facts["trained_parameters"] == plan.n_trained_params == sum(plan.trained_by_part.values())
    assert plan.trained_by_part["head"] == 3 * 32
    parts = run(folder, base, "judge in parts", *labels, "trainer.max_steps=5")
    assert run(folder, base, "judge in parts", *labels) == parts
    assert (weights(parts), rows(parts)) == (weights(judge), rows(judge))

    batch = {"input_ids": ids(2, 16, vocab=257)}
    for kind in ("model", "ema"):
        beside = txtrain.load_pretrained(base, adapter=judge, weights=kind)
        logits = beside(**batch).logits
        assert logits.shape == (2, 3)
        assert beside.head.classifier.weight.ne(0).any()
        assert (load(judge, weights=kind).model(**batch).logits - logits).abs().max() < 2e-6 * logits.abs().max()
    wanted = txtrain.load_pretrained(judge)(**batch).logits
    for merge in ("true", "false"):
        out = exported(folder, f"judge, merged: {merge}", judge, merge_adapter=merge)
        again = load(out).model
        assert again.config.head.label_names == ("0", "1", "2")
        assert (again(**batch).logits - wanted).abs().max() < 2e-6 * wanted.abs().max()
        assert main(["evaluate", f"checkpoint={out}", *labels, "n_bootstrap=0"]) == 0
    assert main(["predict", f"checkpoint={judge}", *labels, f"out={folder / 'labels.jsonl'}"]) == 0
    assert {json.loads(line)["label"] for line in (folder / "labels.jsonl").read_text().splitlines()} <= {"0", "1", "2"}
    for more, told in (
        (["adapter.target_modules=[classifier]"], "'classifier' is trained whole"),
        (["adapter.modules_to_save=[hed]"], r"`adapter.modules_to_save\[0\]` must name a module of the model.*Did you mean head"),
        (["adapter.modules_to_save=['']"], "`adapter.modules_to_save` must be names"),
    ):
        with pytest.raises(ConfigError, match=told):
            run(folder, base, "mistake", *labels, *more)
    assert not (folder / "mistake").exists()


def test_new_tokens_are_refused_unless_their_table_is_saved_whole(folder, base):
    larger = ("model.vocab_size=260", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match=r"lacks embedding.token.weight.*'adapter.modules_to_save=\[embedding.token,head\]'"):
        run(folder, base, "larger", *larger)
    made = run(folder, base, "larger", *larger, "adapter.modules_to_save=[embed_tokens,lm_head]")
    assert txtrain.load_pretrained(made).embedding.token.weight.shape == (260, 32)
    assert run(folder, base, "larger", *larger, "adapter.modules_to_save=[embed_tokens,lm_head]", "trainer.max_steps=2") == made


@torch.no_grad()
def test_the_balance_of_a_base_stays_and_that_of_a_router_saved_whole_moves():
    sizes = ("model.n_layers=2", "model.dim=32", "model.n_heads=2", "model.vocab_size=61", "data=text", "data.path=x", "data.tokenizer=bytes")
    config = txtrain.compose(["model=deepseek_r1", *sizes], verb="plan").model
    for modules, moves in (((), False), (("router",), True), (("mlp.gate",), True), (("experts",), False)):
        model = adapted(config, target_modules=("gate_proj", "o_proj"), modules_to_save=modules)
        layer, mixture = next((f"blocks.{i}", block.ffn) for i, block in enumerate(model.blocks) if hasattr(block.ffn, "balance_bias"))
        mixture.bias_update_rate, before = 0.1, mixture.balance_bias.clone()
        balancing.update(model, {layer: torch.arange(1.0, 1 + len(before))})
        assert before.equal(mixture.balance_bias) != moves, modules
        assert (f"{layer}.ffn.balance_bias" in kept(model)) == moves, modules


def moe(**changes):
    return tiny_model(attention=options.MLAConfig(type="mla"), ffn=options.MoEConfig(type="moe", n_experts=4, top_k=2, n_shared=1), **changes)


def adapted(config, seed=0, **knobs):
    model = shake(seeded(config))
    transform(model, [Lora(LoraConfig(type="lora", **knobs), config)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def test_experts_and_cached_latent_attention_equal_merged_matrices():
    """Decoding absorbs k_proj and v_proj into the queries: their adapters must come along."""
    config = moe()
    model, plain, batch = adapted(config, target_modules="all-linear"), shake(seeded(config)), ids(2, 12)
    logits = model(batch).logits
    plain.load_state_dict(merged(model))
    assert (plain.eval()(batch).logits - logits).abs().max() < 1e-5 * logits.abs().max()
    out = model(batch[:, :9], use_cache=True)
    found = [out.logits]
    for t in range(9, 12):
        out = model(batch[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    assert (torch.cat(found, 1) - logits).abs().max() < 1e-5 * logits.abs().max()
    assert not any("router" in name for name in adapter_of(model))


def test_only_the_adapter_learns_and_experts_have_no_dropout():
    model = adapted(moe(), target_modules=("gate_proj", "o_proj"))
    model(input_ids=ids(2, 8), labels=ids(2, 8)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {n for n, _ in model.named_parameters() if factor_of(n)}
    with pytest.raises(ConfigError, match=r"`adapter.lora_dropout` must be 0 with an adapter of experts"):
        adapted(moe(), target_modules=("gate_proj",), lora_dropout=0.1)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(["k_proj", "o_proj", "up_proj", "blocks.1.ffn.down_proj"]), max_size=3))
def test_a_factor_starts_from_the_seed_and_its_name_whatever_else_is_adapted(folder, base, others):
    def started(*targets):
        config = tiny(folder, "adapter=lora", f"adapter.target_modules=[{','.join(targets)}]", f"init_from={base}")
        module = LitModule(config, parallel=None, read={})
        module.configure_model()
        return dict(module.model.named_parameters())

    alone, beside = started("q_proj"), started("q_proj", *sorted(others))
    for name in (n for n in alone if factor_of(n)):
        assert alone[name].equal(beside[name]), name
        bound = alone[name].shape[1] ** -0.5
        assert alone[name].eq(0).all() if "lora_B" in name else 0.5 * bound < alone[name].abs().max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trainer.activation_checkpointing=full", "trainer.activation_checkpointing=selective", "trainer.compile=true", "data.micro_batch_size=2"])
def test_checkpointing_compilation_and_accumulation_change_nothing(folder, base, how):
    plain = run(folder, base, "plain", "adapter.lora_dropout=0", "adapter.target_modules=all-linear")
    other = run(folder, base, how.replace("=", " "), how, "adapter.lora_dropout=0", "adapter.target_modules=all-linear")
    for a, b in zip(rows(plain), rows(other), strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=2e-6)
