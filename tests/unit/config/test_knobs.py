"""What is said once on a field (`registry.knob`), of every config class that a key of any verb may lie in."""

import copy
import dataclasses as dc
import math
from types import NoneType
from typing import get_args, get_origin

import pytest

from tests.models import tiny
from txtrain.cli.verbs import VERBS, root_of
from txtrain.config.schema import Train
from txtrain.config.slurm_launcher import SlurmConfig
from txtrain.errors import ConfigError
from txtrain.ground.convert import build, hints, key_of, marked
from txtrain.model.config import ModelConfig
from txtrain.optim.config import EMAConfig
from txtrain.registry import TABLE, config, knob, out_of_range
from txtrain.run_config import TrainerConfig


def _configs():
    found, todo = [], [*map(root_of, VERBS), SlurmConfig, *(o.config for options in TABLE.values() for o in options.values())]
    while todo:
        if (cls := todo.pop(0)) not in found:
            found.append(cls)
            todo += [m for hint in hints(cls).values() for m in (hint, *get_args(hint)) if dc.is_dataclass(m)]
    return found


CONFIGS = _configs()
BOUNDED = [pytest.param(c, f, id=f"{c.__name__}.{f.name}") for c in CONFIGS for f in dc.fields(c) if "bounds" in f.metadata]


def _leaves(hint):
    return [leaf for arg in get_args(hint) for leaf in _leaves(arg)] if get_args(hint) else [hint]


@pytest.mark.parametrize(("cls", "field"), BOUNDED)
def test_a_number_may_be_what_its_bounds_allow_and_nothing_else(cls, field):
    hint, path = hints(cls)[field.name], f"a.{key_of(field)}"
    bounds, whole = field.metadata["bounds"], float not in _leaves(hint)
    none = {f.name: None for f in dc.fields(cls)}

    def said(value):
        made = object.__new__(cls)
        for name, other in (none | {field.name: value}).items():
            object.__setattr__(made, name, other)
        return list(out_of_range(made, "a"))

    assert said(None) == []
    for name, bound in bounds.items():
        out = -1 if name in ("at_least", "above") else 1
        beyond, within = (bound + way if whole else math.nextafter(bound, way * math.inf) for way in (out, -out))
        assert said(within) == []
        assert bool(said(bound)) == (name in ("above", "below"))
        for value in (beyond, bound) if said(bound) else (beyond,):
            (problem,) = said(value)
            assert problem.startswith(f"`{path}` must be ")
            assert problem.endswith(f", but is {value} instead.")
            assert all(f"{words.replace('_', ' ')} {limit}" in problem for words, limit in bounds.items())
            assert ("null" in problem) == (NoneType in get_args(hint))
        if any(get_origin(member) is tuple for member in (hint, *get_args(hint))):
            (problem,) = said((within, beyond))
            assert problem.startswith(f"`{path}[1]` must be ")


def test_there_are_bounds_on_numbers_of_every_kind_of_group():
    assert len(BOUNDED) > 100
    assert {TrainerConfig, EMAConfig, ModelConfig, SlurmConfig, root_of("generate")} <= {p.values[0] for p in BOUNDED}


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_field_that_is_given_another_default_keeps_what_is_said_of_it(cls):
    for base in cls.__mro__[1:]:
        for name, before in getattr(base, "__dataclass_fields__", {}).items():
            now = cls.__dataclass_fields__[name]
            assert set(before.metadata) <= set(now.metadata), f"{cls.__name__}.{name}"
            assert before.metadata.get("bounds") == now.metadata.get("bounds"), f"{cls.__name__}.{name}"


def made(decorator):
    @decorator
    class Keys:
        a: int
        b: float | None = knob(None, above=0)
        c: tuple[int, ...] = dc.field(default_factory=tuple)

    return Keys


def test_a_config_is_what_dataclass_makes_frozen_and_by_name():
    ours, theirs = made(config), made(dc.dataclass(frozen=True, kw_only=True))
    for cls in (ours, theirs):
        one = cls(a=1, b=2.0)
        assert repr(one) == "made.<locals>.Keys(a=1, b=2.0, c=())"
        assert dc.asdict(one) == {"a": 1, "b": 2.0, "c": ()}
        assert one == copy.deepcopy(one) == dc.replace(cls(a=1), b=2.0) != cls(a=1)
        assert len({one, cls(a=1, b=2.0), cls(a=1)}) == 2
        for change, *given in ((setattr, "a", 2), (delattr, "a"), (setattr, "new", 2)):
            with pytest.raises(dc.FrozenInstanceError):
                change(one, *given)
        own = dc.dataclass(frozen=True, kw_only=True)(type("Own", (cls,), {"__annotations__": {"d": int}, "d": 3}))
        assert repr(own(a=1)) == "Own(a=1, b=None, c=(), d=3)"
        for wrong, said in (({}, "missing 1 required keyword-only argument: 'a'"), ({"a": 1, "x": 2}, "got an unexpected keyword argument 'x'")):
            with pytest.raises(TypeError, match=rf"Keys\.__init__\(\) {said}$"):
                cls(**wrong)
    assert ours(a=1) != theirs(a=1)


@dc.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float | None = knob(None, above=0, at_most=1)
    sizes: tuple[int | None, ...] | None = knob(None, at_least=1)
    wait_: int | bool = knob(True, at_least=2)


@dc.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    how: str = "x"

    def check(self):
        yield "`how` is never right."


def test_numbers_out_of_bounds_are_told_all_at_once_and_before_what_compares_values():
    with pytest.raises(ConfigError) as e:
        build(Outer, {"inner": {"rate": 2, "sizes": [None, 0, 1], "wait": 1}})
    assert e.value.problems == (
        "`inner.rate` must be above 0 and at most 1, or null, but is 2.0 instead.",
        "`inner.sizes[1]` must be at least 1 or null, but is 0 instead.",
        "`inner.wait` must be at least 2, but is 1 instead.",
    )
    with pytest.raises(ConfigError, match="`how` is never right"):
        build(Outer, {"inner": {"wait": True}})


def test_a_config_made_by_hand_is_held_to_its_bounds():
    config = tiny()
    wrong = dc.replace(config, n_heads=0, dropout=math.nan, norm=dc.replace(config.norm, eps=0.0))
    assert list(wrong.check()) == [
        "`model.n_heads` must be at least 1, but is 0 instead.",
        "`model.dropout` must be at least 0 and below 1, but is nan instead.",
        "`model.norm.eps` must be above 0, but is 0.0 instead.",
    ]
    assert "`devices` must be at least 1 or auto, but is 0 instead." in out_of_range(TrainerConfig(devices=0))


def test_what_a_continued_run_may_have_otherwise():
    groups = {"strategy", "trainer", "logger", "callbacks", "save", "sample", "layer_stats"}
    keys = {"resume", "resume_allow", "run_dir", "verbosity", "profile", "profile_steps", "imports", "allow_nonfinite", "init_allow_missing", "reward.workers", "reward.timeout"}
    data = {f"data.{k}" for k in ("micro_batch_size", "num_workers", "cache_dir", "max_expansion", "max_text_bytes")}
    assert set(marked(Train, "free")) == groups | keys | data
    assert set(marked(Train, "from_run")) == {"data.cache_dir"}


def test_what_of_a_model_is_in_neither_weights_nor_logits():
    of = marked(ModelConfig, "affects")
    dropouts = {key for key, what in of.items() if what == "dropout"}
    assert dropouts == {"dropout", "output_dropout", "attention.dropout", "ffn.dropout", "head.dropout", "head.input_dropout"}
    assert {key: what for key, what in of.items() if what != "dropout"} == {
        **dict.fromkeys(("family", "size", "published", "head.label_names"), "label"),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "ids"),
        "init": "init",
        **dict.fromkeys(("decoder_start_token_id", "embedding.padding_idx"), "training"),
        **dict.fromkeys(("ffn.bias_update_rate", "ffn.aux_weight", "head.kind", "head.lm"), "training"),
    }
