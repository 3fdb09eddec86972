"""A SLURM of its own on this machine, real but for its nodes: munged, slurmctld, and one slurmd for each pretended node.

It needs neither root nor cgroups nor a database, and writes into one folder. Two partitions: `main`, whose jobs are requeued when one of `high`
wants their nodes. Each node pretends to have GPUs.

    python -m tests.slurm.cluster start DIR        # prints `export SLURM_CONF=...`; also: stop DIR, node-down DIR NODE, node-up DIR NODE
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.compose.conftest import ROOT

COMMANDS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
LONGEST = 60  # characters of the folder's path: the sockets of munge and of steps lie in it, and the system allows about 100 for those

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}  # NODE_FAIL and PREEMPTED are passed through

CONF = """\
ClusterName=txtrain
# the port at which the processes of a job meet is made of its number: two clusters on one machine must not have the same ones
FirstJobId={job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held back; less than 5 s is refused, in silence, for 120 s
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/run/%n.pid
SlurmdLogFile={folder}/log/%n.log
# more CPUs than there are may be promised
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=5
# a node that is silent so long is down, and its jobs are requeued
SlurmdTimeout=15
SlurmctldTimeout=30
MessageTimeout=20
TCPTimeout=5
BatchStartTimeout=60
UnkillableStepTimeout=60
MinJobAge=3600
MailProg=/bin/true
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=100000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=high Nodes=ALL Default=NO DefaultTime=10 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [command for command in COMMANDS if shutil.which(command, path=PATH) is None]
    return f"no SLURM here ({', '.join(absent)}): apt-get install slurm-wlm munge" if absent else None


class Cluster:
    """One cluster in one folder, from whichever process: what runs is recorded there.

    Args:
        grace: seconds that a preempted job of `main` has between the signal and its end.
        attached: the daemons end with the process that starts them, however it ends.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, gpus: int = 2, grace: int = 60, attached: bool = False) -> None:
        assert len(str(folder)) <= LONGEST, f"{folder}: sockets in so long a path cannot be bound"
        self.folder, self.nodes, self.cpus, self.gpus, self.grace = folder, nodes, cpus, gpus, grace
        self.conf, self.attached = folder / "slurm.conf", attached

    # -------------------------------------------------------------------------------------------------------------- start, stop

    def start(self, timeout: float = 120) -> None:
        """Raises:
        AssertionError: the nodes are not idle in time; with what the daemons wrote.
        """
        for name in ("state", "spool", "log", "run", "bin"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for node in self.names:
            (self.folder / "spool" / node).mkdir(exist_ok=True)
        os.chmod(self.folder, 0o755)  # munged wants its socket's folder open
        self._configure()
        (self.folder / "munge").mkdir(mode=0o700, exist_ok=True)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        own = self.folder / "munge"
        files = [f"--pid-file={own}/pid", f"--seed-file={own}/seed", f"--log-file={self.folder}/log/munged.log"]
        self._launch("munged", "munged", "--foreground", "--num-threads=2", f"--key-file={key}", f"--socket={self.folder}/munge.socket", *files)
        self._until(lambda: self.quietly("munge", "-n", "-S", f"{self.folder}/munge.socket") is not None, 30, "munged answers")
        self._launch("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in self.names:
            self._launch(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))
        self._until(lambda: self._idle() == self.nodes, timeout, "all nodes are idle")

    def stop(self) -> None:
        """End all jobs, then the daemons, then what outlived them."""
        if self._alive("slurmctld"):
            jobs = (self.quietly("squeue", "-h", "-o", "%A") or "").split()
            if jobs:
                self.quietly("scancel", "-Q", "-f", "-s", "KILL", *jobs)
                self.quietly("scancel", "-Q", *jobs)
                with contextlib.suppress(AssertionError):
                    self._until(lambda: not self.quietly("squeue", "-h", "-o", "%A"), 5, "no job is left")
        self._kill_work()
        for name in [*self.names, "slurmctld", "munged"]:
            self._end(name)
        self._kill_work()

    def node_down(self, node: str) -> None:
        """As if the power failed: its daemon and all that runs on it are killed. SLURM notices after SlurmdTimeout."""
        self._end(node, signal.SIGKILL)
        self._kill_work(node)

    def node_up(self, node: str) -> None:
        self._launch(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))
        self._until(lambda: any(word in self.call("scontrol", "-o", "show", "node", node) for word in ("State=IDLE ", "State=MIXED ")), 60, f"{node} is up")

    # -------------------------------------------------------------------------------------------------------------- its commands

    @property
    def names(self) -> list[str]:
        return [f"node{i + 1}" for i in range(self.nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """For commands, and so for jobs: `txtrain` is this checkout's. What a surrounding job has set is left out."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SALLOC_", "SRUN_"))}
        path = os.pathsep.join([str(self.folder / "bin"), PATH])
        return kept | {"SLURM_CONF": str(self.conf), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(self, *command: str, cwd: Path | None = None, timeout: float = 120, **env: str) -> str:
        """Standard output of a command that succeeds.

        Raises:
            AssertionError: it fails; with what it wrote.
        """
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment | env, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def quietly(self, *command: str) -> str | None:
        """Standard output, None if the command fails."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            return self.call(*command, timeout=20)
        return None

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, Reason, NodeList, ..."""
        words = self.call("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, number: str, state: str, timeout: float = 400) -> dict[str, str]:
        """Wait for a job's state: a word of SLURM's, or `ended` for any of those that a job does not leave again.

        Raises:
            AssertionError: it is not reached in time, or the job has ended otherwise.
        """
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(number)
            if job["JobState"] == state or (state == "ended" and job["JobState"] in ENDED):
                return job
            assert job["JobState"] not in ENDED, f"job {number} has ended as {job}"
            assert time.monotonic() < deadline, f"job {number} is not {state} after {timeout} s: {job}\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        """The last lines of each daemon."""
        files = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-12:]) for file in files)

    # ---------------------------------------------------------------------------------------------------------------- processes

    def processes(self, node: str | None = None, own: str = "") -> Iterator[int]:
        """Processes of jobs, by the environment that they were started with: of one node, or of all; `own`: a word of their command line.

        A step's daemon gives its processes SLURM_CONF and SLURMD_NODENAME. Those that left their step's tree are found too.
        """
        wanted = [f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={node}" if node else "SLURMD_NODENAME="]
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                if wanted[0] in lines and any(line == wanted[1] or (node is None and line.startswith(wanted[1])) for line in lines) and own in command:
                    yield int(entry.name)

    def _kill_work(self, node: str | None = None) -> None:
        """Kill the daemons of steps first, so that nothing is reported as ended, then what they started."""
        for step in self._step_daemons(node):
            _kill(step, lambda pid: _comm(pid) == "slurmstepd")
        for pid in list(self.processes(node)):
            if pid != os.getpid():
                _kill(pid, lambda pid: pid in set(self.processes(node)))

    def _step_daemons(self, node: str | None) -> list[int]:
        """A slurmstepd has no environment to know it by; it holds its node's log open."""
        logs = {str(self.folder / "log" / f"{name}.log") for name in ([node] if node else self.names)}
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if _comm(int(entry.name)) == "slurmstepd" and any(os.readlink(fd) in logs for fd in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
        return found

    def _launch(self, name: str, *command: str) -> None:
        """Start a daemon, and record it: its number, and the time at which that number was given to it."""
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            how = {"stdout": out, "stderr": out, "stdin": subprocess.DEVNULL, "env": self.environment, "start_new_session": True}
            child = subprocess.Popen(command, preexec_fn=_die_with_parent if self.attached else None, **how)
        (self.folder / "run" / f"{name}.json").write_text(json.dumps([child.pid, _started(child.pid)]))

    def _alive(self, name: str) -> int | None:
        """The recorded process, if that is still the one."""
        try:
            pid, started = json.loads((self.folder / "run" / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return int(pid) if started is not None and _started(pid) == started else None

    def _end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        deadline = time.monotonic() + 8
        while (pid := self._alive(name)) is not None:
            _kill(pid, lambda _: self._alive(name) is not None, signal.SIGKILL if time.monotonic() > deadline else number)
            time.sleep(0.1)
        (self.folder / "run" / f"{name}.json").unlink(missing_ok=True)

    def _until(self, true: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.logs()}"
            time.sleep(0.1)

    def _idle(self) -> int:
        return len(set((self.quietly("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N") or "").split()))

    def _configure(self) -> None:
        port = free_ports(self.nodes + 1)
        host = socket.gethostname().partition(".")[0]
        values = {"host": host, "port": port, "job": 10 * port, "first": port + 1, "last": port + self.nodes, "user": getpass.getuser(), "folder": self.folder}
        self.conf.write_text(CONF.format(**values, nodes=self.nodes, cpus=self.cpus, gpus=self.gpus, grace=self.grace))
        devices = [self.folder / "run" / f"gpu{i}" for i in range(self.gpus)]
        for device in devices:  # slurmd wants a file for each; empty ones do
            device.touch()
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{self.nodes}] Name=gpu File={self.folder}/run/gpu[0-{self.gpus - 1}]\n")
        command = self.folder / "bin/txtrain"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m txtrain "$@"\n')
        command.chmod(0o755)


def free_ports(n: int) -> int:
    """The first of n neighbouring ports on which nobody listens, below those that the system gives to outgoing connections."""
    while True:
        first = random.randrange(15000, 32000)  # not seeded: other clusters of other processes look too
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + n):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _started(pid: int) -> int | None:
    """When a process was started, in the kernel's ticks; None if there is none, or only its exit code is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _kill(pid: int, is_it: Callable[[int], bool], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process that is looked at again once it can no longer be confused with another."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if is_it(pid):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def main(what: str, folder: str, node: str = "") -> None:
    cluster = Cluster(Path(folder).resolve())
    if what in ("node-down", "node-up"):
        (cluster.node_down if what == "node-down" else cluster.node_up)(node)
        return
    {"start": cluster.start, "stop": cluster.stop}[what]()
    if what == "start":
        print(f"export SLURM_CONF={cluster.conf} PATH={cluster.folder / 'bin'}:$PATH PYTHONPATH={ROOT}")


if __name__ == "__main__":
    main(*sys.argv[1:])
