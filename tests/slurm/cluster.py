"""A real Slurm on this machine for tests: munged, slurmctld and one slurmd, on ports of their own.

Everything lives in one folder and is ended by process id. GPUs are device files that the kernel
knows no driver for (regular files where making them is not allowed), in an order of gres.conf that
is not the order of their minors. Where cgroup v1 is writable, Slurm tracks processes in it and
constrains devices; elsewhere it tracks them by /proc, and the trees recorded in
tests/golden/cgroups stand for the rest.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.programs import require_program

ROOT: Final = Path(__file__).resolve().parents[2]
DEPLOY: Final = ROOT / "deploy" / "slurm"
GRES_ORDER: Final = (2, 0, 3, 1)  # minors in the order of gres.conf
SHARDS_PER_GPU: Final = 2
DEADLINE_SECONDS: Final = 30.0
CGROUP_V1: Final = Path("/sys/fs/cgroup")

# What holds a node's GPUs for slurmctld although it does not run: it begins, or its epilog runs.
EDGES: Final = frozenset({"CONFIGURING", "COMPLETING"})


def wait_until(true: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Poll until something is so; fails with its name when it is not in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def cgroup_v1_is_writable() -> bool:
    """Whether Slurm can make its own tree in the controllers it needs."""
    for controller in ("freezer", "devices"):
        probe = CGROUP_V1 / controller / f"flopledger-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError:
            return False
    return (CGROUP_V1 / "devices" / "devices.list").exists()


class Cluster:
    """One node's Slurm; use `running()`."""

    def __init__(self, folder: Path, *, shards: bool) -> None:
        self.folder = folder
        self.jobs_folder = folder / "jobs"
        self.node = f"fl{os.getpid()}{'s' if shards else 'g'}"
        self.by_cgroup = cgroup_v1_is_writable()
        self._shards = shards
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    # --- the daemons --------------------------------------------------------------------------

    def start(self) -> None:
        """Write the configuration, start the daemons, wait until the node takes jobs."""
        for name in ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "scancel"):
            require_program(name)
        self._configure()
        munge = self.folder / "munge"
        self._start(
            "munged",
            "--foreground",
            "--force",
            "--num-threads=2",
            f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        )
        wait_until((munge / "socket").exists, "munged's socket")
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", self.node)
        wait_until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "the node is idle")

    def stop(self) -> None:
        """End every job and daemon that was started here, and what they left in cgroups."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, AssertionError):
            self.clear()
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)
        for tree in CGROUP_V1.glob(f"*/slurm_{self.node}"):
            for path in sorted(tree.rglob("*"), key=lambda one: -len(one.parts)):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                tree.rmdir()

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("wb") as output:
            self._processes.append(
                subprocess.Popen(
                    [require_program(program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environ,
                )
            )

    def _configure(self) -> None:
        folder = self.folder
        for name in ("state", "spool", "munge", "dev", "jobs", "work"):
            (folder / name).mkdir()
        for path in (folder, folder / "munge"):
            path.chmod(0o755)  # munged refuses a socket that not everybody can reach
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o600)
        for minor in GRES_ORDER:
            path = folder / "dev" / f"nvidia{minor}"
            try:
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(195, minor))
            except OSError:
                path.touch()
        for name in ("prolog", "epilog"):
            script = folder / f"{name}.sh"
            script.write_text(
                "#!/bin/sh\n"
                f"export FLOPLEDGER_SLURM_FOLDER='{self.jobs_folder}'\n"
                f"exec '{DEPLOY / name}.sh'\n"
            )
            script.chmod(0o755)
        gpus = "".join(f"Name=gpu File={folder}/dev/nvidia{minor}\n" for minor in GRES_ORDER)
        count = SHARDS_PER_GPU * len(GRES_ORDER)
        shards = f"Name=shard Count={count}\n" if self._shards else ""
        (folder / "gres.conf").write_text(gpus + shards)
        (folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUP_V1}\nConstrainDevices=yes\n"
        )
        (folder / "slurm.conf").write_text(self._slurm_conf(f",shard:{count}" if shards else ""))

    def _slurm_conf(self, shards: str) -> str:
        folder, user, host = self.folder, getpass.getuser(), socket.gethostname()
        controller, daemon = free_ports(2)
        gpus = len(GRES_ORDER)
        track, task = ("cgroup", "cgroup") if self.by_cgroup else ("linuxproc", "none")
        return f"""
ClusterName=flopledger
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/{track}
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu{",shard" if shards else ""}
Prolog={folder}/prolog.sh
Epilog={folder}/epilog.sh
PrologFlags=Alloc
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
NodeName={self.node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:{gpus}{shards}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""

    # --- jobs ---------------------------------------------------------------------------------

    def ask(self, *command: str, check: bool = True) -> str:
        """The standard output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            capture_output=True,
            env=self._environ,
            timeout=DEADLINE_SECONDS,
            cwd=self.folder / "work",
            check=False,
        )
        assert done.returncode == 0 or not check, (command, done.stderr.decode())
        return done.stdout.decode(errors="replace").strip()

    def submit(self, script: str, *options: str) -> int:
        """A batch job that runs a shell script; its id."""
        path = self.folder / "work" / f"{len(list((self.folder / 'work').iterdir()))}.sh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        answer = self.ask("sbatch", "--parsable", "-o", "/dev/null", *options, str(path))
        return int(answer.partition(";")[0])

    def clear(self) -> None:
        """Cancel every job and wait until none is left."""
        self.ask("scancel", f"--user={getpass.getuser()}", check=False)
        wait_until(lambda: not self.ask("squeue", "-h", check=False), "every job is gone", 15)

    def truth(self) -> dict[int, tuple[str, frozenset[int]]]:
        """What slurmctld says: state and minors of the GPUs by job id, of jobs that hold any.

        scontrol's IDX counts the GPUs in gres.conf's order.
        """
        found: dict[int, tuple[str, frozenset[int]]] = {}
        text = self.ask("scontrol", "-d", "show", "job", check=False)
        for entry in re.split(r"(?:\A|\n\n)(?=JobId=[0-9]+ )", text):
            job = re.match(r"JobId=([0-9]+) ", entry)
            state = re.search(r"^   JobState=([A-Z_]+) ", entry, re.MULTILINE)
            node = re.search(r"^     Nodes=\S+ .*GRES=(\S*)$", entry, re.MULTILINE)
            if job is None or state is None or node is None:
                continue
            minors = minors_in(node.group(1))
            if minors or state.group(1) in EDGES:
                found[int(job.group(1))] = (state.group(1), minors)
        return found


def minors_in(gres: str) -> frozenset[int]:
    """Device minors of `gpu:2(IDX:0-1)` or `shard:1(0/2,1/2,0/2,0/2)`."""
    places: set[int] = set()
    for part in re.findall(r"IDX:([0-9,-]+)", gres):
        for piece in part.split(","):
            first, _dash, last = piece.partition("-")
            places.update(range(int(first), int(last or first) + 1))
    for part in re.findall(r"shard[^(]*\(([0-9/,]+)\)", gres):
        for place, share in enumerate(part.split(",")):
            if not share.startswith("0/"):
                places.add(place)
    return frozenset(GRES_ORDER[place] for place in places)


@contextlib.contextmanager
def running(folder: Path, *, shards: bool = False) -> Iterator[Cluster]:
    """A started cluster, ended on every way out."""
    cluster = Cluster(folder, shards=shards)
    try:
        cluster.start()
        yield cluster
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")  # noqa: T201
        raise
    finally:
        cluster.stop()
        shutil.rmtree(folder / "spool", ignore_errors=True)
