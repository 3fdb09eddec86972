"""Rank and world size of this process, from the launcher's environment variables. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from txtrain.errors import ConfigError
from txtrain.ground.slurm import Task

# Path of the file store where the processes of one machine meet, in place of MASTER_ADDR and MASTER_PORT.
STORE = "TXTRAIN_STORE"


class World(NamedTuple):
    """rank: 0..size - 1 over all nodes. local_rank: 0..local_size - 1 on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def n_nodes(self) -> int:
        return self.size // self.local_size

    @property
    def node(self) -> int:
        return self.rank // self.local_size

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> World:
        """From the variables of torchrun (txtrain's launcher sets the same), else of srun, else one process.

        Raises:
            ConfigError: some of the variables are missing or not integers.
        """
        given = os.environ if environment is None else environment
        if "RANK" not in given or "WORLD_SIZE" not in given:
            task = Task.here(given)
            return cls() if task is None else cls(task.rank, task.size, task.local_rank, task.tasks[task.node])
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            rank, size, local_rank, local_size = (int(given[name]) for name in names)
        except (KeyError, ValueError) as e:
            shown = ", ".join(f"{name}={given.get(name)}" for name in names)
            raise ConfigError(
                f"The environment must tell this process' place as torchrun does, but has {shown}. "
                "Unset RANK to run alone."
            ) from e
        return cls(rank, size, local_rank, local_size)


def started() -> bool:
    """Whether a launcher (torchrun, srun, txtrain's own) has started this process."""
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or Task.here() is not None


def by_srun() -> Task | None:
    """This process' SLURM task, if srun alone has started it."""
    return None if "RANK" in os.environ and "WORLD_SIZE" in os.environ else Task.here()
