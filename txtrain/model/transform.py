"""What is changed in a model between its description and its laying over the ranks, under every strategy. No torch.

A transform of a run's configuration is applied once, to the model without storage or to the one that was given. Whatever comes later
asks each parameter whether it takes a gradient (`requires_grad`); what builds nothing (`plan`) asks `trains`.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground.patterns import unfound


class Transform:
    """One change. Names are the canonical ones of parameters."""

    def problems(self, names: Collection[str]) -> Iterator[str]:
        """Why a model with these parameters cannot be changed so, as sentences."""
        yield from ()

    def apply(self, model: Any) -> None:
        """Change the torch.nn.Module in place."""

    def trains(self, name: str) -> bool:
        """Whether the parameter is still trained."""
        return True


@dc.dataclass(frozen=True)
class Freeze(Transform):
    """Parameters whose name has one of the patterns (re.search) are read and not trained."""

    patterns: tuple[str, ...]

    def problems(self, names: Collection[str]) -> Iterator[str]:
        yield from unfound(names, {f"freeze[{i}]": pattern for i, pattern in enumerate(self.patterns)})
        if names and not any(map(self.trains, names)):
            yield f"`freeze` must leave a parameter to be trained, but {list(self.patterns)} has all {len(names)} of them."

    def apply(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            if not self.trains(name):
                parameter.requires_grad_(False)

    def trains(self, name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in self.patterns)


def transform(model: Any, transforms: Sequence[Transform]) -> None:
    """Apply all of them to a torch.nn.Module, in place.

    Raises:
        ConfigError: one of them does not go with the model.
    """
    for one in transforms:
        if problems := list(one.problems([name for name, _ in model.named_parameters()])):
            raise ConfigError(*problems)
        one.apply(model)
