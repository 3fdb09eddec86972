import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.parity.pairs import DECODERS, EACH_SEED, FAMILIES, difference, inputs, logits_of, pair, tokens
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained

OF_THE_FILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "problem_type")  # the last is written by a loss


def fields(config):
    # 4.57 keeps newer fields, which it does not read, as they are
    skipped = OF_THE_FILE if transformers.__version__ >= "5" else (*OF_THE_FILE, "rope_parameters", "scale_decoder_outputs")
    return {name: value for name, value in config.to_dict().items() if name not in skipped}


@torch.no_grad()
@pytest.mark.parametrize("seed", EACH_SEED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_and_field_comes_back(family, seed, tmp_path, record):
    p = pair(family, seed)
    save_pretrained(p.ours, tmp_path)
    before, after = load_file(p.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() - before.keys() <= {"cls.predictions.decoder.bias"}  # a name of version 5 for what is there under another
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    theirs = type(p.theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert theirs.config.architectures == [type(p.theirs).__name__]
    assert fields(theirs.config) == fields(p.theirs.config)
    record(family, "round trip", difference(logits_of(theirs(**inputs(p))), logits_of(p.theirs(**inputs(p)))), allowed=0.0)
    assert load_pretrained(tmp_path).config == p.ours.config


@torch.no_grad()
@pytest.mark.parametrize("older", [True, False])
def test_both_spellings_of_rotary_positions_are_read(older, tmp_path):
    """A folder as transformers 4 wrote it, and as 5 does."""
    p = pair("llama2", next(s for s in range(50) if pair("llama2", s).ours.config.position.scaling is not None))
    save_pretrained(p.ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters",) if older else ("rope_theta", "rope_scaling"):
        assert config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_pretrained(tmp_path)(tokens(p)).logits, p.ours(tokens(p)).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_read_by_both(family, tmp_path):
    p = pair(family, 0)
    save_pretrained(p.ours, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 1
    theirs = type(p.theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(logits_of(theirs(**inputs(p))), logits_of(p.theirs(**inputs(p))))
    p.theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert torch.equal(logits_of(load_pretrained(tmp_path / "theirs")(**inputs(p))), logits_of(p.ours(**inputs(p))))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_pickled_weights_with_their_copies_and_computed_tables_are_read(family, tmp_path):
    p = pair(family, 1)
    save_pretrained(p.ours, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(p.theirs.state_dict(), tmp_path / "pytorch_model.bin")
    again = load_pretrained(tmp_path)
    assert again.config == p.ours.config
    assert torch.equal(logits_of(again(**inputs(p))), logits_of(p.ours(**inputs(p))))


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_folders_without_a_head_are_read(family, tmp_path):
    p = pair(family, 1)
    save_pretrained(p.ours, tmp_path)
    tied = p.ours.config.tie_word_embeddings
    state = p.theirs.state_dict()
    prefix = p.theirs.base_model_prefix + "."
    # As the first GPT-2 was published: no prefix, and a buffer that is no parameter.
    bare = {name.removeprefix(prefix): t for name, t in state.items() if not (tied and name == "lm_head.weight")}
    if family in ("gpt1", "gpt2"):
        bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    (tmp_path / "model.safetensors").unlink()
    torch.save(bare, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_pretrained(tmp_path)(tokens(p)).logits, p.ours(tokens(p)).logits)


@torch.no_grad()
def test_a_graft_that_equals_llama_is_saved_as_llama(tmp_path):
    """By its structure: the family's name says GPT-2."""
    from tests.models import seeded, shake, tiny

    model = shake(seeded(tiny(family="gpt2", tie_word_embeddings=False))).eval()
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.arange(20)[None] % 61
    assert difference(model(ids).logits, theirs(ids).logits) < 1e-5
