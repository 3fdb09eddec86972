"""The door: plain dict -> frozen dataclass and back."""

import dataclasses as dc
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txtrain.errors import ConfigError
from txtrain.ground.convert import build, key_paths, plain


@dc.dataclass(frozen=True, kw_only=True)
class Inner:
    n: int
    x: float | None = None


@dc.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    word: Literal["alpha", "beta"] = "alpha"
    devices: int | Literal["auto"] = "auto"
    flag: bool | int = False
    window: int | tuple[int | None, ...] | None = None
    path: str | tuple[str, ...] | None = None
    pair: tuple[float, float] = (0.9, 0.95)
    items: list[str] = dc.field(default_factory=list)
    counts: dict[str, int] = dc.field(default_factory=dict)
    free: dict[str, Any] = dc.field(default_factory=dict)

    def check(self):
        if self.inner.n == 13:
            yield "`inner.n` must not be 13."


def refused(**raw: Any) -> str:
    with pytest.raises(ConfigError) as e:
        build(Outer, {"inner": {"n": 1}} | raw)
    return str(e.value)


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        ("inner", {"n": 1, "x": 2}, Inner(n=1, x=2.0)),
        ("inner", {"n": 1, "x": "3e-4"}, Inner(n=1, x=3e-4)),  # YAML 1.1 reads 3e-4 as a string
        ("inner", {"n": 1, "x": None}, Inner(n=1)),
        ("devices", 2, 2),
        ("devices", "auto", "auto"),
        ("flag", True, True),
        ("flag", 3, 3),
        ("window", [4, None], (4, None)),
        ("window", 4, 4),
        ("path", ["a", "b"], ("a", "b")),
        ("path", "a", "a"),
        ("pair", [0, 1], (0.0, 1.0)),
        ("items", ["a"], ["a"]),
        ("counts", {"a": 1}, {"a": 1}),
        ("free", {"a": {"b": [1, None]}}, {"a": {"b": [1, None]}}),
    ],
)
def test_value_is_taken(key, value, made):
    got = getattr(build(Outer, {"inner": {"n": 1}} | {key: value}), key)
    assert got == made
    assert type(got) is type(made)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("inner", {"n": True}, "`inner.n` must be an integer, but is True instead."),
        ("inner", {"n": 1.0}, "`inner.n` must be an integer"),
        ("inner", {"n": 1, "x": "abc"}, "`inner.x` must be a number or null, but is 'abc' instead."),
        ("inner", {"n": 1, "x": float("inf")}, "`inner.x` must be a number or null"),
        ("inner", {"n": 1, "x": 10**400}, "`inner.x` must be a number or null, but is 1000"),
        ("inner", {"n": 1, "x": True}, "`inner.x` must be a number or null"),
        ("inner", {}, "`inner.n` must be given."),
        ("inner", {"n": "???"}, "`inner.n` must be given."),
        ("inner", 3, "`inner` must be a mapping, but is 3 instead."),
        ("inner", {"n": 1, "y": 2}, "`inner.y=2`: inner has no key y. It has: n, x."),
        ("word", "alpah", "must be one of alpha, beta, but is 'alpah' instead. Did you mean alpha?"),
        ("devices", "atuo", "must be an integer or auto, but is 'atuo' instead. Did you mean auto?"),
        ("devices", True, "`devices` must be an integer or auto"),
        ("window", [4, "x"], "`window` must be an integer or a list or null"),
        ("pair", [1], "`pair` must be a list of 2 values"),
        ("pair", [1, "x"], "`pair[1]` must be a number"),
        ("counts", {"a": "x"}, "`counts.a` must be an integer"),
        ("counts", [1], "`counts` must be a mapping"),
        ("wrod", 1, "Did you mean word?"),
    ],
)
def test_value_is_refused(key, value, says):
    assert says in refused(**{key: value})


def test_all_problems_are_collected_and_checks_run_only_on_what_is_sound():
    assert len(refused(word="x", devices="y", pair=3).splitlines()) == 3
    assert refused(inner={"n": 13}) == "`inner.n` must not be 13."
    assert "13" not in refused(inner={"n": 13}, word="x")


@given(
    st.builds(
        Outer,
        inner=st.builds(Inner, n=st.integers(0, 12), x=st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        window=st.none() | st.integers() | st.lists(st.none() | st.integers(), max_size=3).map(tuple),
        counts=st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    )
)
def test_plain_is_the_inverse_of_build(config):
    import json

    import yaml

    assert build(Outer, plain(config)) == config
    assert build(Outer, json.loads(json.dumps(plain(config)))) == config
    assert build(Outer, yaml.safe_load(yaml.safe_dump(plain(config)))) == config


def test_key_paths_are_those_of_every_option():
    from txtrain.config.schema import Train

    paths = key_paths(Train)
    for path in ("model.position.scaling.beta_fast", "model.position.n_buckets", "data.text_column", "optimizer.betas", "model.init.std"):
        assert path in paths, path


def test_a_type_that_only_type_checkers_see_is_told():
    cls = dc.make_dataclass("Mine", [("x", "Nowhere")], frozen=True)
    with pytest.raises(ConfigError, match=r"Mine`: the types of its fields cannot be resolved: name 'Nowhere'"):
        build(cls, {"x": 1})
