"""A sweep as an array of SLURM jobs: members that are not complete are submitted once, and waited for. No torch.

The folder of a sweep, which the same command finds again, holds `<number>.yaml` (a configuration), `<number>.json`
(how its last job ended) and `jobs.json` (member -> job). Only squeue is asked: without accounting there is no sacct.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import getpass
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from txtrain.cli import slurm_member
from txtrain.config.composed import Composed, to_file
from txtrain.config.schema import Train
from txtrain.config.schema_of_plan import Plan
from txtrain.config.slurm_launcher import SlurmConfig
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.convert import build, plain
from txtrain.ground.plain_files import check_keys, read_json
from txtrain.monitor.metrics_csv import latest
from txtrain.monitor.start_screen import count
from txtrain.parallel.early_signals import PREEMPTED
from txtrain.parallel.launch import python

ENDED = {"complete", "failed", "lost", "preempted"}  # final states
GRACE = 20.0  # seconds; a shared file system may show the last files of a job late
# As the scripts of slurm/: exit code 75 is a run preempted after a checkpoint, above 128 one that was killed. The job's
# script requeues where neither txtrain nor SLURM has.
TEARDOWN = """\
code=$? job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if (( code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < 50) )) &&
  [[ $(squeue -h -j "$job" -o %T) == RUNNING ]]; then
  scontrol requeue "$job"
fi
exit "$code\""""
SETUP = (
    "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
)


@dc.dataclass(frozen=True)
class Member:
    """One job of the sweep.

    label: its overrides that not all members share. digest: of its configuration; if that has changed, it runs again.
    """

    number: int
    job: Composed
    label: str
    folder: Path  # of the sweep

    def __str__(self) -> str:
        return f"member {self.number}" + (f" ({self.label})" if self.label else "")

    @property
    def file(self) -> Path:
        return self.folder / f"{self.number}.yaml"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.number}.json"

    @property
    def digest(self) -> str:
        return _digest([plain(self.job.config), self.job.folder])

    @property
    def run_dir(self) -> Path | None:
        """None for a verb without run folders. A run on fallback data has a name of its own."""
        config = self.job.config
        if not isinstance(config, Train):
            return None
        if self.job.folder is None:
            return Path(str(config.run_dir))
        paths = [Path("runs") / name / self.job.folder for name in (config.name, f"{config.name}-fallback")]
        return next((path for path in paths if path.exists()), paths[0])

    def ended(self) -> tuple[str, str]:
        """State and end time of its last job; empty if it had none, or one with another configuration."""
        if not self.record.exists():
            return "", ""
        known = read_json(self.record)
        check_keys(known, str(self.record), {"digest": str, "code": int, "ended": str})
        removed = known["code"] == 0 and self.run_dir is not None and not self.run_dir.exists()
        if known["digest"] != self.digest or removed:
            return "", ""
        return {0: "complete", PREEMPTED: "preempted"}.get(known["code"], "failed"), known["ended"]


def identity(verb: str, jobs: Sequence[Sequence[str]]) -> str:
    """Name of a sweep, by which it is found again: a digest of its members' overrides."""
    return f"sweep-{_digest([verb, [list(lines) for lines in jobs]])}"


def submit(verb: str, jobs: Sequence[Composed], labels: Sequence[str], how: SlurmConfig, name: str) -> int:
    """Run the members that are not complete. Exit code: 1 if one failed, else 75 if one is unfinished, else 0.

    Raises:
        ConfigError: SLURM, or a job, would refuse it; then nothing is submitted.
    """
    _check_commands()
    folder = Path(how.submitit_folder or f"runs/sweeps/{name.removeprefix('sweep-')}").expanduser()
    jobs = [_laid_out(job, how) for job in jobs]
    members = [Member(number, job, label, folder) for number, (job, label) in enumerate(zip(jobs, labels, strict=True))]
    queue = Queue(folder)
    states = {m.number: queue.state(m) for m in members}
    left = [m for m in members if states[m.number] in ENDED - {"complete"} or not states[m.number]]
    for m in members:
        if m not in left:
            _say(f"{m} is {states[m.number]}: not submitted again")
    _check(left, how)
    if left:
        _submit(verb, left, how, queue)
        _say(f"submitted {len(left)} of {len(members)} members; logs in {folder / 'logs'}")
    if not how.wait and left:
        _say("the same command says how they are; squeue --me shows the queue")
        return 0
    return _wait(members, queue)


# ---------------------------------------------------------------------------------------------------- before submission


def _check_commands() -> None:
    if missing := [command for command in ("sbatch", "squeue", "srun") if shutil.which(command) is None]:
        raise ConfigError(f"`hydra/launcher=slurm` needs SLURM's commands, but there is no {', '.join(missing)} here.")
    try:
        import submitit  # noqa: F401
    except ImportError as e:
        raise ConfigError("`hydra/launcher=slurm` needs submitit: pip install submitit.") from e


def layout(config: Any, how: SlurmConfig) -> tuple[int, int]:
    """Nodes of a member's job, and tasks per node, which are the ranks of its run."""
    if not isinstance(config, Train):
        return how.nodes or 1, how.tasks_per_node or 1
    devices = config.trainer.devices
    tasks = how.tasks_per_node or (devices if devices != "auto" else how.gpus_per_node or 1)
    return how.nodes or config.trainer.num_nodes, tasks


def _laid_out(job: Composed, how: SlurmConfig) -> Composed:
    """The job with the number of ranks that it will have: the launcher's where the configuration leaves it open.

    Raises:
        ConfigError: launcher and configuration differ; or the configuration is not legal on so many ranks.
    """
    if not isinstance(job.config, Train):
        return job
    nodes, tasks = layout(job.config, how)
    raw = plain(job.config)
    for key, ours, word in (("num_nodes", nodes, "nodes"), ("devices", tasks, "tasks_per_node")):
        given = raw["trainer"][key]
        if f"trainer.{key}" in job.given and given not in ("auto", ours):
            raise ConfigError(
                f"`hydra.launcher.{word}` must be trainer.{key} ({given}), or null, but is {ours} instead."
            )
        raw["trainer"][key] = ours
    return dc.replace(job, config=build(type(job.config), raw))


def _check(members: Sequence[Member], how: SlurmConfig) -> None:
    """Check the members before they are submitted.

    Raises:
        ConfigError: members differ in nodes or tasks, one does not fit, or its folder holds a run that it cannot
            continue.
    """
    layouts = {layout(m.job.config, how) for m in members}
    if len(layouts) > 1:
        shown = ", ".join(f"{nodes} x {tasks}" for nodes, tasks in sorted(layouts))
        raise ConfigError(f"`hydra/launcher=slurm` needs members of one layout, but they want {shown} (nodes x tasks).")
    problems = []
    for m in members:
        try:
            _check_one(m, how)
        except ConfigError as e:
            problems += [f"{m}: {problem}" for problem in e.problems]
    if problems:
        raise ConfigError(*problems)


def _check_one(m: Member, how: SlurmConfig) -> None:
    config = m.job.config
    if not isinstance(config, Train):
        return
    from txtrain.cli.plan import plan, size

    given = {key: value for key, value in plain(config).items() if key in _PLANNED}
    figures = plan(build(Plan, given | {"plan": {"memory": how.gpu_memory}}))
    memory = "" if figures.memory is None else f", {size(figures.memory)} a process"
    _say(f"{m}: {count(figures.n_params)} parameters{memory}")
    if m.run_dir is not None and (m.run_dir / "checkpoints").exists():
        from txtrain.checkpoint.run_folder import choose

        choose(dc.replace(config, run_dir=str(m.run_dir)), m.job.given)


_PLANNED = {f.name.removesuffix("_") for f in dc.fields(Train)}


# ----------------------------------------------------------------------------------------------------------- submitting


def _submit(verb: str, members: Sequence[Member], how: SlurmConfig, queue: Queue) -> None:
    """Raises:
    ConfigError: SLURM refuses it, or the same sweep is submitted elsewhere.
    """
    folder = members[0].folder
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with files.locked(folder) as ours:
            if not ours or queue.read() != queue.jobs:
                made = []  # the other's
                what = f"another process has just submitted the same sweep ({folder}). Start again to wait for it."
                raise ConfigError(f"`hydra.launcher.submitit_folder`: {what}")
            queue.add(_array(verb, members, how), members)
    except ConfigError:
        if folder in made:
            shutil.rmtree(folder)
        for path in made:
            with contextlib.suppress(OSError):  # not empty any more
                path.rmdir()
        raise


def _array(verb: str, members: Sequence[Member], how: SlurmConfig) -> list[str]:
    """Submit the members as one array.

    Returns:
        The job id of each member.

    Raises:
        ConfigError: SLURM refuses it.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    for m in members:
        m.record.unlink(missing_ok=True)
        to_file(m.job, m.file)
    command = how.python or shlex.join(python())
    executor = submitit.AutoExecutor(folder=str(members[0].folder / "logs"), cluster="slurm", slurm_python=command)
    config = members[0].job.config
    requeue = not isinstance(config, Train) or config.trainer.auto_requeue
    executor.update_parameters(**_parameters(how, *layout(config, how), requeue=requeue))
    arguments = [(verb, str(m.file.resolve()), str(m.record.resolve()), m.digest) for m in members]
    try:
        submitted = executor.map_array(slurm_member.run, *zip(*arguments, strict=True))
    except FailedJobError as e:
        said = " ".join(str(e).split())
        said = said[said.rfind("sbatch: error") :][:300]
        raise ConfigError(f"`hydra/launcher=slurm`: sbatch refuses the sweep: {said}") from e
    return [job.job_id for job in submitted]


def _parameters(how: SlurmConfig, nodes: int, tasks: int, requeue: bool) -> dict[str, Any]:
    """The keys as submitit's parameters. txtrain's signal replaces submitit's, on which submitit would requeue."""
    everywhere = {
        key: getattr(how, key)
        for key in ("name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "stderr_to_stdout")
    }
    of_slurm = (
        "partition", "account", "qos", "constraint", "exclude", "gres", "comment", "cpus_per_gpu", "gpus_per_task",
        "mem_per_gpu", "mem_per_cpu"
    )
    further = {"requeue": True, "signal": f"USR1@{how.signal_delay_s}"} | how.additional_parameters
    values = everywhere | {"nodes": nodes, "tasks_per_node": tasks} | {
        f"slurm_{key}": getattr(how, key) for key in (*of_slurm, "array_parallelism")
    }
    values |= {"slurm_additional_parameters": further, "slurm_srun_args": ["--wait=900"]}
    values |= {"slurm_setup": [*SETUP, *how.setup], "slurm_teardown": TEARDOWN.splitlines() if requeue else []}
    return {key: value for key, value in values.items() if value is not None}


# -------------------------------------------------------------------------------------------------------------- waiting


class Queue:
    """The members' jobs, and their states in squeue."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "jobs.json"
        self.jobs = self.read()
        self._gone: dict[int, float] = {}  # member without a result -> since when it is not in the queue
        self._known: Mapping[str, str] = {}
        if said := self.look():
            raise ConfigError(f"`hydra/launcher=slurm`: squeue does not say which members are in the queue: {said}.")

    def read(self) -> dict[int, str]:
        found = read_json(self.path) if self.path.exists() else {}
        if not all(n.isdecimal() and isinstance(job, str) for n, job in found.items()):
            raise ConfigError(f"{self.path} must say the job of each member by its number, but does not.")
        return {int(n): job for n, job in found.items()}

    def add(self, jobs: Sequence[str], members: Sequence[Member]) -> None:
        self.jobs |= {m.number: job for m, job in zip(members, jobs, strict=True)}
        files.write(self.path, json.dumps(self.jobs, indent=1) + "\n")
        self._gone.clear()
        self._known = dict.fromkeys(jobs, "PENDING")

    def look(self) -> str:
        """Ask squeue; return why it fails, else "". On failure the last answer holds: a controller may restart."""
        command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%T"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return "no answer for a minute"
        if done.returncode:
            return " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        self._known = dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)
        return ""

    def state(self, m: Member) -> str:
        """complete, failed, preempted, lost (its job left the queue without a result), or SLURM's state; "": no job."""
        if (job := self.jobs.get(m.number)) and (there := self._known.get(job)):
            return there.lower()
        if state := m.ended()[0]:
            return state
        return "lost" if job else ""

    def patient(self, m: Member) -> str:
        """As `state`, but a job counts as lost only after GRACE seconds."""
        state = self.state(m)
        if state != "lost":
            self._gone.pop(m.number, None)
            return state
        since = self._gone.setdefault(m.number, time.monotonic())
        return state if time.monotonic() - since > GRACE else "ending"


def _wait(members: Sequence[Member], queue: Queue) -> int:
    """Print each change of state until all members have ended, then the table. Returns the exit code."""
    told: dict[int, str] = {}
    pause = 1.0
    try:
        while True:
            states = {m.number: queue.patient(m) for m in members}
            for m in members:
                expected = m.number not in told and states[m.number] in ENDED | {"pending"}
                if told.get(m.number) != states[m.number] and not expected:
                    _say(f"{m}: {states[m.number]}, job {queue.jobs.get(m.number, '-')}")
            told = states
            if set(states.values()) <= ENDED:
                break
            time.sleep(pause)
            pause = min(15.0, pause * 1.1)
            queue.look()
    except KeyboardInterrupt:
        running = " ".join(sorted({queue.jobs[n].partition("_")[0] for n, state in told.items() if state not in ENDED}))
        print(file=sys.stderr)  # ends the line of ^C
        _say(
            "no longer waiting; the jobs go on. The same command waits again, squeue --me shows them, scancel "
            f"{running} ends them."
        )
        return PREEMPTED
    print("\n".join(table(members, queue, states)))
    found = set(states.values())
    return 1 if found & {"failed", "lost"} else PREEMPTED if "preempted" in found else 0


def table(members: Sequence[Member], queue: Queue, states: Mapping[int, str]) -> list[str]:
    """A line for each member: state, job, step and losses of its run, its own overrides, its folder."""
    rows = [["", "state", "ended", "job", "step", "loss", "val_loss", "overrides", "folder"]]
    for m in members:
        seen = latest(m.run_dir / "metrics.csv") if m.run_dir is not None else {}
        figures = [
            f"{seen['step']:.0f}" if "step" in seen else "",
            *(f"{seen[name]:.4f}" if name in seen else "" for name in ("loss", "val_loss"))
        ]
        rows.append([
            str(m.number), states[m.number], m.ended()[1], queue.jobs.get(m.number, ""), *figures, m.label,
            str(m.run_dir or "")
        ])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _say(text: str) -> None:
    print(f"txtrain: {text}", file=sys.stderr, flush=True)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:10]
