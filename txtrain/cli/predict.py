"""`txtrain predict`: an object for each row of a file, in its order, into a file."""

from __future__ import annotations

from functools import partial

from txtrain.cli.evaluate import check_checkpoint, counting, tell_notes
from txtrain.config.composed import Composed, to_file
from txtrain.config.schema_of_trained import Predict
from txtrain.errors import ConfigError
from txtrain.parallel.launch import launch, n_processes
from txtrain.parallel.world import World


def run_predict(job: Composed) -> int:
    """Predict in this process, or in several that it starts.

    Raises:
        ConfigError: the data, the weights or `out` do not allow it.
    """
    config: Predict = job.config
    check_checkpoint(config)
    if config.out is None:
        raise ConfigError("`out` must be given: the .jsonl file to write.")
    if (n := n_processes(config)) > 1:
        return launch(config, partial(to_file, job), n, "predict")
    tell_notes(job)
    from txtrain.training.prediction import run

    with counting("predicted") as tick:
        n_rows = run(config, tick)
    if World.here().rank == 0:
        print(f"written: {config.out}, {n_rows:,} rows")
    return 0
