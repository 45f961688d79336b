"""What `/proc` says about CPU time: of the node as a whole, and of one process. Parsing only.

The kernel counts in ticks of `SC_CLK_TCK` a second since boot. A guest's time is inside its
`user` time and is not added again; stolen time ran nothing of this node and is not busy.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from flopledger_agent.host.interface import CpuTotals, HostReadError

# Places on the line `cpu` of /proc/stat (proc_stat(5)): what counts as busy.
BUSY: Final = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq
# Places of /proc/PID/stat behind the command's closing bracket (proc_pid_stat(5), minus 3).
PARENT, FLAGS, UTIME, STIME, CUTIME, CSTIME, START = 1, 6, 11, 12, 13, 14, 19
KERNEL_THREAD: Final = 0x0020_0000  # PF_KTHREAD
_CPU_LINE: Final = re.compile(rb"^cpu\d+ ", re.MULTILINE)


class ProcessStat(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One process as its `stat` file tells it."""

    command: bytes
    parent_pid: int
    is_kernel_thread: bool
    own_ns: int  # CPU time of its threads, ended ones included
    children_ns: int  # CPU time of children that it has waited for, and of theirs
    start_ns: int  # when it began, since boot


def node_totals(content: bytes, tick_ns: int) -> CpuTotals:
    """The node's CPUs from `/proc/stat`; raises `HostReadError`."""
    first = content.partition(b"\n")[0].split()
    cpu_count = len(_CPU_LINE.findall(content))
    if len(first) <= max(BUSY) + 1 or first[0] != b"cpu" or not cpu_count:
        raise HostReadError("proc_not_readable", "stat")
    try:
        busy = sum(int(first[1 + place]) for place in BUSY)
    except ValueError:
        raise HostReadError("proc_not_readable", "stat") from None
    return CpuTotals(cpu_count=cpu_count, busy_ns=busy * tick_ns)


def process_stat(content: bytes, tick_ns: int) -> ProcessStat | None:
    """One process from `/proc/PID/stat`; None for what is no such file.

    The command may hold spaces and brackets, so fields are counted from its last bracket.
    """
    end = content.rfind(b")")
    fields = content[end + 2 :].split(b" ", START + 1)
    if end < 0 or len(fields) <= START:
        return None
    try:
        return ProcessStat(
            command=content[content.find(b"(") + 1 : end],
            parent_pid=int(fields[PARENT]),
            is_kernel_thread=bool(int(fields[FLAGS]) & KERNEL_THREAD),
            own_ns=(int(fields[UTIME]) + int(fields[STIME])) * tick_ns,
            children_ns=(int(fields[CUTIME]) + int(fields[CSTIME])) * tick_ns,
            start_ns=int(fields[START]) * tick_ns,
        )
    except ValueError:
        return None
