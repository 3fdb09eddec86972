"""verb -> compose -> typed config -> run; exit codes; nothing else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from txtrain.errors import ConfigError, hint
from txtrain.parallel.early_signals import EndsAtOnce

if TYPE_CHECKING:
    from txtrain.config.compose import Composed, Loader

START = time.time()  # before the modules are imported that take long
Work = Callable[[], int]  # returns the exit code
VERBS = ("train", "generate", "export", "plan", "prepare", "preview")
_FLAGS = {"--multirun": False, "--help": False, "--resolve": False, "--cfg": True, "--config-dir": True}  # whether a value follows
_SHORT = {"-m": "--multirun", "-h": "--help", "-c": "--cfg", "-cd": "--config-dir"}
_FILE_FLAGS = ("--config", "--config-name", "--config-path", "-cn", "-cp")
_CFG = ("job", "hydra", "all")


class CommandLine(NamedTuple):
    verb: str | None  # None: not given
    flags: dict[str, str]
    overrides: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a failure (by exception), 2 the user's mistake, 75 preempted after a complete checkpoint."""
    try:
        with EndsAtOnce():
            work = _work(list(sys.argv[1:] if argv is None else argv))
        return work()
    except ConfigError as e:
        if os.environ.get("TXTRAIN_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        for problem in e.problems:  # none where another process of the run tells them
            print(f"txtrain: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a run that has begun answers it with a checkpoint
        print("\ntxtrain: interrupted.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has seen enough; what Python would still flush at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(argv: Sequence[str]) -> CommandLine:
    """Flags stand anywhere, the verb first among the rest. Not argparse, which knows nothing of KEY=VALUE and of our words."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if not word.startswith("-"):
            rest.append(word)
        elif name not in _FLAGS or (equals and not _FLAGS[name]):
            raise ConfigError(_not_a_flag(word))
        elif _FLAGS[name] and not equals:
            flags[name] = next(words, "")
        else:
            flags[name] = value
        if name in flags and _FLAGS[name] and not flags[name]:
            raise ConfigError(f"`{name}` must be followed by {' or '.join(_CFG) if name == '--cfg' else 'a folder'}.")
    if (shown := flags.get("--cfg", "job")) not in _CFG:
        raise ConfigError(f"`--cfg` must be one of {', '.join(_CFG)}, but is {shown!r} instead.{hint(shown, _CFG)}")
    verb = rest.pop(0) if rest and "=" not in rest[0] and not rest[0].startswith("~") else None
    if verb is not None and verb not in VERBS:
        from txtrain.config.paths import options

        model = f" Did you mean model={verb}?" if verb in options("model") else ""
        raise ConfigError(f"`{verb}` must be a verb ({', '.join(VERBS)}) or KEY=VALUE.{model or hint(verb, VERBS)}")
    return CommandLine(verb, flags, rest)


def _not_a_flag(word: str) -> str:
    name, equals, _ = word.partition("=")
    known = [*_FLAGS, *_SHORT]
    if name in _FILE_FLAGS:
        return f"`{name}` is not a flag. A named run is recipe=NAME; a folder of your own options and recipes is --config-dir DIR."
    if equals and name not in known:
        return f"`{word}` is not a flag. Overrides have no dashes: write {word.lstrip('-')}."
    return f"`{word}` is not a flag. Flags: {', '.join(known)}.{hint(name, known)}"


def _work(argv: list[str]) -> Work:
    """What the command line asks for, composed and imported, but for what only prints: that is done."""
    line = parse(argv)
    if "--help" in line.flags:
        from txtrain.cli.help import usage

        print(usage(line.verb), end="")
        return _nothing
    verb = line.verb or "train"
    handed = os.environ.pop("TXTRAIN_CONFIG", None)
    if handed and ("LOCAL_RANK" in os.environ or not line.overrides):
        from txtrain.config.compose import from_file

        return work_of(from_file(verb, handed))
    from txtrain.config import slurm_launcher
    from txtrain.config.compose import compose_job, make_loader
    from txtrain.config.overrides import expand

    loader = make_loader(line.flags.get("--config-dir"))
    multirun = "--multirun" in line.flags
    if not multirun and (alone := [o for o in line.overrides if o.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher."))]):
        raise ConfigError(f"`{alone[0]}` is for -m, whose members a launcher runs: add -m (a sweep may have one member).")
    jobs = [compose_job(verb, job, loader) for job in expand(line.overrides, multirun, loader)]
    if multirun and (unread := list(slurm_launcher.unread(jobs[0][1]))):
        raise ConfigError(*unread)
    if multirun and any(getattr(job.config, "resume", "auto") not in ("auto", "never") for job, _ in jobs):
        raise ConfigError("`resume`: a run is resumed alone, without -m.")
    if "--cfg" in line.flags:
        _show(line, verb, loader, jobs)
        return _nothing
    if multirun:
        from txtrain.cli.sweep import sweep

        return partial(sweep, verb, loader, jobs)
    return work_of(jobs[0][0])


def _nothing() -> int:
    return 0


def run(composed: Composed) -> int:
    return work_of(composed, time.time())()


def work_of(composed: Composed, start: float = START) -> Work:
    """start: of what is to be done, by the system's clock."""
    from txtrain.config.schema import Export, Generate, Plan, Prepare, Preview

    if isinstance(composed.config, Plan):
        from txtrain.cli.plan import run_plan

        return partial(run_plan, composed.config)
    if isinstance(composed.config, Prepare):
        from txtrain.cli.prepare import run_prepare

        return partial(run_prepare, composed.config)
    if isinstance(composed.config, Preview):
        from txtrain.cli.preview import run_preview

        return partial(run_preview, composed.config)
    if isinstance(composed.config, Export):
        from txtrain.cli.export import run_export

        return partial(run_export, composed.config)
    if isinstance(composed.config, Generate):
        from txtrain.cli.generate import run_generate

        return partial(run_generate, composed.config)
    from txtrain.parallel.launch import launch, n_processes

    if (n := n_processes(composed.config)) > 1:
        from txtrain.config.compose import to_file

        return partial(launch, composed.config, partial(to_file, composed), n)
    from txtrain.training.run import Origin, run_train

    return partial(run_train, composed.config, Origin(composed.grafts, composed.given, composed.folder, start, composed.notes))


def _show(line: CommandLine, verb: str, loader: Loader, jobs: list[tuple[Composed, list[str]]]) -> None:
    """`--cfg job` prints the typed, resolved config, one document a job; the others are Hydra's view."""
    if line.flags["--cfg"] == "job":
        import yaml

        from txtrain.convert import plain

        documents: list[Any] = [plain(composed.config) for composed, _ in jobs]
        print(yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True), end="")
        return
    from hydra._internal.hydra import Hydra

    resolve = "--resolve" in line.flags
    Hydra("txtrain", loader).show_cfg(verb, jobs[0][1], cfg_type=line.flags["--cfg"], package=None, resolve=resolve)
