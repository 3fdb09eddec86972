"""Choose the strategy of a run."""

from __future__ import annotations

from txtrain.errors import ConfigError
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.world import World, by_srun
from txtrain.registry import resolve
from txtrain.run_config import RunConfig


def make_parallel(config: RunConfig) -> OneProcess:
    """The configured strategy; `OneProcess` for one process, unless the strategy offloads or is DeepSpeed's.

    Raises:
        ConfigError: the number of processes is not the configured one, or the strategy cannot lay them out.
    """
    if task := by_srun():
        task.check(config.trainer)
    world = World.here()
    named, nodes = config.trainer.devices, config.trainer.num_nodes
    if named != "auto" and (named, nodes) != (world.local_size, world.n_nodes):
        raise ConfigError(
            f"`trainer.devices` must be the number of processes that were started on a node ({world.local_size}; "
            f"trainer.num_nodes: {world.n_nodes}), but is {named} (trainer.num_nodes: {nodes}) instead. "
            "The command line starts the processes of one node by itself; "
            "start several nodes, or a script of your own, with torchrun or srun."
        )
    strategy = config.strategy
    if world.size == 1 and strategy.ep_size > 1:
        raise ConfigError(*strategy.problems(1, config.model))
    alone = world.size == 1 and not strategy.cpu_offload and not strategy.stage
    made: OneProcess = OneProcess(config, world) if alone else resolve("strategy", strategy.type)(config, world)
    return made
