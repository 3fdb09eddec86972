"""Folders that say the same in another way, as published ones do, and folders that say something else."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models import ids, replace, seeded, shake, tiny
from tests.parity.pairs import Pair, difference, inputs, logits_of, pair
from txtrain.errors import ConfigError
from txtrain.hf.load import load_pretrained
from txtrain.hf.save import save_pretrained
from txtrain.model import options
from txtrain.model.generation import generate

only_version_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="version 4 reads one field for both")


def rewritten(p: Pair, folder, change, **fields):
    """Their folder with its tensors changed, and fields of its config."""
    p.theirs.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def drawn(family: str, wanted) -> Pair:
    return next(p for p in (pair(family, seed) for seed in range(50)) if wanted(p.ours.config))


@torch.no_grad()
def test_bert_as_it_was_first_converted_is_read(tmp_path):
    """gamma and beta; and the class of masked words named, where the head of sentences is there too."""
    p = pair("bert", 0)

    def older(weights):
        return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in weights.items()}

    ours = load_pretrained(rewritten(p, tmp_path, older, architectures=["BertForMaskedLM"]))
    assert torch.equal(logits_of(ours(**inputs(p))), logits_of(p.ours(**inputs(p))))


@torch.no_grad()
def test_bert_without_the_head_of_sentences_is_read_whatever_its_architecture_is_called(tmp_path):
    p = pair("bert_mlm", 0)
    pooler = {"bert.pooler.dense.weight": torch.ones(2, 2)}  # left over in some published folders, and not read by the class
    ours = load_pretrained(rewritten(p, tmp_path, lambda weights: weights | pooler, architectures=["BertForPreTraining"]))
    assert ours.config.head.next_sentence is False
    assert torch.equal(ours(**inputs(p)).logits, p.ours(**inputs(p)).logits)


@torch.no_grad()
@pytest.mark.parametrize(("tied", "scaled"), [(True, True), (True, False), (False, True), (False, False)])
@only_version_5
def test_t5_ties_and_scales_independently(tied, scaled, tmp_path):
    p = pair("t5", 0)
    head = options.LMHeadConfig(type="lm", scale=scaled)
    model = shake(seeded(replace(p.ours.config, tie_word_embeddings=tied, head=head))).eval()
    save_pretrained(model, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert difference(model(**inputs(p)).logits, theirs(**inputs(p)).logits) < 1e-5
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(**inputs(p)).logits, model(**inputs(p)).logits)


@torch.no_grad()
@only_version_5
def test_a_head_in_the_files_of_t5_wins_over_the_config(tmp_path):
    p = pair("t5", 0)
    head = torch.randn_like(p.theirs.shared.weight)
    rewritten(p, tmp_path, lambda weights: weights | {"lm_head.weight": head}, tie_word_embeddings=True)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(theirs.lm_head.weight, head)
    assert difference(load_pretrained(tmp_path)(**inputs(p)).logits, theirs(**inputs(p)).logits) < 1e-5


@torch.no_grad()
def test_t5_v1_1_as_version_4_describes_it_is_read(tmp_path):
    """Tied or not, and scaled or not, in one field."""
    p = pair("t5_v1_1", 0)
    rewritten(p, tmp_path, lambda weights: weights, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path).config == p.ours.config


@torch.no_grad()
def test_the_transformer_of_2017_without_a_bias_is_saved_and_read_as_marian(tmp_path):
    config = replace(drawn("transformer", lambda c: c.share_embeddings).ours.config, head=options.LMHeadConfig(type="lm"))
    model = shake(seeded(config)).eval()
    save_pretrained(model, tmp_path)
    p = Pair(transformers.MarianMTModel.from_pretrained(tmp_path).eval(), model, tmp_path)
    assert difference(model(**inputs(p)).logits, p.theirs(**inputs(p)).logits) < 1e-5
    assert load_pretrained(tmp_path).config == config


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("without", ["", "generation_config.json"])
def test_words_that_marian_must_not_write_are_not_written(tmp_path, how, without):
    """Published folders forbid the padding token, whose row of the head was never trained: here it wins."""
    theirs = pair("transformer", 0).theirs
    pad = theirs.config.pad_token_id
    theirs.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / name).read_text()) | {"bad_words_ids": [[pad], [theirs.config.eos_token_id], [4, 5]], "forced_eos_token_id": None}
        (tmp_path / name).write_text(json.dumps(said))
    (tmp_path / without).unlink() if without else None
    weights = load_file(tmp_path / "model.safetensors")
    weights["final_logits_bias"] = torch.zeros(1, theirs.config.vocab_size).index_fill(1, torch.tensor([pad]), 100.0)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, ours = transformers.MarianMTModel.from_pretrained(tmp_path).eval(), load_pretrained(tmp_path)
    assert int(ours(ids(vocab=50), decoder_input_ids=torch.tensor([[pad]] * 2)).logits[0, -1].argmax()) == pad
    assert ours.banned_tokens == (pad,)
    save_pretrained(ours, tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert (again.banned_tokens, again.config.eos_token_id) == (ours.banned_tokens, ours.config.eos_token_id)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == theirs.config.eos_token_id
    given = ids(vocab=50)
    wanted = theirs.generate(given, max_new_tokens=8, do_sample=False, **{"num_beams": 1, "forced_eos_token_id": None, "bad_words_ids": [[pad]], **how})
    found = generate(ours, given, max_new_tokens=8, **how)
    assert found[:, 1:].ne(pad).any()
    assert torch.equal(found, wanted[:, : found.shape[1]])


@torch.no_grad()
def test_one_table_for_both_stacks_beside_a_head_of_its_own_is_read_by_every_version(tmp_path):
    """Version 5 takes three tables where nothing is tied."""
    config = drawn("transformer", lambda c: c.share_embeddings).ours.config
    model = shake(seeded(replace(config, tie_word_embeddings=False))).eval()
    save_pretrained(model, tmp_path)
    p = Pair(transformers.MarianMTModel.from_pretrained(tmp_path).eval(), model, tmp_path)
    assert difference(model(**inputs(p)).logits, p.theirs(**inputs(p)).logits) < 1e-5
    assert torch.equal(load_pretrained(tmp_path)(**inputs(p)).logits, model(**inputs(p)).logits)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "encoder.embed_tokens.weight"),
        ("transformer", "model.decoder.embed_tokens.weight"),
        ("transformer", "lm_head.weight"),
        ("transformer", "model.encoder.embed_positions.weight"),
        ("bert", "cls.predictions.decoder.weight"),
    ],
)
def test_a_copy_or_a_computed_table_that_is_another_is_refused(family, name, tmp_path):
    """Some versions would use it, some would not."""
    p = drawn(family, lambda c: c.tie_word_embeddings and c.share_embeddings)
    other = torch.randn(p.theirs.state_dict()[name].shape)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        load_pretrained(rewritten(p, tmp_path, lambda weights: weights | {name: other}))


@torch.no_grad()
def test_names_of_classes_and_the_scaling_of_images_come_along(tmp_path):
    p = pair("vit", 0)
    (tmp_path / "in").mkdir()
    p.theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    save_pretrained(load_pretrained(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    assert transformers.ViTConfig.from_pretrained(tmp_path / "out").id2label == p.theirs.config.id2label


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"topology": "encoder", "head": options.MLMHeadConfig(type="mlm", next_sentence=False)}, "BertForMaskedLM"),
        ({"topology": "encoder", "head": options.MLMHeadConfig(type="mlm")}, "BertForPreTraining"),
    ],
)
def test_a_graft_that_equals_bert_is_saved_as_bert(changes, architecture, tmp_path):
    """By its structure: the family's name says GPT-2."""
    shape = {
        "family": "gpt2",
        "norm_position": "post",
        "attention": options.AttentionConfig(type="mha", bias=True),
        "ffn": options.MLPConfig(type="mlp", activation="gelu"),
        "position": options.LearnedConfig(type="learned"),
        "norm": options.LayerNormConfig(type="layer"),
        "embedding": options.TokenEmbeddingConfig(type="token", norm=True, n_types=2),
    }
    model = shake(seeded(tiny(**shape, **changes))).eval()
    save_pretrained(model, tmp_path)
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path).eval()
    p = Pair(theirs, model, tmp_path)
    assert difference(logits_of(model(**inputs(p))), logits_of(theirs(**inputs(p)))) < 1e-5
