"""The command line: verb -> compose -> typed config -> run."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from txtrain.cli.verbs import VERBS, Work, exit_code, overview, root_of, work_of
from txtrain.errors import ConfigError, hint

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from txtrain.config.composed import Composed
    from txtrain.config.loader import Loader

# Flag -> whether a value follows.
_FLAGS = {"--multirun": False, "--help": False, "--resolve": False, "--cfg": True, "--config-dir": True}
_SHORT = {"-m": "--multirun", "-h": "--help", "-c": "--cfg", "-cd": "--config-dir"}
_FILE_FLAGS = ("--config", "--config-name", "--config-path", "-cn", "-cp")
_CFG = ("job", "hydra", "all")


class CommandLine(NamedTuple):
    verb: str | None  # None: not given
    flags: dict[str, str]
    overrides: list[str]  # with --help: the groups and keys that are asked about


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code (`verbs.exit_code`)."""
    if argv is None:
        return exit_code(_begin)
    return exit_code(partial(_work, list(argv)))


def _begin() -> Work:
    """`_work` of the process's own command line. Nearly all that imports make stays: to look for garbage in it takes a
    tenth of the time of composing or of importing torch, and half a second when a process with torch ends."""
    often = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        return _work(sys.argv[1:])
    finally:
        gc.freeze()  # nor is it looked through later, at the end above all
        gc.set_threshold(*often)


def parse(argv: Sequence[str]) -> CommandLine:
    """Flags may stand anywhere; the verb is the first other word. argparse has no KEY=VALUE, nor our messages."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if not word.startswith("-"):
            rest.append(word)
        elif name not in _FLAGS or (equals and not _FLAGS[name]):
            raise ConfigError(_not_a_flag(word, next(words, None)))
        elif _FLAGS[name] and not equals:
            flags[name] = next(words, "")
        else:
            flags[name] = value
        if name in flags and _FLAGS[name] and not flags[name]:
            raise ConfigError(f"`{name}` must be followed by {' or '.join(_CFG) if name == '--cfg' else 'a folder'}.")
    if (shown := flags.get("--cfg", "job")) not in _CFG:
        raise ConfigError(f"`--cfg` must be one of {', '.join(_CFG)}, but is {shown!r} instead.{hint(shown, _CFG)}")
    verb = rest.pop(0) if rest and "=" not in rest[0] and not rest[0].startswith("~") else None
    if "--help" in flags:
        return (
            CommandLine(verb, flags, rest) if verb is None or verb in VERBS else CommandLine(None, flags, [verb, *rest])
        )
    if verb is not None and verb not in VERBS:
        from txtrain.config.paths import options

        meant = f" Did you mean model={verb}?" if verb in options("model") else _key_of_folder(verb, "train")
        raise ConfigError(f"`{verb}` must be a verb ({', '.join(VERBS)}) or KEY=VALUE.{meant or hint(verb, VERBS)}")
    if late := [word for word in rest if word in VERBS]:
        raise ConfigError(f"`{late[0]}` must be KEY=VALUE. The verb comes first.")
    if bare := [word for word in rest if "=" not in word and not word.startswith("~")]:
        raise ConfigError(f"`{bare[0]}` must be KEY=VALUE.{_key_of_folder(bare[0], verb or 'train')}")
    return CommandLine(verb, flags, rest)


def _key_of_folder(word: str, verb: str) -> str:
    """Which key takes a folder whose path was given alone, as other tools take it."""
    trained = "schema_of_trained" in VERBS[verb].config
    keys = ["checkpoint"] if trained else ["resume", "init_from"] if verb == "train" else ["data.path"]
    return f" Did you mean {' or '.join(f'{key}={word}' for key in keys)}?" if os.path.isdir(word) else ""


def _not_a_flag(word: str, following: str | None) -> str:
    name, equals, _ = word.partition("=")
    known = [*_FLAGS, *_SHORT]
    if name in _FILE_FLAGS:
        return f"`{name}` is not a flag. A named run is recipe=NAME; a folder of your own options is --config-dir DIR."
    near = hint(name.lstrip("-"), [flag.lstrip("-") for flag in _FLAGS], "--{}")
    if not near and name.startswith("--") and not equals and following and not re.search("^-|=", following):
        word = f"{name}={following}"  # `--lr 3e-4`, as argparse has it
    if "=" in word and name not in known:
        return f"`{word}` is not a flag. Overrides have no dashes: write {word.lstrip('-')}."
    return f"`{word}` is not a flag. Flags: {', '.join(known)}.{near}"


def _work(argv: list[str]) -> Work:
    """The work of a command line, composed and imported. Help and --cfg are printed here: nothing is left to do."""
    line = parse(argv)
    if "--help" in line.flags:
        print(_help(line), end="")
        return _nothing
    verb = line.verb or "train"
    handed = os.environ.pop("TXTRAIN_CONFIG", None)
    if handed and ("LOCAL_RANK" in os.environ or not line.overrides):
        from txtrain.config.composed import from_file

        return work_of(verb, from_file(root_of(verb), handed))
    from txtrain.cli.jobs import compose_job
    from txtrain.config import slurm_launcher
    from txtrain.config.loader import make_loader
    from txtrain.config.overrides import expand
    from txtrain.run_config import RunConfig

    loader, multirun = make_loader(line.flags.get("--config-dir")), "--multirun" in line.flags
    expanded = expand(line.overrides, multirun, loader)
    if unread := list(slurm_launcher.unread(expanded[0], multirun)):
        raise ConfigError(*unread)
    jobs = [compose_job(verb, job, loader) for job in expanded]
    runs = (job.config for job, _ in jobs if isinstance(job.config, RunConfig))
    if multirun and any(config.resume not in ("auto", "never") for config in runs):
        raise ConfigError("`resume`: a run is resumed alone, without -m.")
    if "--cfg" in line.flags:
        _show(line, verb, loader, jobs)
        return _nothing
    if multirun:
        from txtrain.cli.sweep import sweep

        return partial(sweep, verb, loader, jobs)
    return work_of(verb, jobs[0][0])


def _nothing() -> int:
    return 0


def _help(line: CommandLine) -> str:
    if line.verb is None and not line.overrides:
        return overview()
    from txtrain.cli.help import usage

    return usage(line.verb or "train", line.overrides)


def _show(line: CommandLine, verb: str, loader: Loader, jobs: list[tuple[Composed, list[Override]]]) -> None:
    """`--cfg job` prints the typed, resolved config, one YAML document per job; hydra and all are Hydra's view."""
    if line.flags["--cfg"] == "job":
        import yaml

        from txtrain.ground.convert import plain

        documents: list[Any] = [plain(composed.config) for composed, _ in jobs]
        print(yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True), end="")
        return
    from hydra._internal.hydra import Hydra

    lines: Any = jobs[0][1]
    resolve = "--resolve" in line.flags
    Hydra("txtrain", loader).show_cfg(verb, lines, cfg_type=line.flags["--cfg"], package=None, resolve=resolve)
