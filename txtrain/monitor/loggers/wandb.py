"""Weights & Biases: one W&B run for a run's folder, whatever happens to its processes.

Its history equals metrics.csv: the same names, and `_step` is our step. What a killed process lost (the client writes
blocks of 32 KiB, and its service may be killed alone) is sent again from metrics.csv when the run is next opened; what
is already there is not sent twice.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch import loggers as lightning

from txtrain.checkpoint.run_folder import RunFolder
from txtrain.errors import ConfigError, shorten
from txtrain.ground import plain_files
from txtrain.monitor import metrics_csv as metrics_file
from txtrain.monitor.loggers.offline import is_written, last_step
from txtrain.monitor.loggers.sinks import Sink
from txtrain.objectives.base import Shown
from txtrain.parallel.early_signals import PREEMPTED

VARIABLES = {  # by key: the variable that wins over it
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
    "name": "WANDB_NAME",
    "id": "WANDB_RUN_ID",
    "mode": "WANDB_MODE",
    "save_dir": "WANDB_DIR",
    "save_code": "WANDB_SAVE_CODE",
    "resume": "WANDB_RESUME",
}
_BY_SWEEP = ("project", "entity")  # set by the agent of a sweep
_OPENING = 120.0  # seconds that the training waits for the run to open; wandb.init itself waits 90
_WRITING = 5.0  # seconds for the last block of an offline run's file
_REOPENINGS = 3  # of one process; more is no accident
# Seconds that a run's end waits for its last rows, and for its last checkpoint; what remains is on the disk.
FINISH, UPLOAD = 30.0, 3600.0
# What a file in the current folder may set: nothing that sends or writes elsewhere. Any other key may, now or in a
# later version of W&B: a server, a proxy that sees the key, a file with one, headers.
_HARMLESS = (
    *("mode", "project", "entity", "run_group", "run_job_type", "run_name", "run_notes", "run_tags"),
    *("anonymous", "console", "disable_code", "disable_git", "ignore_globs", "quiet", "silent"),
)
_SHOWN = 3  # keys in a message
EXIT_CODES = {"complete": 0, "preempted": PREEMPTED, "failed": 1}


def _check_current_folder() -> None:
    """Refuse a folder that tells W&B where to send the user's key: it may have come with a stranger's run or set.

    Read as W&B reads it, so that it sees no key that this does not.

    Raises:
        ConfigError: the file of W&B's settings in the current folder names a server, a proxy, a key or the like.
    """
    for path in (Path("wandb", "settings"), Path(".wandb", "settings")):
        if not path.is_file():
            continue
        plain_files.check_file(path)
        parser = configparser.ConfigParser()
        try:
            parser.read(path)
        except (configparser.Error, ValueError, OSError) as e:
            raise ConfigError(f"{path.absolute()} must be settings of W&B's, but cannot be read: {_short(e)}.") from e
        named = {*parser.defaults()}.union(*(parser.options(section) for section in parser.sections()))
        if refused := sorted(named.difference(_HARMLESS)):
            raise ConfigError(
                f"{path.absolute()} must not name {' and '.join(shorten(key) for key in refused[:_SHOWN])}, which W&B "
                f"would follow in this folder; {', '.join(_HARMLESS)} may stand there. A server and a key are named by "
                "the variables WANDB_BASE_URL and WANDB_API_KEY, or by `wandb login`."
            )


class WandbLogger(lightning.WandbLogger):
    """Lightning's logger, but WANDB_* variables win, and a row's step is its own instead of the number of calls.

    Lightning's logs our step as trainer/global_step and lets W&B count rows: a run that continues from a checkpoint
    then has the rows after it twice.
    """

    def __init__(
        self, *, mode: str | None = None, save_dir: str = ".", settings: Mapping[str, Any] | None = None, **given: Any
    ) -> None:
        words = {"save_dir": save_dir, "mode": mode, "resume": "allow", **given}
        words |= {word: None for word, variable in VARIABLES.items() if os.environ.get(variable)}
        if os.environ.get("WANDB_SWEEP_ID"):
            words |= dict.fromkeys(_BY_SWEEP)
        super().__init__(**words)
        self._wandb_init["project"] = words.get("project")  # null must stay null: Lightning puts a name there
        del self._wandb_init["anonymous"]  # W&B warns even if it is null
        self._settings = dict(settings or {})
        _check_current_folder()
        self.opened = threading.Event()
        self.opened.set()

    @property
    def mode(self) -> str | None:
        """online, offline, disabled; None: as in W&B's own settings."""
        return os.environ.get("WANDB_MODE") or ("offline" if self._offline else self._wandb_init.get("mode"))

    def quiet_settings(self) -> Any:
        """W&B's settings with the user's. Its messages are shown with TXTRAIN_DEBUG=1; we print where the run is."""
        import wandb

        variables = {name.removeprefix("WANDB_").lower() for name in os.environ if name.startswith("WANDB_")}
        ours = {"finish_timeout": FINISH, "silent": os.environ.get("TXTRAIN_DEBUG") != "1"}
        return wandb.Settings(
            **{name: value for name, value in {**ours, **self._settings}.items() if name not in variables}
        )

    def open(self, mode: str | None) -> Any:
        """Open the W&B run."""
        import wandb

        self._experiment = wandb.init(**{**self._wandb_init, "mode": mode}, settings=self.quiet_settings())
        return self._experiment

    @property
    def experiment(self) -> Any:
        """The W&B run, for callbacks; waits until it is open. If that fails, an object that ignores every call."""
        self.opened.wait(_OPENING)
        return _DummyExperiment() if self._experiment is None else self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)


class WandB(Sink):
    """
    Args:
        folder: the run's, with its metrics.csv.
        kept: the last step whose row the resumed run keeps.
        say: prints once where the run can be seen.
    """

    def __init__(
        self, logger: WandbLogger, folder: Path, kept: int, say: Callable[[str], None], x_axis: str,
        log_model: bool | str, artifact: str | None,
    ) -> None:
        super().__init__(logger, x_axis)
        logger.opened.clear()
        self.folder, self.say, self.log_model, self.artifact = folder, say, log_model, artifact
        self._last = kept  # step of the newest row that W&B should have
        self._told: dict[str, Any] = {}
        self._reopenings = 0
        self._newest: tuple[Path, int, bool] | None = None  # the newest checkpoint, if not uploaded
        self._artifact: Any = None  # the latest one logged
        self._run: Any = None
        self._has = -1  # W&B has the rows up to this step

    # ---------------------------------------------------------------------------------------------------------- opening

    def open(self, told: Mapping[str, Any]) -> None:
        self._told = dict(told)
        try:
            self._open()
        finally:
            self.logger.opened.set()
        run = self._run
        if run.disabled:
            return
        if run.offline:
            files = f"{shlex.quote(run.settings.wandb_dir.rstrip('/'))}/offline-run-*-{run.id}"
            self.say(f"W&B offline ({self._why}); to send the run later: wandb sync {files}")
        else:
            self.say(f"W&B: {run.url}")

    def _open(self) -> None:
        import wandb

        mode, self._why = self.logger.mode, "WANDB_MODE" if os.environ.get("WANDB_MODE") else "as asked for"
        if mode is None and wandb.setup(self.logger.quiet_settings()).settings.mode not in ("offline", "disabled"):
            mode, self._why = _reachable()
        try:
            self._run = self.logger.open(mode)
        except wandb.Error as e:  # a project or a team that the key may not write to
            if mode != "online":
                raise
            self._why = _short(e)
            self._run = self.logger.open("offline")
        if self.x_axis == "tokens":
            self._run.define_metric("tokens")
            self._run.define_metric("*", step_metric="tokens")
        self._run.config.update(self._told, allow_val_change=True)
        self._has = self._last_there()
        for row in metrics_file.read(self.folder / "metrics.csv"):
            if self._has < int(row["step"]) <= self._last:
                self._run.log(
                    {name: _number(text) for name, text in row.items() if text and name != "step"},
                    step=int(row["step"]),
                )
                self._has = int(row["step"])

    def _last_there(self) -> int:
        """W&B's last step: from the service for a resumed run; from its files for one that waits for `wandb sync`."""
        if self._run.offline:
            found = last_step(Path(self._run.settings.wandb_dir), self._run.id)
            return -1 if found is None else found
        return int(self._run.starting_step) - 1

    def _do(self, what: Callable[[], Any]) -> Any:
        """Call `what`; restart W&B's service if it is gone: SLURM's SIGTERM reaches it too, and it ends at once."""
        import wandb

        try:
            return what()
        except Exception:  # the client's have no common base: MailboxClosedError, HandleAbandonedError, a broken pipe
            if self._reopenings == _REOPENINGS:
                raise
            self._reopenings += 1
            with contextlib.suppress(Exception):  # it raises again that the service is gone
                wandb.teardown()
            self._open()
            return what()

    # ----------------------------------------------------------------------------------------------------------- events

    def row(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step > self._has:
            self._do(lambda: self._run.log(dict(metrics), step=step))
            self._has = self._last = step

    def samples(self, step: int, tokens: int, shown: Sequence[Shown]) -> None:
        """Logged with their step's row: W&B does not change a row once another has followed."""
        import wandb

        if step < self._has:
            return
        logged: dict[str, Any] = {}
        if images := [one for one in shown if one.image is not None]:
            logged["samples/images"] = [wandb.Image(_pixels(one.image), caption=one.caption) for one in images]
        logged["samples"] = wandb.Table(
            columns=["step", "given", "answer"], data=[[step, one.given, one.answer or ""] for one in shown]
        )
        self._do(lambda: self._run.log(logged, step=step))

    def checkpoint(self, path: Path, step: int, order_hash: str, best: bool) -> None:
        self._newest = path, step, best
        self._do(lambda: self._run.summary.update({"data_order_hash": order_hash}))
        if self.log_model == "all":
            self._upload()

    def _upload(self) -> None:
        import wandb

        if self._newest is None:
            return
        path, step, best = self._newest
        self._newest = None
        artifact = wandb.Artifact(self.artifact or f"model-{self._run.id}", type="model", metadata={"step": step})
        artifact.add_dir(str(path))
        aliases = ["latest", f"step-{step}", *(["best"] if best else [])]
        self._artifact = self._do(lambda: self._run.log_artifact(artifact, aliases=aliases))

    def patience(self, status: str) -> float:
        return UPLOAD if status == "complete" and self.log_model else super().patience(status)

    def close(self, status: str) -> None:
        """A preempted run ends with exit code 75 and is marked, so that its sweep does not count it as failed."""
        if self.log_model and status == "complete":
            self._upload()
            if self._artifact is not None and not (self._run.offline or self._run.disabled):
                self._artifact.wait()
        if status == "preempted":
            self._do(lambda: self._run.mark_preempting())
        self._do(lambda: self._run.finish(exit_code=EXIT_CODES[status]))
        settings = self._run.settings
        # Whoever continues the run reads from this file what W&B has.
        if settings._offline and not is_written(Path(settings.sync_file), _WRITING):
            raise TimeoutError(f"{settings.sync_file} has no end after {_WRITING:.0f} s")


def kept_id(place: RunFolder, asked: str | None = None) -> str:
    """The id of the folder's W&B run, stored in run.json: it moves with the folder. WANDB_RUN_ID and `id` win."""
    found = os.environ.get("WANDB_RUN_ID") or asked or place.facts.get("wandb_id") or secrets.token_hex(4)
    place.update(wandb_id=found)
    return str(found)


def _reachable() -> tuple[str, str]:
    """online or offline, and why. Asks W&B: without an answer wandb.init would wait for 90 seconds and then raise."""
    import wandb

    try:
        known = wandb.login(prompt=False, verify=True)
    except Exception as e:  # no network, unknown host, invalid key
        return "offline", _short(e)
    return ("online", "") if known else ("offline", "no API key: WANDB_API_KEY, or `wandb login`")


def _pixels(image_CHW: Any) -> Any:
    """[H, W, C], bytes: W&B takes floats of one channel for bytes."""
    return (image_CHW * 255).round().byte().permute(1, 2, 0).numpy()


def _short(e: Exception) -> str:
    return " ".join(str(e).split())[:200]


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
