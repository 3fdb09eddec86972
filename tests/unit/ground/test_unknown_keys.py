"""The words of other tools."""

import pytest

from txtrain.cli.verbs import VERBS, root_of
from txtrain.config.schema import Train
from txtrain.config.schema_of_trained import Generate
from txtrain.ground import unknown_keys
from txtrain.ground.convert import key_paths


def test_every_key_that_is_told_exists():
    known = {*key_paths(Train), *key_paths(Generate)}
    assert not [key for key in unknown_keys._THEIRS if key not in known]


def test_no_word_of_others_is_a_key_of_ours_at_the_same_place():
    for verb in VERBS:  # `generate` has words that others mean for training
        known = set(key_paths(root_of(verb)))
        of_verb = [(key, word) for key, words in unknown_keys._THEIRS.items() if key in known for word in words.split()]
        assert not [(key, word) for key, word in of_verb if word == key.rpartition(".")[2] or word in known], verb


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("hidden_size", 64, "`hidden_size=64`: the configuration has no key hidden_size. Did you mean model.dim?"),
        ("model.num_hidden_layers", 2, "Did you mean model.n_layers?"),
        ("trainer.lr", 1, "Did you mean optimizer.lr?"),
        ("model.atention", {"window": None}, "`model.atention.window=null`: model has no key atention. Did you mean model.attention.window?"),
        ("data.nothing_like_it", True, "`data.nothing_like_it=true`: data has no key nothing_like_it. It has: a, attention."),
    ],
)
def test_the_guess(path, value, says):
    assert says in unknown_keys.unknown_key(path, value, ["type", "a", "attention"], key_paths(Train), None)
