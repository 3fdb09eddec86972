"""What components declare of how ranks share them is what laying a model over ranks and counting its memory do."""

import pytest
import torch

from tests.models import tiny
from txtrain.model import options
from txtrain.model.build import construct
from txtrain.parallel import divisibility
from txtrain.planning.memory.tensor_parallel import narrowed
from txtrain.registry import TABLE, cut_of

N = 2  # ranks
COMPONENTS = {
    "mha": options.AttentionConfig(type="mha", n_kv_heads=4, bias=True, qk_norm=True),
    "gqa": options.AttentionConfig(type="gqa", n_kv_heads=2, bias=True),
    "mqa": options.AttentionConfig(type="mqa", n_kv_heads=1, head_dim=6),
    "mla": options.MLAConfig(type="mla", q_rank=6, bias=True),
    "mlp": options.MLPConfig(type="mlp", bias=True),
    "swiglu": options.GatedConfig(type="swiglu", bias=True),
    "geglu": options.GatedConfig(type="geglu", hidden_dim=10),
    "moe": options.MoEConfig(type="moe", n_experts=3, dense_layers=1),
    "moe_softmax": options.MoEConfig(type="moe_softmax", n_experts=3, dense_layers=1, dense_hidden_dim=6),
}


def expected(shape, how, is_bias):
    """Of a rank's part: fewer rows of a matrix, or of each of a stack of them, or fewer columns."""
    dim = {"rows": -1 if is_bias else -2, "columns": None if is_bias else -1}.get(how)
    return tuple(n // N if dim is not None and i == len(shape) + dim else n for i, n in enumerate(shape))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_with_sizes_divided_has_the_parts_that_it_declares(name, layer):
    component = COMPONENTS[name]
    axis = "ffn" if name in TABLE["ffn"] else "attention"
    model = tiny(**{axis: component})
    with torch.device("meta"):
        whole = construct(axis, component, model, layer)
        small, part = narrowed(model, component, N)
        narrow = dict(construct(axis, part, small, layer).named_parameters())
    met = {key for owner in whole.modules() for key in (*vars(owner), *owner._modules)}
    for key, p in whole.named_parameters():
        *_, last, kind = ("", *key.split("."))
        how = cut_of(axis, component).get(last if kind in ("weight", "bias") else kind)
        met.add(kind)
        if how == "shared_rows":
            how = "whole" if divisibility.shared_heads(model) % N else "rows"
        assert narrow[key].shape == expected(p.shape, how, kind == "bias"), (key, how)
    missing = cut_of(axis, component).keys() - met
    assert not missing or (name.startswith("moe") and layer == 0), f"declared, but not there: {missing}"


def test_every_option_with_a_declaration_is_tried():
    declared = {name for axis in divisibility.SUBLAYERS for name, option in TABLE[axis].items() if option.cut}
    assert declared == set(COMPONENTS)


@pytest.mark.parametrize(
    ("axis", "component"),
    [
        ("embedding", options.TokenEmbeddingConfig(type="token")),
        ("head", options.LMHeadConfig(type="lm", bias=True)),
        ("head", options.MLMHeadConfig(type="mlm")),
        ("position", options.RelativeConfig(type="relative")),
    ],
)
def test_what_lies_by_vocabulary_or_by_heads_has_a_row_a_token_or_a_column_a_head(axis, component):
    model = tiny(**{axis: component, "tie_word_embeddings": False})
    with torch.device("meta"):
        module = construct(axis, component, model)
    for name, how in cut_of(axis, component).items():
        parameter = getattr(module, name)
        shape = getattr(parameter, "weight", parameter).shape
        assert shape[0 if how == "vocabulary" else 1] == (model.vocab_size if how == "vocabulary" else model.n_heads)
