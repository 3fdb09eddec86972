"""The strategy of a run, for the processes that there are."""

from __future__ import annotations

from txtrain.errors import ConfigError
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.world import World, by_srun
from txtrain.registry import resolve
from txtrain.run_config import RunConfig


def make_parallel(config: RunConfig) -> OneProcess:
    """One process needs no strategy, whichever was named, unless it is one that changes what one process does.

    Raises:
        ConfigError: the processes that were started are not those that the configuration names, or cannot be laid out.
    """
    if task := by_srun():
        task.check(config.trainer)
    world = World.here()
    named, nodes = config.trainer.devices, config.trainer.num_nodes
    if named != "auto" and (named, nodes) != (world.local_size, world.n_nodes):
        raise ConfigError(
            f"`trainer.devices` must be the number of processes that were started on a node ({world.local_size}; trainer.num_nodes: {world.n_nodes}), "
            f"but is {named} (trainer.num_nodes: {nodes}) instead. The command line starts the processes of one node by itself; "
            "a script of your own and several nodes are started with torchrun or srun."
        )
    strategy = config.strategy
    if world.size == 1 and strategy.ep_size > 1:
        raise ConfigError(*strategy.problems(1, config.model))
    alone = world.size == 1 and not strategy.cpu_offload and not strategy.stage
    made: OneProcess = OneProcess(config, world) if alone else resolve("strategy", strategy.type)(config, world)
    return made
