"""What the tables of config.json are made of: each part knows some of its fields and reads them both ways. No torch.

`read` gets the fields, with the class's defaults where the file is silent, and gives dotted names of a ModelConfig.
`write` gets a model's description (describe.py) and gives the fields.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from txtrain.errors import ConfigError

Fields = Mapping[str, Any]  # of config.json
Values = Mapping[str, Any]  # by dotted names of a ModelConfig, or of a description

LARGEST = 2**31 - 1  # of any size: beyond it, products of two sizes overflow


class Part(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...
    def read(self, fields: Fields) -> Values: ...
    def write(self, model: Values) -> Fields: ...


# ------------------------------------------------------------------------------------------------------------- kinds of value

Kind = Callable[[str, Any], Any]


def integer(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ConfigError(f"`{name}` must be an integer from 0 to {LARGEST}, but is {_short(value)} instead.")
    return value


def number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"`{name}` must be a number, but is {_short(value)} instead.")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"`{name}` must be true or false, but is {_short(value)} instead.")
    return value


def optional(kind: Kind) -> Kind:
    return lambda name, value: None if value is None else kind(name, value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------- parts


@dc.dataclass(frozen=True)
class Field:
    """One field that is one value of ours."""

    name: str
    path: str
    kind: Kind = integer

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, fields: Fields) -> Values:
        return {self.path: self.kind(self.name, fields[self.name])}

    def write(self, model: Values) -> Fields:
        return {self.name: model[self.path]}


@dc.dataclass(frozen=True)
class Choice(Field):
    """A word of theirs for a word of ours. Several of theirs may mean one of ours: the first is written."""

    words: tuple[tuple[str, str], ...] = ()

    def read(self, fields: Fields) -> Values:
        word, known = fields[self.name], dict(self.words)
        if not isinstance(word, str) or word not in known:
            raise ConfigError(f"`{self.name}` must be one of {', '.join(known)}, but is {_short(word)} instead.")
        return {self.path: known[word]}

    def write(self, model: Values) -> Fields:
        ours = model[self.path]
        for word, meaning in self.words:
            if meaning == ours:
                return {self.name: word}
        raise ConfigError(f"`model.{self.path}` must be one of {', '.join(dict.fromkeys(m for _, m in self.words))}, but is {ours}")


@dc.dataclass(frozen=True)
class Constant:
    """A field that published folders have, always with this value."""

    name: str
    value: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, fields: Fields) -> Values:
        if fields[self.name] is not self.value:
            raise ConfigError(f"`{self.name}` must be {str(self.value).lower()}, but is {_short(fields[self.name])} instead.")
        return {}

    def write(self, model: Values) -> Fields:
        return {self.name: self.value}


@dc.dataclass(frozen=True)
class Heads:
    """Numbers of heads and their size. Classes without the last two have as many key-value heads, and split dim among them."""

    n_heads: str = "num_attention_heads"
    n_kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.n_heads, self.n_kv_heads, self.head_dim) if name)

    def read(self, fields: Fields) -> Values:
        n = integer(self.n_heads, fields[self.n_heads])
        kv = optional(integer)(self.n_kv_heads, fields[self.n_kv_heads]) if self.n_kv_heads else None
        size = optional(integer)(self.head_dim, fields[self.head_dim]) if self.head_dim else None
        kind = "mha" if kv in (None, n) else "mqa" if kv == 1 else "gqa"
        return {"n_heads": n, "attention.type": kind, "attention.n_kv_heads": None if kind == "mha" else kv, "attention.head_dim": size}

    def write(self, model: Values) -> Fields:
        made: dict[str, Any] = {self.n_heads: model["n_heads"]}
        for name, path in ((self.n_kv_heads, "attention.n_kv_heads"), (self.head_dim, "attention.head_dim")):
            if name:
                made[name] = model[path]
        return made


@dc.dataclass(frozen=True)
class TokenIds:
    """Where a text begins, ends and is padded. Ids beyond the vocabulary are kept: transformers has them in its defaults.

    freezes_pad: the class looks its embedding up with padding_idx, so that the padding's vector is not trained by being read.
    """

    freezes_pad: bool
    names: tuple[str, ...] = ("bos_token_id", "eos_token_id", "pad_token_id")

    def read(self, fields: Fields) -> Values:
        made: dict[str, Any] = {}
        for name in self.names:
            value = fields[name]
            several = isinstance(value, list) and name == "eos_token_id"
            made[name] = tuple(integer(name, v) for v in value) if several else optional(integer)(name, value)
        if self.freezes_pad:
            made["embedding.padding_idx"] = made["pad_token_id"]
        return made

    def write(self, model: Values) -> Fields:
        return {name: list(v) if isinstance(v := model[name], tuple) else v for name in self.names}


@dc.dataclass(frozen=True)
class Dropouts:
    """GPT's three rates: of the embedding's sum and of the sublayers' outputs, which are one with us, and of the attention."""

    names: tuple[str, ...] = ("embd_pdrop", "resid_pdrop", "attn_pdrop")

    def read(self, fields: Fields) -> Values:
        embedding, residual, attention = (number(name, fields[name]) for name in self.names)
        if embedding != residual:
            raise ConfigError(f"`embd_pdrop` must equal resid_pdrop ({residual}), but is {embedding} instead: model.dropout is both.")
        return {"dropout": residual, "attention.dropout": attention}

    def write(self, model: Values) -> Fields:
        return {"embd_pdrop": model["dropout"], "resid_pdrop": model["dropout"], "attn_pdrop": model["attention.dropout"]}


@dc.dataclass(frozen=True)
class UnitScale:
    """GPT-2's switch between scores divided by sqrt(head_dim) and scores as they are."""

    names: tuple[str, ...] = ("scale_attn_weights",)

    def read(self, fields: Fields) -> Values:
        return {"attention.scale": None if boolean("scale_attn_weights", fields["scale_attn_weights"]) else 1.0}

    def write(self, model: Values) -> Fields:
        return {"scale_attn_weights": model["attention.scale"] != 1.0}


@dc.dataclass(frozen=True)
class PreAttentionScalar:
    """Gemma 2's query_pre_attn_scalar, an integer n; scores are multiplied by n ** -0.5."""

    names: tuple[str, ...] = ("query_pre_attn_scalar",)

    def read(self, fields: Fields) -> Values:
        n = fields["query_pre_attn_scalar"]
        if type(n) is float and n.is_integer():
            n = int(n)
        if integer("query_pre_attn_scalar", n) < 1:
            raise ConfigError(f"`query_pre_attn_scalar` must be at least 1, but is {n} instead.")
        return {"attention.scale": n**-0.5}

    def write(self, model: Values) -> Fields:
        return {"query_pre_attn_scalar": round(model["attention.scale"] ** -2)}


@dc.dataclass(frozen=True)
class LayerWindows:
    """Gemma 2's windows: one width, and for each layer whether it applies."""

    names: tuple[str, ...] = ("sliding_window", "layer_types")

    def read(self, fields: Fields) -> Values:
        n = integer("num_hidden_layers", fields["num_hidden_layers"])
        width, types = optional(integer)("sliding_window", fields["sliding_window"]), fields["layer_types"]
        if types is None:
            return {"attention.window": width if n == 1 else (width, None)}
        known = {"sliding_attention": width, "full_attention": None}
        if not isinstance(types, list) or len(types) != n or any(not isinstance(t, str) or t not in known for t in types):
            raise ConfigError(f"`layer_types` must be a list of {n} (num_hidden_layers), each {' or '.join(known)}, but is {_short(types)} instead.")
        return {"attention.window": pattern([known[t] for t in types])}

    def write(self, model: Values) -> Fields:
        n, window = model["n_layers"], model["attention.window"]
        windows = window if isinstance(window, tuple) else (window,) * n
        widths = {w for w in windows if w is not None}
        if len(widths) > 1:
            raise ConfigError(f"`model.attention.window` must be of one width beside null, but is {list(windows)}")
        # Without any window the width is never applied, but the class wants one.
        width = widths.pop() if widths else model["max_seq_len"]
        return {"sliding_window": width, "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows]}


def pattern(windows: list[int | None]) -> int | tuple[int | None, ...] | None:
    """The shortest list that, repeated over the layers, gives these windows."""
    if not windows:
        return None
    borders = [0] * len(windows)  # of each beginning, how long a part it both begins and ends with: linear in the layers
    for i in range(1, len(windows)):
        n = borders[i - 1]
        while n and windows[n] != windows[i]:
            n = borders[n - 1]
        borders[i] = n + (windows[n] == windows[i])
    period = len(windows) - borders[-1]
    return windows[0] if period == 1 else tuple(windows[:period])
