"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of the versions before."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from txtrain.errors import ConfigError, hint
from txtrain.hf.fields import Fields, Values, number
from txtrain.model import options

# rope_type -> (theirs, ours). The names that differ are those of the original length.
_ORIGINAL = ("original_max_position_embeddings", "original_max_seq_len")
_SCALINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "linear": (("factor", "factor"),),
    "yarn": (
        ("factor", "factor"),
        _ORIGINAL,
        *((name, name) for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")),
    ),
    "llama3": (("factor", "factor"), _ORIGINAL, ("low_freq_factor", "low_freq_factor"), ("high_freq_factor", "high_freq_factor")),
}
_NOT_OF_A_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dc.dataclass(frozen=True)
class Rope:
    """Both spellings are read, and both are written, so that a folder can be read by any version."""

    names: tuple[str, ...] = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")

    def read(self, fields: Fields) -> Values:
        said = _one_of(fields)
        thetas = {number("rope_theta", t) for t in (said.get("rope_theta"), fields["rope_theta"]) if t is not None}
        if len(thetas) > 1:
            raise ConfigError(f"`rope_theta` must be given once, but is {' and '.join(map(str, sorted(thetas)))}.")
        for where in (said, fields):
            if where.get("partial_rotary_factor") not in (None, 1):
                raise ConfigError(f"`partial_rotary_factor` must be 1, but is {where['partial_rotary_factor']} instead: heads are turned whole here.")
        return {"position.theta": thetas.pop() if thetas else 10_000.0, "position.scaling": _read_scaling(said, fields["max_position_embeddings"])}

    def write(self, model: Values) -> Fields:
        theta, scaling = model["position.theta"], model["position.scaling"]
        older = None if scaling is None else _write_scaling(scaling)
        newer = {"rope_type": "default"} if older is None else older
        return {"rope_parameters": {**newer, "rope_theta": theta}, "rope_theta": theta, "rope_scaling": older}


def _one_of(fields: Fields) -> Mapping[str, Any]:
    """`rope_parameters` or `rope_scaling`; versions disagree about which wins where both are given, so they must agree."""
    newer, older = fields["rope_parameters"], fields["rope_scaling"]
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"`{name}` must be an object or null, but is {value!r} instead.")
    if newer and older and {**newer, "rope_theta": None} != {**older, "rope_theta": None}:
        raise ConfigError(f"`rope_scaling` must agree with rope_parameters ({dict(newer)}), but is {dict(older)} instead.")
    return newer or older or {}


def _read_scaling(said: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any] | None:
    kind = said.get("rope_type", said.get("type", "default"))
    names = dict(_SCALINGS.get(kind, ())) if isinstance(kind, str) else {}
    if kind != "default" and not names:
        raise ConfigError(f"`rope_type` must be one of default, {', '.join(_SCALINGS)}, but is {kind!r} instead.{hint(kind, _SCALINGS)}")
    given = {name: value for name, value in said.items() if name not in _NOT_OF_A_SCALING and value is not None}
    for name in given:
        if name not in names:
            raise ConfigError(f"`{name}` must not be given with rope_type {kind}: it may change the numbers, and is not known.{hint(name, names)}")
    if kind == "default":
        return None
    if _ORIGINAL[0] in names:
        given.setdefault(_ORIGINAL[0], max_position_embeddings)
    if kind == "yarn":
        given.setdefault("factor", max_position_embeddings / given[_ORIGINAL[0]])
    required = [name for name in names if kind != "yarn" and name not in given]
    if required:
        raise ConfigError(f"`{required[0]}` must be given with rope_type {kind}.")
    return {"rope_type": kind} | {names[name]: value for name, value in given.items()}


def _write_scaling(scaling: options.RoPEScalingConfig) -> dict[str, Any]:
    if scaling.rope_type not in _SCALINGS:
        raise ConfigError(f"`model.position.scaling.rope_type` must be one of {', '.join(_SCALINGS)}, but is {scaling.rope_type}")
    usual = {f.name: f.default for f in dc.fields(scaling)} if scaling.rope_type == "yarn" else {}  # the class has the same
    values = {theirs: getattr(scaling, ours) for theirs, ours in _SCALINGS[scaling.rope_type] if getattr(scaling, ours) != usual.get(ours, ())}
    return {"rope_type": scaling.rope_type} | values
