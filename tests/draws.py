"""Hypothesis strategies over the whole product: models of every topology, head and embedding, legal or not."""

import dataclasses as dc
from typing import Any

from hypothesis import strategies as st

from tests.models import attentions, ffns, norms, positions, tiny
from txtrain.model import options as axes
from txtrain.model.config import ModelConfig
from txtrain.registry import TABLE

TOPOLOGIES = ("decoder", "encoder", "encoder_decoder")
LEGAL_HEADS = {"decoder": ("lm", "class"), "encoder": ("lm", "mlm", "class"), "encoder_decoder": ("lm", "class")}


def heads(names: tuple[str, ...] = ("lm", "mlm", "class"), poolings: tuple[str, ...] = ("first", "last", "mean")) -> st.SearchStrategy[Any]:
    options = {
        "lm": st.builds(axes.LMHeadConfig, type=st.just("lm"), bias=st.booleans(), scale=st.booleans()),
        "mlm": st.builds(axes.MLMHeadConfig, type=st.just("mlm"), next_sentence=st.booleans()),
        "class": st.builds(axes.ClassHeadConfig, type=st.just("class"), n_classes=st.just(10), pooling=st.sampled_from(poolings)),
    }
    return st.one_of(*(options[name] for name in names))


tokens = st.builds(axes.TokenEmbeddingConfig, type=st.just("token"), scale=st.booleans(), n_types=st.sampled_from([0, 2]), norm=st.booleans())
patches = st.builds(
    axes.PatchEmbeddingConfig,
    type=st.just("patch"),
    image_size=st.just(8),
    patch_size=st.sampled_from([2, 4]),
    n_channels=st.just(1),
    class_token=st.booleans(),
    norm=st.booleans(),
)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """A tiny model of a combination that `txtrain.config.compatibility` allows; single knobs may still be out of their range."""
    topology = draw(st.sampled_from(TOPOLOGIES))
    two_stacks = topology == "encoder_decoder"
    head = draw(heads(LEGAL_HEADS[topology], ("first", "last", "mean") if topology == "encoder" else ("last", "mean")))
    embedding = draw(patches if head.type == "class" and not two_stacks and draw(st.booleans()) else tokens)
    changes = {
        "topology": topology,
        "head": head,
        "embedding": embedding,
        "n_layers": draw(st.sampled_from([1, 2])),
        "n_encoder_layers": draw(st.sampled_from([None, 1])) if two_stacks else None,
        "share_embeddings": draw(st.booleans()) if two_stacks else True,
        "mtp_depth": draw(st.sampled_from([0, 0, 1, 2])) if topology == "decoder" and head.type == "lm" else 0,
        "attention": draw(attentions),
        "ffn": draw(ffns),
        "position": draw(positions),
        "norm": draw(norms),
        "norm_position": draw(st.sampled_from(sorted(TABLE["norm_position"]))),
        "final_norm": draw(st.sampled_from([None, True, False])),
        "tie_word_embeddings": draw(st.booleans()),
        "logit_softcap": draw(st.sampled_from([None, 5.0])) if head.type != "class" else None,
    }
    if embedding.type == "patch":
        changes |= {"vocab_size": 0, "max_seq_len": embedding.n_positions(), "tie_word_embeddings": False}
    return tiny(**changes)


legal_models = models().filter(lambda config: not list(config.check()))

ONE_CHANGE = {
    "topology": st.sampled_from(TOPOLOGIES),
    "head": heads(),
    "embedding": st.one_of(tokens, patches),
    "n_encoder_layers": st.sampled_from([None, 1]),
    "share_embeddings": st.booleans(),
    "mtp_depth": st.sampled_from([0, 1]),
    "logit_softcap": st.sampled_from([None, 5.0]),
    "tie_word_embeddings": st.booleans(),
    "vocab_size": st.sampled_from([0, 61]),
}


@st.composite
def nearly_legal_models(draw: st.DrawFn) -> ModelConfig:
    """One choice away from a legal one, or legal."""
    name = draw(st.sampled_from(sorted(ONE_CHANGE)))
    return dc.replace(draw(legal_models), **{name: draw(ONE_CHANGE[name])})
