"""The SLURM job of this process, from SLURM's environment variables and commands. No torch."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import datetime
import itertools
import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from txtrain.errors import ConfigError

PORTS = range(12_000, 32_000)  # above those of services, below Linux's ephemeral ports (32768 to 60999)
_SPECIAL = 0xFFFFFFF0  # step ids from here on are SLURM's own: the batch script, salloc's shell
_QUESTION, _REQUEST = 10.0, 60.0  # timeouts of SLURM's commands, in seconds
MAX_REQUEUES = 3  # default of trainer.max_requeues
_requeued: set[str] = set()  # jobs that this process has requeued


@dc.dataclass(frozen=True)
class Job:
    """number: for squeue and scontrol; ARRAY_TASK in a job array. restarts: how often SLURM has restarted it."""

    number: str
    restarts: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Job | None:
        """None outside a job."""
        given = os.environ if environment is None else environment
        array, task, job = (given.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"))
        number = f"{array}_{task}" if array and task else array or job
        # SLURM_RESTART_COUNT is unset before the first restart
        return cls(number, int(given.get("SLURM_RESTART_COUNT") or 0)) if number else None

    def end(self) -> float | None:
        """When the time limit ends the job, in seconds since 1970; None if SLURM does not say."""
        if text := os.environ.get("SLURM_JOB_END_TIME"):
            return float(text)
        with contextlib.suppress(ValueError):  # N/A, NONE
            return datetime.datetime.fromisoformat(self._asked("EndTime")[0]).timestamp()
        return None

    @property
    def record(self) -> dict[str, Any]:
        """As in run.json: under `slurm` for the latest start, under `progress` for the latest that saved a step."""
        return {"job": self.number, "restarts": self.restarts}

    def gives_up(self, most: int, *folders: str | None, name: str | None = None) -> bool:
        """Whether more than `most` starts of the job in a row, this one included, have saved no step.

        folders: of the job's runs, if they may lie outside runs/. name: of its run, where one with slashes lies deeper.
        """
        if self.restarts < most:
            return False
        last = -1
        named = [Path(folder).expanduser() / "run.json" for folder in folders if folder]
        for file in (*named, *Path("runs").glob("*/*/run.json"), *Path("runs", name or "").glob("*/run.json")):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # missing, or of another version
                kept = json.loads(file.read_text(encoding="utf-8"))["progress"]
                last = max(last, kept["restarts"] if kept["job"] == self.number else -1)
        return self.restarts - last > most

    def requeue(self, gives_up: bool = False) -> str:
        """Requeue the job; call it when all is on the disk, since SLURM then ends the job's processes at once.

        Not if SLURM requeues the job itself, nor if someone has cancelled it: scontrol would requeue it all the same.

        Returns:
            A sentence on the outcome.
        """
        if "WANDB_SWEEP_ID" in os.environ:
            return f"Job {self.number} is not requeued: it is that of a W&B agent, which may have other trials."
        if self.number in _requeued:
            return f"SLURM runs job {self.number} again."
        state, reason, restarts = self._asked("State", "Reason", "RestartCnt")
        if (restarts.isdigit() and int(restarts) > self.restarts) or state in ("PENDING", "REQUEUED"):
            return f"SLURM runs job {self.number} again by itself."
        if state == "CANCELLED" or (state == "COMPLETING" and reason != "TimeLimit"):
            return f"Job {self.number} was cancelled: it is not requeued."
        if gives_up:
            return (
                f"Job {self.number} is not requeued: more starts in a row than trainer.max_requeues have kept no step."
            )
        by_script = "exit code 75 tells the script to do it"
        try:
            done = _run(["scontrol", "requeue", self.number], _REQUEST)
        except OSError:
            return f"Job {self.number} is not requeued, scontrol is not there: {by_script}."
        except subprocess.TimeoutExpired:
            return f"Job {self.number} is not requeued, scontrol does not answer: {by_script}."
        if done.returncode > 0:  # below 0: SLURM is ending the job's processes, scontrol among them
            return (
                f"Job {self.number} is not requeued, SLURM refuses ({(done.stderr or done.stdout).strip()}): "
                f"{by_script}."
            )
        _requeued.add(self.number)
        return f"SLURM runs job {self.number} again: scontrol requeue {self.number}."

    def _asked(self, *fields: str) -> list[str]:
        """Fields of the job by `squeue -O`; empty without an answer."""
        width = 60
        said = ""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            asked = ",".join(f"{name}:{width}" for name in fields)
            said = _run(["squeue", "--noheader", "--jobs", self.number, "-O", asked], _QUESTION).stdout
        return [said[i * width : (i + 1) * width].strip() for i in range(len(fields))]


def has_requeued() -> bool:
    return bool(_requeued)


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    env["SLURM_TIME_FORMAT"] = "standard"
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env, stdin=subprocess.DEVNULL)


# -------------------------------------------------------------------------------------------------------- srun's tasks


class Processes(Protocol):
    """The keys that say how many ranks a run has: `txtrain.run_config.TrainerConfig`."""

    @property
    def accelerator(self) -> str: ...
    @property
    def devices(self) -> int | Literal["auto"]: ...
    @property
    def num_nodes(self) -> int: ...


class Task(NamedTuple):
    """This process among the tasks that srun started. tasks: number on each node. hosts: the nodes' names, in order."""

    node: int
    local_rank: int
    tasks: tuple[int, ...]
    hosts: tuple[str, ...]

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Task | None:
        """None if srun did not start this process, or started a single interactive shell."""
        given = os.environ if environment is None else environment
        if "SLURM_PROCID" not in given or int(given.get("SLURM_STEP_ID") or _SPECIAL) >= _SPECIAL:
            return None
        tasks = per_node(given["SLURM_STEP_TASKS_PER_NODE"])
        if sum(tasks) == 1 and "SLURM_PTY_PORT" in given:  # srun --pty bash
            return None
        return cls(
            int(given["SLURM_NODEID"]), int(given["SLURM_LOCALID"]), tasks, tuple(hosts(given["SLURM_STEP_NODELIST"]))
        )

    @property
    def size(self) -> int:
        return sum(self.tasks)

    @property
    def rank(self) -> int:
        """Global rank, numbered by nodes whatever srun's distribution: neighbours communicate most, within a node."""
        return sum(self.tasks[: self.node]) + self.local_rank

    def check(self, trainer: Processes) -> None:
        """Raises:
        ConfigError: the tasks are not the processes that the configuration names.
        """
        problem = self._problem(trainer)
        if problem is not None:
            raise ConfigError(*([problem] if self.rank == 0 else []))  # all tasks fail, one reports

    def _problem(self, trainer: Processes) -> str | None:
        nodes, here = len(self.tasks), self.tasks[0]
        devices = _gpus(trainer.accelerator) or here if trainer.devices == "auto" else trainer.devices
        if set(self.tasks) == {here} and (devices, trainer.num_nodes) == (here, nodes):
            return None
        even = set(self.tasks) == {here}
        started = (
            f"{_n(nodes, 'node')} x {_n(here, 'task')}"
            if even else f"{nodes} nodes with {', '.join(map(str, self.tasks))} tasks"
        )
        ways = [f"srun --nodes={trainer.num_nodes} --ntasks-per-node={devices} txtrain ..."]
        if "SUBMITIT_EXECUTOR" in os.environ:
            ways = [f"hydra.launcher.nodes={trainer.num_nodes} hydra.launcher.tasks_per_node={devices}"]
        if even:
            ways.append(f"trainer.num_nodes={nodes} trainer.devices={here}")
        if self.size == 1 and trainer.num_nodes == 1:
            ways.append("no srun, and txtrain starts the processes of one node by itself")
        return (
            f"`trainer.devices` on `trainer.num_nodes` must be the tasks that srun has started ({started}), but are "
            f"{_n(trainer.num_nodes, 'node')} x {_n(devices, 'process', 'es')} (trainer.devices={trainer.devices}) "
            f"instead. Either {', or '.join(ways)}."
        )


def _n(number: int, one: str, plural: str = "s") -> str:
    return f"{number} {one}{'' if number == 1 else plural}"


def _gpus(accelerator: str) -> int:
    """GPUs of the job on this node; 0 if there are none or they are not used. trainer.devices=auto: a rank for each."""
    there = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if accelerator != "cpu" and there and given.isdigit() else 0


def per_node(text: str) -> tuple[int, ...]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(itertools.chain.from_iterable([int(n)] * int(times or 1) for n, times in found))


def hosts(text: str) -> list[str]:
    """`a[01-03,7]b,c` -> a01b, a02b, a03b, a7b, c."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        parts = [_numbers(part) if i % 2 else [part] for i, part in enumerate(re.split(r"\[([^\]]*)\]", item))]
        names += ["".join(chosen) for chosen in itertools.product(*parts)]
    return names


def _numbers(text: str) -> list[str]:
    """`01-03,7` -> 01, 02, 03, 7."""
    found = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found


def meeting_point(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port for the process group of the step's tasks: MASTER_ADDR and MASTER_PORT, if set.

    Else the first node, and a port that differs between jobs on one node, steps of a job, and restarts.
    """
    given = os.environ if environment is None else environment
    task = Task.here(given)
    assert task is not None
    address = given.get("MASTER_ADDR") or ("127.0.0.1" if len(task.hosts) == 1 else _address(task.hosts[0]))
    job, step, restarts = (
        int(given.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    port = PORTS.start + (job + 7919 * step + 613 * restarts) % len(PORTS)
    return address, int(given.get("MASTER_PORT") or port)


def _address(host: str) -> str:
    """The name of a node, or its address by SLURM if only SLURM knows the name (several nodes on one machine)."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = _run(["sinfo", "--noheader", "--Node", "--nodes", host, "--format", "%o"], _QUESTION).stdout.split()
            return found[0] if found else host
    return host
