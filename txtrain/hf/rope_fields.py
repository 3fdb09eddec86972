"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from txtrain.errors import ConfigError, hint
from txtrain.hf.fields import Fields, Values, integer, number
from txtrain.model import options

_ORIGINAL = "original_max_position_embeddings"
_SCALINGS = {  # rope_type -> its fields; model.position.scaling.rope_type=ntk is `default` with another rope_theta
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_NOT_OF_A_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dc.dataclass(frozen=True)
class Rope:
    """Both spellings are read, and both are written, for any version of transformers."""

    names: tuple[str, ...] = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")

    def read(self, fields: Fields) -> Values:
        said = _one_of(fields)
        thetas = {number("rope_theta", t) for t in (said.get("rope_theta"), fields["rope_theta"]) if t is not None}
        if len(thetas) > 1:
            raise ConfigError(f"`rope_theta` must be given once, but is {' and '.join(map(str, sorted(thetas)))}.")
        for where in (said, fields):
            if where.get("partial_rotary_factor") not in (None, 1):
                given = f"1, but is {where['partial_rotary_factor']} instead"
                raise ConfigError(f"`partial_rotary_factor` must be {given}: here heads are rotated whole.")
        scaling = _read_scaling(said, fields["max_position_embeddings"])
        return {"position.theta": thetas.pop() if thetas else 10_000.0, "position.scaling": scaling}

    def write(self, model: Values) -> Fields:
        theta, scaling = model["position.theta"], model["position.scaling"]
        older = None if scaling is None else _write_scaling(scaling)
        newer = {"rope_type": "default"} if older is None else older
        return {"rope_parameters": {**newer, "rope_theta": theta}, "rope_theta": theta, "rope_scaling": older}


def _one_of(fields: Fields) -> Mapping[str, Any]:
    """`rope_parameters` or `rope_scaling`; if both are given they must agree, since versions prefer different ones."""
    newer, older = fields["rope_parameters"], fields["rope_scaling"]
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"`{name}` must be an object or null, but is {value!r} instead.")
    if newer and older and {**newer, "rope_theta": None} != {**older, "rope_theta": None}:
        given = f"rope_parameters ({dict(newer)}), but is {dict(older)} instead"
        raise ConfigError(f"`rope_scaling` must agree with {given}.")
    return newer or older or {}


def _read_scaling(said: Mapping[str, Any], max_position_embeddings: Any) -> dict[str, Any] | None:
    kind = said.get("rope_type", said.get("type", "default"))
    names = _SCALINGS.get(kind, ()) if isinstance(kind, str) else ()
    if kind != "default" and not names:
        allowed = f"one of default, {', '.join(_SCALINGS)}"
        raise ConfigError(f"`rope_type` must be {allowed}, but is {kind!r} instead.{hint(kind, _SCALINGS)}")
    given = {name: value for name, value in said.items() if name not in _NOT_OF_A_SCALING and value is not None}
    for name in given:
        if name not in names:
            why = f"it may change the numbers, and is not known.{hint(name, names)}"
            raise ConfigError(f"`{name}` must not be given with rope_type {kind}: {why}")
    if kind == "default":
        return None
    if _ORIGINAL in names:
        given.setdefault(_ORIGINAL, max_position_embeddings)
    if kind == "yarn" and "factor" not in given:
        longest = integer("max_position_embeddings", max_position_embeddings)
        if not (original := integer(_ORIGINAL, given[_ORIGINAL])):
            raise ConfigError(f"`{_ORIGINAL}` must be at least 1, but is 0 instead.")
        given["factor"] = longest / original
    required = [name for name in names if kind != "yarn" and name not in given]
    if required:
        raise ConfigError(f"`{required[0]}` must be given with rope_type {kind}.")
    return {"rope_type": kind} | given


def _write_scaling(scaling: options.RoPEScalingConfig) -> dict[str, Any]:
    usual = {f.name: f.default for f in dc.fields(scaling)} if scaling.rope_type == "yarn" else {}  # as in transformers
    values = {f.name: getattr(scaling, f.name) for f in dc.fields(scaling)}
    return {n: v for n, v in values.items() if n not in usual or v != usual[n]}
