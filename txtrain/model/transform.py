"""Changes to a model after it is built and before ranks share it, under every strategy. No torch.

A transform is applied once, to the model on the meta device or to the one that was given. Later parts look at each
parameter's `requires_grad`; `plan`, which builds no model, asks `trains`.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground.patterns import unfound


class Transform:
    """One change. Names are parameters' canonical names."""

    def problems(self, names: Collection[str]) -> Iterator[str]:
        """Why it cannot change a model with these parameters, as sentences."""
        yield from ()

    def apply(self, model: Any) -> None:
        """Change the torch.nn.Module in place."""

    def shortcomings(self, names: Collection[str]) -> Iterator[str]:
        """What was meant and not done, as sentences. names: the changed model's."""
        yield from ()

    def rank(self, matrix: str) -> int:
        """The rank of what is added to the matrix of that name; 0: nothing is."""
        return 0

    def trains(self, name: str) -> bool:
        """Whether the parameter is still trained."""
        return True

    def keeps(self, name: str) -> bool:
        """Whether checkpoints hold the parameter or buffer."""
        return True


@dc.dataclass(frozen=True)
class Freeze(Transform):
    """Parameters whose name matches a pattern (re.search) are not trained."""

    patterns: tuple[str, ...]

    def problems(self, names: Collection[str]) -> Iterator[str]:
        yield from unfound(names, {f"freeze[{i}]": pattern for i, pattern in enumerate(self.patterns)})
        if names and not any(map(self.trains, names)):
            all_of = f"{list(self.patterns)} has all {len(names)} of them"
            yield f"`freeze` must leave a parameter to be trained, but {all_of}."

    def apply(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            if not self.trains(name):
                parameter.requires_grad_(False)

    def trains(self, name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in self.patterns)


def transform(model: Any, transforms: Sequence[Transform]) -> None:
    """Apply all to a torch.nn.Module, in place.

    Raises:
        ConfigError: one of them does not fit the model.
    """
    for one in transforms:
        if problems := list(one.problems([name for name, _ in model.named_parameters()])):
            raise ConfigError(*problems)
        one.apply(model)
        if problems := list(one.shortcomings([name for name, _ in model.named_parameters()])):
            raise ConfigError(*problems)
