"""Adapters: small trained matrices beside frozen ones. Their names, and the base of the options. No torch.

A matrix keeps its name, and its two factors lie beside it; experts are stacked along the first dimension:

    blocks.0.attention.q_proj.weight   blocks.0.attention.q_proj.lora_A.weight [r, in]      ... .lora_B.weight [out, r]
    blocks.0.ffn.experts.up_proj       blocks.0.ffn.experts.up_proj_lora_A [E, r, in]       ..._lora_B [E, out, r]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from txtrain.model.config import ModelConfig
from txtrain.model.transform import Transform
from txtrain.registry import BASES, config, register

_FACTOR = re.compile(r"(.+)(?:\.lora_([AB])\.weight|_lora_([AB]))")


class Factor(NamedTuple):
    """matrix: its name, without `.weight`. kind: A or B. stacked: of experts."""

    matrix: str
    kind: str
    stacked: bool


def factor_of(name: str) -> Factor | None:
    """What a parameter of that name is a factor of; None: it belongs to no adapter."""
    found = _FACTOR.fullmatch(name)
    return None if found is None else Factor(found[1], found[2] or found[3], found[3] is not None)


@config
class AdapterConfig:
    """What an adapter's option says."""

    type: str

    alone: ClassVar[bool] = False  # whether checkpoints hold the adapter without its base
    lora_dropout, rslora, modules_to_save = 0.0, False, tuple[str, ...]()  # fields of some options only

    def whole(self, model: ModelConfig) -> list[str]:
        """Modules that are trained whole beside it, as the user names them."""
        return []

    def check(self) -> Iterator[str]:
        yield from ()

    def transforms(self, model: ModelConfig) -> tuple[Transform, ...]:
        """The changes to a model."""
        return ()


BASES["adapter"] = AdapterConfig
register("adapter", "none", "txtrain.model.transform:Transform", AdapterConfig)
