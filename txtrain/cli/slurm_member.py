"""Runs one member of a sweep in its SLURM job, inside submitit's process."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from txtrain.cli.verbs import exit_code, root_of, work_of
from txtrain.config.composed import from_file
from txtrain.ground import files


def run(verb: str, file: str, record: str, digest: str) -> int:
    """Run the member that `file` describes and write its exit code to `record`; exit with it unless it is 0."""
    own_signals()
    code = 1
    try:
        code = exit_code(lambda: work_of(verb, from_file(root_of(verb), file)))
    finally:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            ended = time.strftime("%Y-%m-%d %H:%M:%S")
            files.write(Path(record), json.dumps({"digest": digest, "code": code, "ended": ended}) + "\n")
    if code:
        sys.exit(code)  # not through submitit: the job's script gets the exit code and may requeue
    return code


def own_signals() -> None:
    """Remove submitit's signal handlers, which requeue the job themselves: txtrain requeues once, after its checkpoint.

    SIGUSR2, submitit's signal for the time limit, is treated as SIGUSR1.
    """
    from submitit.core.job_environment import JobEnvironment

    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if (theirs := JobEnvironment._usr_sig()) != signal.SIGUSR1:
        signal.signal(theirs, lambda *_: signal.raise_signal(signal.SIGUSR1))
