"""The parts of a config.json table: each reads and writes some of its fields. No torch.

`read` turns the fields, with the class's defaults, into dotted names of a ModelConfig; `write` turns a model's
description (describe.py) into the fields.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from txtrain.errors import ConfigError

Fields = Mapping[str, Any]  # of config.json
Values = Mapping[str, Any]  # by dotted names of a ModelConfig, or of a description

LARGEST = 2**31 - 1  # of any size: products of two larger ones overflow


class Part(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...
    def read(self, fields: Fields) -> Values: ...
    def write(self, model: Values) -> Fields: ...


Kind = Callable[[str, Any], Any]


def integer(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ConfigError(f"`{name}` must be an integer from 0 to {LARGEST}, but is {short(value)} instead.")
    return value


def number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"`{name}` must be a number, but is {short(value)} instead.")
    return float(value)


def rate(name: str, value: Any) -> float:
    return 0.0 if value is None else number(name, value)


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"`{name}` must be true or false, but is {short(value)} instead.")
    return value


def optional(kind: Kind) -> Kind:
    return lambda name, value: None if value is None else kind(name, value)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


@dc.dataclass(frozen=True)
class Field:
    """One field for one value of ours. kind: checks and converts it; back: the inverse of the conversion."""

    name: str
    path: str
    kind: Kind = integer
    back: Callable[[Any], Any] = lambda value: value

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, fields: Fields) -> Values:
        return {self.path: self.kind(self.name, fields[self.name])}

    def write(self, model: Values) -> Fields:
        return {self.name: self.back(model[self.path])}


@dc.dataclass(frozen=True)
class Choice(Field):
    """A word of theirs for a word of ours. Of several for one of ours, the first is written."""

    words: tuple[tuple[str, str], ...] = ()

    def read(self, fields: Fields) -> Values:
        word, known = fields[self.name], dict(self.words)
        if not isinstance(word, str) or word not in known:
            raise ConfigError(f"`{self.name}` must be one of {', '.join(known)}, but is {short(word)} instead.")
        return {self.path: known[word]}

    def write(self, model: Values) -> Fields:
        first = {meaning: word for word, meaning in reversed(self.words)}
        if (ours := model[self.path]) not in first:
            known = ", ".join(dict.fromkeys(meaning for _, meaning in self.words))
            raise ConfigError(f"`model.{self.path}` must be one of {known}, but is {ours}")
        return {self.name: first[ours]}


@dc.dataclass(frozen=True)
class Constant(Field):
    """A field that is always true."""

    path: str = ""

    def read(self, fields: Fields) -> Values:
        if (value := fields[self.name]) is not True:
            raise ConfigError(f"`{self.name}` must be true, but is {short(value)} instead.")
        return {}

    def write(self, model: Values) -> Fields:
        return {self.name: True}


@dc.dataclass(frozen=True)
class Same:
    """A number of ours that the class has under several names; null: the first one's."""

    names: tuple[str, ...]
    path: str
    kind: Kind = integer

    def read(self, fields: Fields) -> Values:
        first, *others = self.names
        value = self.kind(first, fields[first])
        for name in others:
            other = fields[name]
            if other is not None and self.kind(name, other) != value:
                given = f"{first} ({value}), but is {other} instead"
                raise ConfigError(f"`{name}` must be {given}: here it is one number.")
        return {self.path: value}

    def write(self, model: Values) -> Fields:
        return dict.fromkeys(self.names, model[self.path])


@dc.dataclass(frozen=True)
class Heads:
    """Numbers of heads, and their size. None: the class has no such field, but n_heads, or dim / n_heads."""

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
        kv = None if kind == "mha" else kv
        return {"n_heads": n, "attention.type": kind, "attention.n_kv_heads": kv, "attention.head_dim": size}

    def write(self, model: Values) -> Fields:
        paths = {self.n_heads: "n_heads", self.n_kv_heads: "attention.n_kv_heads", self.head_dim: "attention.head_dim"}
        return {name: model[path] for name, path in paths.items() if name}


@dc.dataclass(frozen=True)
class TokenIds:
    """Ids of special tokens. Those beyond the vocabulary are kept: transformers has them in its defaults."""

    freezes_pad: bool  # the class's embedding has a padding_idx
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
    """GPT's three dropouts: of the embedding and of sublayers' outputs, which are one here, and of the attention."""

    names: tuple[str, ...] = ("embd_pdrop", "resid_pdrop", "attn_pdrop")

    def read(self, fields: Fields) -> Values:
        embedding, residual, attention = (number(name, fields[name]) for name in self.names)
        if embedding != residual:
            given = f"resid_pdrop ({residual}), but is {embedding} instead"
            raise ConfigError(f"`embd_pdrop` must be {given}: model.dropout is both.")
        return {"dropout": residual, "attention.dropout": attention}

    def write(self, model: Values) -> Fields:
        rates = model["dropout"], model["dropout"], model["attention.dropout"]
        return dict(zip(self.names, rates, strict=True))


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
        if not isinstance(types, list) or len(types) != n or not all(isinstance(t, str) and t in known for t in types):
            allowed = f"a list of {n} (num_hidden_layers), each {' or '.join(known)}"
            raise ConfigError(f"`layer_types` must be {allowed}, but is {short(types)} instead.")
        return {"attention.window": pattern([known[t] for t in types])}

    def write(self, model: Values) -> Fields:
        n, window = model["n_layers"], model["attention.window"]
        windows = window if isinstance(window, tuple) else (window,) * n
        widths = {w for w in windows if w is not None}
        if len(widths) > 1:
            raise ConfigError(f"`model.attention.window` must be of one width beside null, but is {list(windows)}")
        width = widths.pop() if widths else model["max_seq_len"]  # the class wants one even without a windowed layer
        types = ["full_attention" if w is None else "sliding_attention" for w in windows]
        return {"sliding_window": width, "layer_types": types}


def pattern(windows: list[int | None]) -> int | tuple[int | None, ...] | None:
    """The shortest list that, repeated over the layers, gives these windows."""
    if not windows:
        return None
    borders = [0] * len(windows)  # of each prefix, the longest border (Knuth, Morris, Pratt): linear in the layers
    for i in range(1, len(windows)):
        n = borders[i - 1]
        while n and windows[n] != windows[i]:
            n = borders[n - 1]
        borders[i] = n + (windows[n] == windows[i])
    period = len(windows) - borders[-1]
    return windows[0] if period == 1 else tuple(windows[:period])
