"""Signals before there is anything to save. It stands in front of every other import, and so imports next to nothing itself."""

import os
import signal
import sys

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # preemption; the job's end is near; the same by submitit
PREEMPTED = 75  # exit code EX_TEMPFAIL: try again, for schedulers, for the scripts of slurm/ and for `-m`
NOT_AGAIN = "trainer.auto_requeue=false"  # on the command line: all that is known of the configuration so early


class EndsAtOnce:
    """`with EndsAtOnce():` Ctrl-C ends the process with one line and exit code 1, while modules are imported and the command line is read.

    Python's own answer is an exception, and one that is raised within an import comes out as a traceback, as another exception, or
    not at all. Whoever has an answer of their own, or was told to ignore the signal, keeps it. A training that is preempted so early
    ends with exit code 75, and a SLURM job is requeued.
    """

    def __init__(self) -> None:
        self.held: list[tuple[int, object]] = []

    def __enter__(self) -> None:
        answers: dict[int, tuple[object, object]] = {signal.SIGINT: (signal.default_int_handler, _end)}
        if is_training(sys.argv[1:]):
            answers |= dict.fromkeys(PREEMPTING, (signal.SIG_DFL, _stop))
        for number, (default, answer) in answers.items():
            if signal.getsignal(number) is default:
                try:
                    signal.signal(number, answer)  # type: ignore[arg-type]
                except ValueError:  # not the main thread, to which Python delivers signals
                    return
                self.held.append((number, default))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, answers)  # txtrain's own launcher holds them back until here

    def __exit__(self, *exception: object) -> None:
        for number, default in self.held:
            signal.signal(number, default)  # type: ignore[arg-type]


def nothing_is_left() -> None:
    """The command has its exit code: from here on signals are ignored. Python's own end takes a while, and who is killed in it seems to have failed."""
    for number in (signal.SIGINT, *PREEMPTING):
        signal.signal(number, signal.SIG_IGN)


def is_training(words: list[str]) -> bool:
    """Whether the command line is of `txtrain train`, before it is read: its first word that is neither a flag nor KEY=VALUE is a verb."""
    verbs = [word for word in words if "=" not in word and not word.startswith("-")]
    return not verbs or verbs[0] == "train"


def _end(number: int, frame: object) -> None:
    os.write(2, b"\ntxtrain: interrupted.\n")
    os._exit(1)


def _stop(number: int, frame: object) -> None:
    try:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            os.write(2, f"\ntxtrain: {signal.Signals(number).name}: stopped before the first step.\n".encode())
            from txtrain.ground.slurm import Job

            job = Job.here()
            if job is not None and NOT_AGAIN not in sys.argv:
                os.write(2, f"txtrain: {job.requeue()}\n".encode())
    finally:
        os._exit(PREEMPTED)
