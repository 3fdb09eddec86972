"""Signals before there is anything to save. It stands in front of every other import, and so imports next to nothing itself."""

import os
import signal
import stat
import sys

# Preemption; the job's end is near; the same by submitit; the terminal is gone.
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SIGNALS = (signal.SIGINT, *PREEMPTING)
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
    """The command has its exit code: from here on signals are ignored, and what cannot be written any more is let go.

    Python's own end takes a while, and who is killed in it, or cannot write a last line, seems to have failed.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream.fileno())


def heard(numbers: tuple[signal.Signals, ...] = SIGNALS) -> list[signal.Signals]:
    """Without SIGHUP where this process was told to ignore it: nohup."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def say(text: str) -> None:
    """A line past the console, which may be in the middle of one and hold its lock; lost where nobody can read it."""
    try:  # noqa: SIM105  (contextlib would be imported)
        os.write(2, f"\ntxtrain: {text}\n".encode())
    except OSError:
        pass


def hung_up(number: int) -> None:
    """After SIGHUP: where the terminal is gone, what is still printed is lost instead of an error."""
    for fd in (1, 2) if number == signal.SIGHUP else ():
        try:
            if stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd):
                _to_nowhere(fd)
        except OSError:  # closed
            pass


def _to_nowhere(fd: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def is_training(words: list[str]) -> bool:
    """Whether the command line is of `txtrain train`, before it is read: its first word that is neither a flag nor KEY=VALUE is a verb."""
    verbs = [word for word in words if "=" not in word and not word.startswith("-")]
    return not verbs or verbs[0] == "train"


def _end(number: int, frame: object) -> None:
    say("interrupted.")
    os._exit(1)


def _stop(number: int, frame: object) -> None:
    code, first = PREEMPTED, os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        if first:
            say(f"{signal.Signals(number).name}: stopped before the first step.")
        from txtrain.ground.slurm import MAX_REQUEUES, Job

        job, words = Job.here(), dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
        if job is not None:  # a member of a sweep has no words: where its run is nobody can tell yet
            most = int(words.get("trainer.max_requeues", MAX_REQUEUES))
            gives_up = bool(words) and job.gives_up(most, words.get("run_dir"), words.get("resume"))
            code = 1 if gives_up else PREEMPTED
            if first and NOT_AGAIN not in sys.argv:
                say(job.requeue(gives_up))
    finally:
        os._exit(code)
