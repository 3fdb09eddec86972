"""`txtrain export` at the command line."""

import dataclasses as dc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import txtrain
from tests.models import ids, seeded, shake, tiny
from txtrain.cli.main import main
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.hf.gguf import write_gguf
from txtrain.hf.load import load_pretrained
from txtrain.hf.registry import class_of, leaving
from txtrain.hf.save import Saved
from txtrain.model import options
from txtrain.model.position.config import NTKScaling

GRAFT = tiny(norm_position="sandwich", position=options.AlibiConfig(type="alibi"), ffn=options.MoEConfig(type="moe"))


@pytest.fixture
def graft(tmp_path: Path) -> Path:
    """A folder of a model that no class of transformers equals."""
    txtrain.save_pretrained(shake(seeded(GRAFT)).eval(), tmp_path / "graft")
    return tmp_path / "graft"


@torch.no_grad()
def test_a_graft_comes_back_without_its_modeling_file_being_run(graft: Path) -> None:
    (graft / "modeling_txtrain.py").write_text("raise SystemExit('it was run')")
    model = shake(seeded(GRAFT)).eval()
    assert torch.equal(load_pretrained(graft)(ids()).logits, model(ids()).logits)


def test_files_of_the_tokenizer_and_of_generation_travel_byte_for_byte(graft: Path) -> None:
    given = {
        "tokenizer_config.json": b'{"chat_template": "{{ messages }}" }', "chat_template.jinja": b"{{ messages }}\r\n",
        "generation_config.json": b'{"temperature": 0.6,\n\n "eos_token_id": null}',
    }
    for name, content in given.items():
        (graft / name).write_bytes(content)
    assert main(["export", f"checkpoint={graft}", f"out={graft.parent / 'out'}"]) == 0
    txtrain.save_pretrained(load_pretrained(graft), graft.parent / "again")
    for folder in ("out", "again"):
        assert {name: (graft.parent / folder / name).read_bytes() for name in given} == given


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (b"step,loss\n1200,nan\n", "| step | 1,200 |\n| loss | nan |"),
        (b"step,loss\n2,1e-05\n", "| loss | 1.0e-05 |"),
        (b"step,loss,accuracy\n2,3,1e-3\n", "| loss | 3 |\n| accuracy | 0.0010 |"),
        (b"step,loss\n2,-inf\n3,", "| loss | -inf |"),
        (b"step,loss\n2,\xff\n", None),
        (b"step,loss\n2\n", None),
    ],
)
def test_figures_of_any_form_are_told_and_damage_is_met_before_the_weights_are_written(graft, rows, told, capsys) -> None:
    (graft.parent / "run.json").write_text("{}")
    (graft.parent / "metrics.csv").write_bytes(rows)
    out = graft.parent / "out"
    assert main(["export", f"checkpoint={graft}", f"out={out}"]) == (0 if told else 2)
    if told:
        assert told in (out / "README.md").read_text()
    else:
        assert not out.exists()
        assert "metrics.csv, line 2, must be" in capsys.readouterr().err


def test_all_end_tokens_of_generation_config_are_the_models(graft: Path) -> None:
    (graft / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load_pretrained(graft).config.eos_token_id == (3, 5)


def test_names_of_classes_and_their_kind_travel(tmp_path: Path) -> None:
    head = options.ClassHeadConfig(type="class", n_classes=3, kind="multi", label_names=("a", "b", "c"))
    txtrain.save_pretrained(seeded(dc.replace(GRAFT, head=head)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["problem_type"] == "multi_label_classification"
    config["id2label"] = {"0": "x", "1": "y", "2": "z"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path).config.head == dc.replace(head, label_names=("x", "y", "z"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "x"}}))
    with pytest.raises(ConfigError, match="id2label"):
        load_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("pooler", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_without_a_head_leaves_as_auto_model(
    pooler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = dc.replace(
        GRAFT, topology="encoder", head=options.NoHeadConfig(type="none", pooler=pooler),
        position=options.RoPEConfig(type="rope", scaling=options.DynamicScaling(rope_type="dynamic", factor=2.0)), max_seq_len=8,
    )
    model = shake(seeded(config)).eval()
    txtrain.save_pretrained(model, tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for mask in (torch.ones_like(ids()), (torch.arange(16) < torch.tensor([[11], [16]])).long()):
        want = model(ids(), attention_mask=mask).last_hidden_state[mask.bool()]
        for other in (theirs, load_pretrained(tmp_path / "out")):
            found = other(ids(), attention_mask=mask).last_hidden_state[mask.bool()]
            assert ((found - want).abs().max() / want.abs().max()).item() < 1e-5
    theirs.save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").config == config


def test_padding_behind_a_target_is_not_balanced_there_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ffn = options.MoEConfig(type="moe_softmax", gate="softmax", bias_update_rate=0.0, aux_weight=1.0)
    ours = shake(seeded(dc.replace(GRAFT, topology="encoder_decoder", ffn=ffn, decoder_start_token_id=0)))
    txtrain.save_pretrained(ours, tmp_path / "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    labels = ids().masked_fill(torch.arange(16) >= 5, -100)
    found = []
    for model in (ours, theirs):
        model(input_ids=ids(), labels=labels).loss.backward()
        found.append([p.grad for name, p in model.named_parameters() if "router" in name])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_config_that_contradicts_itself_is_refused(graft: Path) -> None:
    config = json.loads((graft / "config.json").read_text())
    for change, match in (
        ({"hidden_size": 64}, "`hidden_size` must be 32, as txtrain.model says, but is 64"),
        ({"txtrain": {}}, "`txtrain.model` must be given"),
        ({"txtrain": {"model": {**config["txtrain"]["model"], "norm_position": "os.system"}}}, "norm_position"),
    ):
        (graft / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=match):
            load_pretrained(graft)


@torch.no_grad()
def test_dtype_and_shards(graft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = graft.parent / "out"
    assert main(["export", f"checkpoint={graft}", f"out={out}", "dtype=bfloat16", "max_shard_size=0.05MB"]) == 0
    said = capsys.readouterr().out
    assert "TxtrainForCausalLM, in modeling_txtrain.py: load it with trust_remote_code=True" in said
    assert "no class of transformers equals the model; nearest: " in said
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert max(s.stat().st_size for s in shards) < 60_000
    rounded = shake(seeded(GRAFT)).eval().to(torch.bfloat16).float()
    assert torch.equal(load_pretrained(out)(ids()).logits, rounded(ids()).logits)
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "FILL IN: the licence" in card


@torch.no_grad()
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_dtype_that_makes_a_weight_infinite_is_refused(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = seeded(IN_GGUF["llama2"])
    model.blocks[0].ffn.down_proj.weight[0, 0] = -70_000.0
    txtrain.save_pretrained(model, tmp_path / "given")
    given = ["export", f"checkpoint={tmp_path / 'given'}", f"out={tmp_path / 'out'}", f"format={form}"]
    assert main([*given, "dtype=float16"]) == 2
    assert "layers.0.mlp.down_proj.weight has 70000, which becomes infinite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*given, "dtype=float16", "allow_nonfinite=true"]) == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("max_shard_size=lots", "`max_shard_size` must be a size such as 5GB"),
        ("push_to=me", "`push_to` must be a name on the hub such as me/my-model"),
        ("dtype=int8", "`dtype` must be one of float32, bfloat16, float16"),
        ("format=gguf", "`format` must be hf for TxtrainForCausalLM"),
        ("format=gguf max_shard_size=1MB", "`max_shard_size` must be 5GB with format=gguf, which is one file"),
        ("weights=ema", "`weights` must be model for a Hugging Face folder"),
        ("merge_adapter=false dtype=bfloat16", "`dtype` must be float32 with merge_adapter=false, but is bfloat16"),
        ("merge_adapter=false format=gguf", "`format` must be hf with merge_adapter=false, but is gguf"),
        ("merge_adapter=false", "has no adapter"),
    ],
)
def test_mistakes_leave_nothing(given: str, says: str, graft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = graft.parent / "out"
    assert main(["export", f"checkpoint={graft}", f"out={out}", *given.split()]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


@torch.no_grad()
def test_the_default_transformer_leaves_as_marian_with_its_dimensions_renumbered(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = txtrain.compose(["model=transformer", "model.dim=32", "model.vocab_size=61"]).model
    with pytest.raises(ConfigError, match=r"position.layout is interleaved, not halves"):
        class_of(config)
    model = shake(seeded(config)).eval()
    assert leaving(config).missing is None
    txtrain.save_pretrained(model, tmp_path)
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    given = {"input_ids": ids(), "decoder_input_ids": ids(seed=1)}
    want = model(**given).logits
    for found in (theirs(**given).logits, load_pretrained(tmp_path)(**given).logits):
        assert ((found - want).abs().max() / want.abs().max()).item() < 1e-5


HEADS = options.AttentionConfig(type="gqa", n_kv_heads=2)
IN_GGUF = {  # gpt2 and gemma2: with the values that transformers' reader knows alone
    "llama2": tiny(tie_word_embeddings=False, attention=HEADS),
    "gpt2": txtrain.compose(["model=gpt2", "model.dim=32", "model.n_layers=2", "model.vocab_size=61", "model.max_seq_len=1024"]).model,
    "gemma2": txtrain.compose([
        "model=gemma2", "model.dim=32", "model.n_layers=2", "model.vocab_size=61", "model.attention.window=[6,null]",
        "model.attention.head_dim=256", "model.max_seq_len=48",
    ]).model,
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama2", "float16"), ("gpt2", "float32"), ("gemma2", "float32"), *(
        pytest.param(family, name, marks=pytest.mark.slow) for family in IN_GGUF for name in ("float32", "bfloat16")
    )],
)
def test_gguf_is_read_back_by_transformers(family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    config = IN_GGUF[family]
    txtrain.save_pretrained(shake(seeded(config)).eval(), "given")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # llama.cpp adds none
    bpe.train_from_iterator(["the reader counts tokens"], tokenizers.trainers.BpeTrainer(vocab_size=61, special_tokens=["<end>"]))
    bpe.save("given/tokenizer.json")
    Path("given/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}')
    assert main(["export", "checkpoint=given", "out=out", "format=gguf", f"dtype={dtype}"]) == 0
    assert sorted(os.listdir("out")) == ["README.md", f"{family}.gguf"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out", gguf_file=f"{family}.gguf", dtype=torch.float32).eval()
    ours = shake(seeded(config)).eval()
    for p in ours.parameters():
        p.copy_(p.to(getattr(torch, dtype)) if p.dim() > 1 else p)
    want = ours(ids()).logits
    assert ((theirs(ids()).logits - want).abs().max() / want.abs().max()).item() < 1e-5


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("pre", "whole_words", "normalizer", "name"),
    [
        (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), False, None, "gpt-2"),
        (split_by(LLAMA3), True, None, "llama-bpe"),
        (split_by(LLAMA3), False, None, None),
        (split_by(LLAMA3.replace("{1,3}", "{1,2}")), True, None, None),
        (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True), False, None, None),
        (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), False, tokenizers.normalizers.NFC(), None),
    ],
)
def test_gguf_holds_a_tokenizer_only_if_llama_cpp_splits_texts_alike(
    pre: Any, whole_words: bool, normalizer: Any, name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    txtrain.save_pretrained(shake(seeded(IN_GGUF["llama2"])).eval(), tmp_path / "given")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=whole_words))
    bpe.pre_tokenizer, bpe.normalizer = pre, normalizer
    bpe.train_from_iterator(["the reader counts tokens"], tokenizers.trainers.BpeTrainer(vocab_size=61, special_tokens=["<end>"]))
    bpe.save(str(tmp_path / "given/tokenizer.json"))
    (tmp_path / "given/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}')
    assert main(["export", f"checkpoint={tmp_path / 'given'}", f"out={tmp_path / 'out'}", "format=gguf"]) == 0
    field = gguf.GGUFReader(tmp_path / "out/llama2.gguf").get_field("tokenizer.ggml.pre")
    assert (None if field is None else field.contents()) == name
    assert ("without a tokenizer: llama.cpp knows none" in capsys.readouterr().out) == (name is None)


def test_gguf_has_the_base_that_ntk_scaling_makes_and_looks_added_tokens_up_before_merges(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    scaled = options.RoPEConfig(type="rope", scaling=NTKScaling(rope_type="ntk", factor=4.0))
    model = seeded(dc.replace(IN_GGUF["llama2"], position=scaled, eos_token_id=()))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["the reader counts tokens"], tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["<end>"]))
    bpe.add_tokens([" four spaces"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}')
    saved = Saved.of(model)
    assert write_gguf(saved, tmp_path / "a.gguf", load_tokenizer(tmp_path))
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["llama.rope.freq_base"].contents() == pytest.approx(saved.config["rope_theta"])
    assert saved.config["rope_theta"] > model.config.position.theta * 4
    types = dict(zip(fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents(), strict=True))
    assert (types["<end>"], types[" four spaces"], types["t"]) == (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL)
    assert "tokenizer.ggml.eos_token_id" not in fields


def test_gguf_refuses_values_that_the_format_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    capped = dc.replace(IN_GGUF["gemma2"], logit_softcap=20.0)
    even = dc.replace(IN_GGUF["gemma2"], attention=dc.replace(IN_GGUF["gemma2"].attention, window=(6, 6)))
    for name, config, says in (("a", capped, "final_logit_softcapping 20.0"), ("b", even, "layer_types")):
        txtrain.save_pretrained(seeded(config), tmp_path / name)
        assert main(["export", f"checkpoint={tmp_path / name}", f"out={tmp_path / 'out'}", "format=gguf"]) == 2
        assert f"`format` must be hf with {says}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_push_goes_to_the_hub(graft: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a stand-in of the client's methods."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls: list[object] = []

    class Stand:
        def whoami(self) -> dict[str, str]:
            return {"name": "me"}

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            calls.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Stand)
    out = graft.parent / "out"
    assert main(["export", f"checkpoint={graft}", f"out={out}", "push_to=me/graft"]) == 0
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_txtrain.py"]
    assert calls == [("me/graft", True, True), ("me/graft", names)]
    assert "https://hub/me/graft" in capsys.readouterr().out


def test_a_push_without_a_token_is_refused_before_anything_is_written(
    graft: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    class Nobody:
        why: Exception = LocalTokenNotFoundError("no token")

        def whoami(self) -> None:
            raise self.why

    monkeypatch.setattr(huggingface_hub, "HfApi", Nobody)
    out = graft.parent / "out"
    given = ["export", f"checkpoint={graft}", f"out={out}", "push_to=me/graft"]
    assert main(given) == 2
    assert "`push_to=me/graft` needs a token" in capsys.readouterr().err
    Nobody.why = HfHubHTTPError.__mro__[1]("no route")  # of a connection: no OSError in some versions of the client
    assert main(given) == 2
    assert "`push_to=me/graft`: the hub does not answer for this token: no route" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_every_command_of_the_docs(tmp_path: Path) -> None:
    """On a run with averaged weights; its model card says what is known of it."""
    from tests import training
    from txtrain.training.run import train

    run = tmp_path / "run"
    train(training.tiny(tmp_path, "ema.decay=0.9", f"run_dir={run}"))
    docs = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    commands = [line.split() for line in docs.splitlines() if line.startswith("txtrain export ")]
    assert len(commands) == 3
    for i, (_, *command) in enumerate(commands):
        out = tmp_path / f"out{i}"
        assert main([word.replace("=RUN", f"={run}").replace("=DIR", f"={out}") for word in command]) == 0
        card = (out / "README.md").read_text(encoding="utf-8")
        for said in ("## Data", "fingerprint", "## Figures", "val_loss", "## How", "step_00000012", "version: torch", "FILL IN"):
            assert said in card, said
