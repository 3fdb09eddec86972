"""`txtrain train`: the run in this process, or in several that it starts."""

from __future__ import annotations

from functools import partial

from txtrain.config.composed import Composed, to_file
from txtrain.parallel.early_signals import EndsAtOnce
from txtrain.parallel.launch import launch, n_processes


def run_train(job: Composed) -> int:
    """Train.

    Raises:
        ConfigError: the configuration, the data or the checkpoint to continue from do not allow it.
    """
    with EndsAtOnce():  # torch is imported only if this process trains
        if (n := n_processes(job.config)) == 1:
            from txtrain.training.run import Origin, run_train
    if n > 1:
        return launch(job.config, partial(to_file, job), n)
    return run_train(job.config, Origin(job.grafts, job.given, job.folder, job.start, job.notes))
