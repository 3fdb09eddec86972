"""Closed forms of the user's own options: counted as built, or named by `plan`."""

import contextlib
import dataclasses as dc
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import txtrain
from tests.models import ids, seeded, tiny
from txtrain.config.schema import Train
from txtrain.model import options as axes
from txtrain.model import stack
from txtrain.model.position.encodings import Position
from txtrain.objectives.causal_lm import CausalLM
from txtrain.registry import TABLE

T = 12


@contextlib.contextmanager
def registered():
    """What is registered within is forgotten."""
    from hydra.core.config_store import ConfigStore

    base()  # at its first use Hydra registers what must stay
    table = {axis: dict(options) for axis, options in TABLE.items()}
    with mock.patch.object(ConfigStore.instance(), "store"):  # nothing here is chosen on the command line
        try:
            yield
        finally:
            TABLE.clear()
            TABLE.update(table)


def matrices(n: int, dim: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(dim, dim, bias=i % 2 == 0) for i in range(n))


def through(layers, x):
    for layer in layers:
        x = layer(x)
    return x


class OwnFFN(nn.Module):
    def __init__(self, dim: int, layer: int, norm: Any, n: int = 1):
        super().__init__()
        self.layers, self.norm = matrices(n + layer, dim), norm(dim)  # each layer of the model another number

    def forward(self, x):
        return through(self.layers, self.norm(x))


class OwnAttention(nn.Module):
    dropout = 0.0

    def __init__(self, dim: int, n: int = 1):
        super().__init__()
        self.layers = matrices(n, dim)

    def forward(self, x, context):
        n = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return through(self.layers, x.cumsum(1) / n)


class OwnNorm(nn.Module):
    def __init__(self, dim: int, n_layers: int, n: int = 1):
        super().__init__()
        self.n_layers = n_layers
        for i in range(n):
            self.register_parameter(f"weight_{i}", nn.Parameter(torch.empty(dim)))

    def reset_parameters(self):
        for weight in self.parameters():
            nn.init.ones_(weight)

    def forward(self, x):
        for weight in self.parameters():
            x = x * weight
        return nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class OwnPosition(Position):
    def __init__(self, dim: int, n: int = 1):
        super().__init__()
        self.tables = matrices(n, dim)

    def add(self, x, position_ids, *_):
        ramp_BTD = position_ids[..., None].expand(*position_ids.shape, x.shape[-1]).to(x.dtype) * 0.01
        return x + through(self.tables, ramp_BTD)


class OwnNormPosition(nn.Module):
    def __init__(self, dim: int, norm: Any, n: int = 1):
        super().__init__()
        self.norms = nn.ModuleList(norm(dim) for _ in range(n))

    def forward(self, x, f):
        return x + 0.5 * f(through(self.norms, x))


MODULES = {
    "ffn": OwnFFN,
    "attention": OwnAttention,
    "norm": OwnNorm,
    "position": OwnPosition,
    "norm_position": OwnNormPosition,
}
# Configs that an own one may derive from. The last of each is of the package: its counts are another module's.
PARENTS = {
    "ffn": (axes.Component, axes.FFNBase, axes.MLPConfig),
    "attention": (axes.Component, axes.AttentionBase, axes.AttentionConfig),
    "norm": (axes.Component, axes.NormBase, axes.RMSNormConfig),
    "position": (axes.Component, axes.PositionBase, axes.LearnedConfig),
    "norm_position": (axes.Component, axes.NormPositionConfig, axes.SandwichConfig),
}


def own(axis: str, parent: type | None, n: int, stated: bool) -> Any:
    """The config of an option of one's own on an axis of the model, of which each module has n pieces."""
    module = type("Own", (MODULES[axis],), {"__init__": MODULES[axis].__init__})
    if parent is not None:
        forms = STATED.get(axis, {}) if stated else {}
        arguments = {"arguments": lambda self, model, layer=0: {"n": self.n}}
        namespace = {"__annotations__": {"n": int}, "n": n, "__module__": __name__, **arguments, **forms}
        module.Config = dc.dataclass(frozen=True, kw_only=True)(type("Config", (parent,), namespace))
    txtrain.component(axis, "own")(module)
    config = TABLE[axis]["own"].config
    if axis == "norm_position":
        return config(type="own")
    return config(type="own", n=n)


def linear_flops(self, model, *_):
    return 2.0 * model.dim**2 * self.n


STATED = {
    "ffn": {"flops": lambda self, model, seq_len, layer=0: 2.0 * model.dim**2 * (self.n + layer)},
    "attention": {
        "projection_flops": lambda self, model, layer=0: (linear_flops(self, model), 0.0),
        "score_flops": lambda self, model, layer=0: 0.0,
        "cache_values": lambda self, model, layer=0: model.dim,
    },
}


@functools.cache
def base() -> Train:
    run = ["trainer.accelerator=cpu", "trainer.max_steps=3", "scheduler.warmup_steps=0"]
    return txtrain.compose(["model=llama2", "data=text", "data.path=x", *run])


OBJECTIVES = {"decoder": "causal_lm", "encoder": "masked_lm", "encoder_decoder": "span_corruption"}
choices = st.dictionaries(
    st.sampled_from(sorted(MODULES)),
    st.tuples(st.integers(0, 3), st.sampled_from([None, 0, 1, 2]), st.booleans()),
    min_size=1,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    choices,
    st.sampled_from(sorted(OBJECTIVES)),
    st.sampled_from(["pre", "sandwich"]),
    st.sampled_from([0, 1]),
)
def test_an_own_part_is_counted_as_it_is_built_or_named(chosen, topology, norm_position, mtp_depth):
    with registered():
        changes = {"attention": axes.AttentionConfig(type="mha", qk_norm=True), "norm_position": norm_position}
        for axis, (n, parent, stated) in chosen.items():
            config = own(axis, None if parent is None else PARENTS[axis][parent], n, stated)
            changes[axis] = "own" if axis == "norm_position" else config
        head = axes.MLMHeadConfig(type="mlm") if topology == "encoder" else axes.LMHeadConfig(type="lm")
        mtp = mtp_depth if topology == "decoder" else 0
        model_config = tiny(**changes, topology=topology, head=head, mtp_depth=mtp)
        objective = TABLE["objective"][OBJECTIVES[topology]].config(type=OBJECTIVES[topology])
        figures = txtrain.plan(dc.replace(base(), model=model_config, objective=objective))
        model = seeded(model_config)
        assert figures.n_params == sum(p.numel() for p in model.parameters())
        of_position = sum(p.numel() for name, p in model.named_parameters() if "position." in name)
        assert figures.params_by_part.get("position", 0) == of_position
        assert all(f"{axis}=own does not say what it computes" in figures.memory_missing for axis in chosen)
        target = {"decoder_input_ids": ids(1, T)} if topology == "encoder_decoder" else {}
        with mock.patch.object(stack, "choose_kernel", return_value="plain"), FlopCounterMode(display=False) as counter:
            model(ids(1, T), **target)
        closed, missing = model_config.forward_flops(1, T), figures.flops_missing or ""
        assert counter.get_total_flops() == closed or "=own" in missing
        for axis, (_, parent, stated) in chosen.items():
            is_stated = stated and parent is not None and axis in STATED
            assert (f"{axis}=own" in missing) != is_stated
        if "attention" in chosen and topology != "encoder":
            stated = chosen["attention"][2] and chosen["attention"][1] is not None
            assert (figures.cache_missing is None) == stated


class OwnOptimizer(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)


class OwnObjective(CausalLM):
    def __init__(self, weight: float = 2.0):
        self.weights = {"loss": weight}


class OwnSchedule:
    def __init__(self, every: int = 2):
        self.every = every

    def __call__(self, step):
        return 1.0


class OwnText:
    def documents(self, split):
        yield "a"


class OwnSamples:
    def samples(self, split):
        return []


OTHERS = {
    "optimizer": (OwnOptimizer, "optimizer=own does not say what it keeps"),
    "objective": (OwnObjective, "objective=own is your own"),
    "data": (OwnSamples, "data=own is your own"),
    "scheduler": (OwnSchedule, None),
    "text": (OwnText, None),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sets(st.sampled_from(sorted(OTHERS)), min_size=1).filter(lambda names: not {"data", "text"} <= names),
    st.sampled_from([1, 2]),
)
def test_what_a_run_of_own_parts_takes_is_known_or_named(names, n_devices):
    known = txtrain.plan(base())
    with registered():
        made = {}
        for name in names:
            axis = "data" if name == "text" else name
            txtrain.component(axis, "own")(OTHERS[name][0])
            made[axis] = TABLE[axis]["own"].config(type="own")
        config = dc.replace(base(), **made, trainer=dc.replace(base().trainer, devices=n_devices))
        figures = txtrain.plan(config)
    assert (figures.n_params, figures.flops_per_sample) == (known.n_params, known.flops_per_sample)
    for text in (OTHERS[name][1] for name in names):
        assert text is None or text in figures.memory_missing
    for name in ("objective", "data"):
        assert (f"{name}=own" in (figures.flops_missing or "")) == (name in names)
    assert (figures.memory is None) == any(OTHERS[name][1] for name in names)


def test_an_optimizer_that_says_all_is_counted_and_one_that_inherits_is_not():
    from txtrain.optim.config import AdamConfig

    class Own(OwnOptimizer):
        class Config(AdamConfig):
            pass

    class Stated(OwnOptimizer):
        @dc.dataclass(frozen=True, kw_only=True)
        class Config:
            def state_values(self, name, shape):
                return 0

            def counts_steps(self, name, shape):
                return False

            def update_bytes(self, held, size):
                return 0

    with registered():
        for cls in (Own, Stated):
            txtrain.component("optimizer", cls.__name__.lower())(cls)
        own, stated = (TABLE["optimizer"][name].config(type=name) for name in ("own", "stated"))
        inherits, states = (txtrain.plan(dc.replace(base(), optimizer=config)) for config in (own, stated))
    assert "`state_values`, `counts_steps`, `update_bytes` of its Config" in inherits.memory_missing
    known = txtrain.plan(base()).memory_by_part
    assert states.memory_by_part == {name: n for name, n in known.items() if name != "optimizer"}


def test_a_simulation_of_a_batch_that_nobody_knows_is_refused():
    config = txtrain.compose(["model=llama2", "plan.simulate=true"], verb="plan")
    with registered():
        txtrain.component("objective", "own")(OwnObjective)
        config = dc.replace(config, objective=TABLE["objective"]["own"].config(type="own"))
        with pytest.raises(txtrain.ConfigError, match=r"`plan\.simulate` must be false here, .*: objective=own is"):
            txtrain.plan(config)


def test_a_part_that_cannot_be_called_says_so_before_it_is_built():
    class Needs(nn.Module):
        def __init__(self, dim: int, width):
            super().__init__()

    class Unread(OwnAttention):
        @dc.dataclass(frozen=True, kw_only=True)
        class Config:
            rank: int = 8

    class Turned(OwnAttention):
        def __init__(self, dim: int, rotary_dim: int = 4):
            super().__init__(dim)

    class Asks(OwnNormPosition):
        @dc.dataclass(frozen=True, kw_only=True)
        class Config:
            n: int

    with registered():
        txtrain.component("ffn", "needs")(Needs)
        with pytest.raises(txtrain.ConfigError, match=r"`model/ffn=needs`: .* its parameter 'width' a default"):
            txtrain.build_model(tiny(ffn=TABLE["ffn"]["needs"].config(type="needs")))
        txtrain.component("attention", "unread")(Unread)
        with pytest.raises(txtrain.ConfigError, match=r"must have a parameter 'rank', which is a knob of its Config"):
            txtrain.build_model(tiny(attention=TABLE["attention"]["unread"].config(type="unread")))
        with pytest.raises(txtrain.ConfigError, match=r"'turned'\)`: .* another name than 'rotary_dim'"):
            txtrain.component("attention", "turned")(Turned)
        with pytest.raises(txtrain.ConfigError, match="'n' must have a default: an option of norm_position"):
            txtrain.component("norm_position", "asks")(Asks)
