"""Any part of any tensor can be read by itself, from whatever layout the file has it in."""

import random

import pytest
import torch

from tests.models import seeded, shake, tiny
from txtrain import compose
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.load import open_weights
from txtrain.checkpoint.reader import Reader
from txtrain.checkpoint.state import RunState
from txtrain.errors import ConfigError
from txtrain.hf.load import open_folder
from txtrain.hf.pieces import Held
from txtrain.hf.save import save_pretrained

SMALL = ("model.n_layers=2", "model.dim=32", "model.n_heads=4")
TEXT = ("model.vocab_size=61", "model.max_seq_len=32", "data=text", "data.path=text.txt", "data.tokenizer=bytes")
MODELS = {  # what their files have otherwise than we do
    "transposed and joined": ("model=gpt2", *TEXT),
    "experts apart, heads rearranged": ("model=deepseek_r1", "model.mtp_depth=0", "model.n_layers=4", *TEXT),
    "a dimension more, and a convolution": ("model=vit",),
}


def drawn(n, rng):
    """Indices of a dimension, ascending, perhaps with gaps or none."""
    first, last = sorted(rng.choices(range(n + 1), k=2))
    index = torch.arange(first, last)
    return (index[::2] if rng.random() < 0.3 else index).clone()


def assert_any_part_is_read(wanted, found):
    rng = random.Random(0)
    for _ in range(3):
        cuts = {name: tuple(drawn(n, rng) for n in tensor.shape) for name, tensor in wanted.items()}
        held = {name: Held(torch.full([len(i) for i in cut], torch.nan), cut) for name, cut in cuts.items()}
        for piece in found:
            held[piece.name].take(piece)
        for name, tensor in wanted.items():
            assert torch.equal(held[name].tensor, tensor[torch.meshgrid(*cuts[name], indexing="ij")]), name


@pytest.mark.parametrize("kind", MODELS)
def test_of_a_folder(kind, tmp_path):
    config = compose([*MODELS[kind], *(o for o in SMALL if o.split("=")[0] not in " ".join(MODELS[kind]))]).model
    model = shake(seeded(config))
    save_pretrained(model, tmp_path)
    assert_any_part_is_read(model.state_dict(), open_folder(tmp_path).pieces)


def test_of_a_checkpoint(tmp_path):
    model = shake(seeded(tiny()))
    model.register_buffer("counts", torch.arange(3))
    path = checkpoint.path_of(tmp_path, 1)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saving.save(path, tensors, RunState(step=1), lambda _: None)
    assert_any_part_is_read(model.state_dict(), Reader(path).pieces("model."))


def test_another_model_is_told_by_name_and_shape_before_a_value_is_read(tmp_path, monkeypatch):
    model = seeded(tiny())
    save_pretrained(model, tmp_path)
    source = open_weights(tmp_path, "init_from")
    source.check(model)
    monkeypatch.setattr(Held, "take", lambda *_: pytest.fail("reads"))
    with pytest.raises(ConfigError, match=r"of another model: blocks\.0\.ffn\.down_proj\.weight is \(32, \d+\) there, \(32, 40\)"):
        source.check(seeded(tiny(ffn=type(model.config.ffn)(type="swiglu", hidden_dim=40))))
    with pytest.raises(ConfigError, match=r"blocks\.2\.attention\S+ is absent there, \(32,"):
        source.check(seeded(tiny(n_layers=3)))
