"""Signal handling before training starts. Imported before everything else, so it imports next to nothing itself."""

import os
import signal
import stat
import sys

# Preemption; the job's time limit is near; the same from submitit; the terminal is closed.
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SIGNALS = (signal.SIGINT, *PREEMPTING)
PREEMPTED = 75  # exit code EX_TEMPFAIL: schedulers, the scripts of slurm/ and `-m` try again


class EndsAtOnce:
    """Context manager for imports and the reading of the command line: Ctrl-C prints one line and exits with code 1.

    KeyboardInterrupt raised within an import surfaces as a traceback, as another exception, or not at all. Handlers
    already installed, and ignored signals, stay. A training preempted this early exits with code 75, and its SLURM job
    is requeued.
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, answers)  # txtrain's launcher blocks them until here

    def __exit__(self, *exception: object) -> None:
        for number, default in self.held:
            signal.signal(number, default)  # type: ignore[arg-type]


def nothing_is_left() -> None:
    """Ignore signals and failing output once the exit code is decided.

    Shutting the interpreter down takes a while; a signal or a failed write in it would turn success into failure.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by whoever started the process
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream.fileno())


def heard(numbers: tuple[signal.Signals, ...] = SIGNALS) -> list[signal.Signals]:
    """The signals to handle: without SIGHUP where this process ignores it (nohup)."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def say(text: str) -> None:
    """Write a line to stderr's file descriptor: the console may hold its lock. A failing write is ignored."""
    try:  # noqa: SIM105  (contextlib would be imported)
        os.write(2, f"\ntxtrain: {text}\n".encode())
    except OSError:
        pass


def hung_up(number: int) -> None:
    """After SIGHUP: discard output to a closed terminal, which would raise."""
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
    """Whether the unparsed command line is of `train`: the command is the first word that is no flag or KEY=VALUE."""
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

        # The configuration is not read yet.
        job, words = Job.here(), dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:] if "=" in word)
        if job is not None:  # a member of a sweep has no overrides here: its run folder is not known yet
            most = int(words.get("trainer.max_requeues", MAX_REQUEUES))
            folders = (words.get("run_dir"), words.get("resume"))
            gives_up = bool(words) and job.gives_up(most, *folders, name=words.get("name"))
            code = 1 if gives_up else PREEMPTED
            if first and words.get("trainer.auto_requeue", "").strip().lower() != "false":
                say(job.requeue(gives_up))
    finally:
        os._exit(code)
