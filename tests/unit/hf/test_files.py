import dataclasses as dc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.models import seeded, shake, tiny
from tests.unit.hf.folders import llama, tensors
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained
from txtrain.hf.trainer import build_model

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_written_safetensors_reads_and_what_it_writes_is_read(dtype, tmp_path):
    model = shake(seeded(tiny(tie_word_embeddings=False))).to(dtype)
    save_pretrained(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], model.final_norm.weight)
    again = load_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert next(load_pretrained(tmp_path).parameters()).dtype is torch.float32


def test_a_loaded_model_evaluates_and_owns_its_memory(tmp_path):
    model = load_pretrained(llama(tmp_path))
    before = {name: p.clone() for name, p in model.named_parameters()}
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_shards_of_an_earlier_save_do_not_stay(tmp_path):
    model = shake(seeded(tiny()))
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]


def test_tokenizer_files_come_along_and_go_along(tmp_path):
    llama(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"\x00\x01")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a" / "tokenizer.py").write_text("code")
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "b" / "tokenizer.py").exists()
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "c", tokenizer=load_tokenizer("bytes"))
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert not (tmp_path / "c" / "tokenizer.model").exists()


def test_all_end_tokens_of_generation_config_count_and_the_file_goes_along(tmp_path):
    given = b'{"eos_token_id":[5, 7],"temperature": 0.6}'
    llama(tmp_path / "a", eos_token_id=5)
    (tmp_path / "a" / "generation_config.json").write_bytes(given)
    model = load_pretrained(tmp_path / "a")
    assert model.config.eos_token_id == (5, 7)
    save_pretrained(model, tmp_path / "b")
    assert (tmp_path / "b" / "generation_config.json").read_bytes() == given
    model.config = dc.replace(model.config, eos_token_id=6)
    save_pretrained(model, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "generation_config.json").read_text()) == {"eos_token_id": 6, "temperature": 0.6}
    assert load_pretrained(tmp_path / "c").config.eos_token_id == 6


@pytest.mark.parametrize(("given", "said"), [("[]", "JSON object"), ('{"bad_words_ids": [1]}', "`bad_words_ids` must be a list"), ('{"eos_token_id": "</s>"}', "`eos_token_id` must be"), ('{"eos_token_id": [1, -1]}', "must be")])
def test_a_generation_config_that_is_none_is_refused_by_its_name(given, said, tmp_path):
    (llama(tmp_path) / "generation_config.json").write_text(given)
    with pytest.raises(ConfigError, match=said) as e:
        load_pretrained(tmp_path)
    assert str(tmp_path / "generation_config.json") in str(e.value)


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path):
    with torch.device("meta"):
        model = build_model(tiny())
    with pytest.raises(ConfigError, match="without memory"):
        save_pretrained(model, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="below a file"):
        save_pretrained(seeded(tiny()), tmp_path / "file" / "a")
    assert not (tmp_path / "a").exists()


MEASURE = """
import resource, sys, torch
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained
load_pretrained(sys.argv[1])  # what imports and first calls take
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_pretrained(sys.argv[2])
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_pretrained(model, sys.argv[3])
print(loaded - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded, sum(p.numel() * 4 for p in model.parameters()) // 1024)
"""


def test_loading_and_saving_take_no_more_than_the_model_and_its_largest_tensor(tmp_path):
    """In a process of its own, by its peak resident size."""
    llama(tmp_path / "small")
    llama(tmp_path / "large", vocab_size=2000, dim=1024, n_layers=3)
    largest = max(t.numel() * 4 for t in tensors(tmp_path / "large").values()) // 1024
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("small", "large", "copy"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loading, saving, size = map(int, done.stdout.split())
    assert size > 5 * largest, "the model is too small for the test to tell"
    assert loading <= size + largest + 4096, f"loading took {loading} KiB for a model of {size} with a largest tensor of {largest}"
    assert saving <= largest + 4096, f"saving took {saving} KiB, the largest tensor {largest}"


def test_importing_the_tables_does_not_import_torch():
    command = "import sys, txtrain.hf.registry; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
