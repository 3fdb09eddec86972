"""Values that are taken as typed."""

from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from txtrain.config.literals import ROOTS, quote
from txtrain.config.overrides import expand, parse
from txtrain.errors import ConfigError
from txtrain.ground.convert import is_marked, key_paths, marked

NASTY = r"""
Once upon a time, there|It's|"quoted"|a=b|f(x)|trailing | leading|123|1e-3|null|true||ünï→🙂|昔々、ある所に
${nope}|\${x}|\\${x}|\|a\|\'|\\'|${|$|${a}\|x\\|a'\|{a: b}|[1,2]|#c|a: b|????|~|-|*
"""
VALUES = [*(value for line in NASTY.strip("\n").split("\n") for value in line.split("|")), "line\nbreak", "tab\t"]


@pytest.mark.parametrize("value", VALUES)
def test_prompt_arrives_unchanged(value, job):
    where = value or "."  # no path is empty: `checkpoint=$RUN` with an unset variable
    config = job(f"prompt={value}", f"checkpoint={where}", verb="generate").config
    assert (config.prompt, config.checkpoint) == (value, where)


def test_an_empty_checkpoint_is_no_path(job):
    with pytest.raises(ConfigError, match="`checkpoint` must be a path, but is '' instead"):
        job("prompt=x", "checkpoint=", verb="generate")


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("\\'\"${}()[],=: a1é\n%@#&*?!~+-."), max_size=12) | st.text(max_size=12))
def test_any_value_comes_back_from_hydras_grammar_and_omegaconfs_interpolation(value):
    (override,) = parse([f"prompt={quote(value)}"])
    config = OmegaConf.create({"prompt": override.value()})
    assert value in (OmegaConf.to_container(config, resolve=True)["prompt"], "???")  # ???: OmegaConf's own word for a missing value


@pytest.mark.parametrize("key", ["run_dir", "name", "data.path", "data.tokenizer", "data.cache_dir"])
def test_keys_of_train_arrive_unchanged(key, job):
    value = "runs/x/step=6, it's (7) ${a}"
    assert reduce(getattr, key.split("."), job(f"{key}={value}").config) == value


def test_every_literal_key_is_one_of_the_contract():
    contract = ["prompt", "checkpoint", "init_from", "resume", "fork", "run_dir", "out", "name", "data.path", "data.tokenizer"]
    beside = ["data.cache_dir", "data.chat_template", "lm_eval.include_path", "objective.teacher", "objective.reference"]  # paths, as the others are
    texts = ["data.delimiter", "data.prompt", "messages", "objective.pattern", "push_to", "system"]
    found = {root: [key for key in key_paths(root) if is_marked(root, key, "literal")] for root in ROOTS}
    assert set().union(*found.values()) == {*contract, *beside, *texts}
    assert all(set(keys) == set(marked(root, "literal")) for root, keys in found.items())


@pytest.mark.parametrize("value", ["a.txt,c.txt", "[a.txt,c.txt]", "a b,c=d.txt"])
def test_several_paths_are_one_value_until_they_are_read(value, job):
    config = job("data=text", f"data.path={value}").config
    assert config.data.path == value


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("a.txt,c.txt", "a.txt,c.txt"),
        ("[a.txt,c.txt]", ("a.txt", "c.txt")),
        ("{a:a.txt,c:c.txt}", {"a": "a.txt", "c": "c.txt"}),
        ("null", None),
    ],
)
def test_paths_for_validation_are_hydras_but_for_commas(typed, value, job):
    assert job("data=text", "data.path=x", f"data.val_path={typed}").config.data.val_path == value


def test_in_a_sweep_every_comma_separates(job):
    jobs = expand(["prompt=It's a=b,123, ${x}", "checkpoint=r"], True)
    lines = [str(o.input_line) for overrides in jobs for o in overrides]
    assert [line for line in lines if "prompt" in line] == ["prompt='It\\'s a=b'", "prompt='123'", "prompt=' \\${x}'"]


@pytest.mark.parametrize(
    ("typed", "value"),
    [("größe", "größe"), ("Übung 1 (alt)", None), ("'a,ü'", "a,ü"), ("/dä ta/a b", "/dä ta/a b")],
)
def test_other_keys_take_letters_beyond_ascii_unquoted(typed, value, job):
    if value is None:  # parentheses are Hydra's
        with pytest.raises(ConfigError, match=r"Quote it: 'data.text_column=\"Übung 1 \(alt\)\"'"):
            job("data=text", "data.path=x", f"data.text_column={typed}")
    else:
        assert job("data=text", "data.path=x", f"data.text_column={typed}").config.data.text_column == value


def test_so_do_lists_and_sweeps(job):
    assert job("data=text", "data.path=x", "sample.prompts=[昔々 ある所に,b,'c, ü']").config.sample.prompts == ("昔々 ある所に", "b", "c, ü")
    jobs = expand(["data.text_column=größe,b"], True)
    assert [o.value() for overrides in jobs for o in overrides] == ["größe", "b"]
