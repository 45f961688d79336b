"""CPU time by owner: which of the node's processes are somebody's, and what they used.

What does not change is remembered: a process (pid and start together) is judged when it is first
seen, once more while it is young, when it executes another command, and when tags change. Only
processes with an owner are read at every scan; the others take turns, because their time is the
rest of the node's busy time anyway. A scan ends when its time is up; what it did not reach is
nobody's until it does.

The last interval of a process that ended is not lost where its parent waited for it: the kernel
adds a waited-for child's whole time to the parent's, and what was counted while it lived is
taken off again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flopledger_agent.host.cpu import process_stat
from flopledger_agent.host.interface import OwnerTime
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.host.cpu import ProcessStat
    from flopledger_agent.host.interface import ProcessOwners
    from flopledger_agent.host.procfs import ProcessFiles

SCAN_SECONDS: Final = 0.2  # a fifth of the sampling loop's second, and only every tenth second
# How much of a scan's time may have passed when each step ends, so that none starves the next.
READ_UNTIL, PEEK_UNTIL = 0.5, 0.8
TURNS: Final = 6  # a process without an owner is read again in one scan of so many
# So soon after its start a process may not have executed its program yet, whose environment counts.
YOUNG_NS: Final = 2 * NS_PER_SECOND
ANCESTORS_MAX: Final = 64  # deeper trees exist only by accident
# In any scan, however late it is: on a busy node, too, all processes are known some time.
READ_MIN, JUDGED_MIN = 512, 8
CLAIMS_MAX: Final = 4096  # remembered owners; forgetting them costs time only


class _Known:
    """A process seen before."""

    __slots__ = (
        "children_ns",
        "claim",
        "command",
        "counted_children_ns",
        "counted_own_ns",
        "judged",
        "kernel",
        "own_ns",
        "parent_pid",
        "root",
        "start_ns",
        "variables",
        "young",
    )

    def __init__(self, stat: ProcessStat, *, whole: bool, young: bool) -> None:
        self.start_ns = stat.start_ns
        self.command = stat.command
        self.parent_pid = stat.parent_pid
        self.kernel = stat.is_kernel_thread
        self.own_ns = stat.own_ns
        self.children_ns = stat.children_ns
        # What it used before anybody watched is not attributed any more.
        self.counted_own_ns = 0 if whole else stat.own_ns
        self.counted_children_ns = 0 if whole else stat.children_ns
        self.young = young  # to be looked at once more
        self.variables: bytes | None = None  # of attribution, in its environment; None: not asked
        self.root: int | None = None  # itself, or the nearest ancestor with a registered tag
        self.judged: int | None = None  # version of the tags at its judgement
        self.claim: Claim | None = None  # None: nobody's

    @property
    def is_candidate(self) -> bool:
        """Whether it is worth a judgement."""
        return self.root is not None or bool(self.variables)

    def update(self, stat: ProcessStat) -> None:
        """Another reading of the same process."""
        self.parent_pid = stat.parent_pid
        self.own_ns = max(self.own_ns, stat.own_ns)
        self.children_ns = max(self.children_ns, stat.children_ns)
        if self.claim is None and self.judged is not None:
            self.skip()
        if stat.command != self.command:
            self.command = stat.command
            self.variables = None  # it executed a program, perhaps with another environment
            self.judged = None

    def skip(self) -> None:
        """What it used until now is nobody's."""
        self.counted_own_ns = self.own_ns
        self.counted_children_ns = self.children_ns


class ProcessScanner:
    """Scans the processes; one caller at a time."""

    def __init__(
        self,
        files: ProcessFiles,
        owners: ProcessOwners,
        tick_ns: int,
        monotonic_seconds: Callable[[], float],
        scan_seconds: float = SCAN_SECONDS,
    ) -> None:
        self._files = files
        self._owners = owners
        self._tick_ns = tick_ns
        self._monotonic_seconds = monotonic_seconds
        self._scan_seconds = scan_seconds
        self._known: dict[int, _Known] = {}
        self._gone: dict[int, list[_Known]] = {}  # by parent, since the scan before
        self._scan = 0
        self._scanned_boot_ns: int | None = None
        self._peeked: dict[int, _Known] = {}  # whose environments are being read
        self._version: int | None = None
        self._claims: dict[tuple[bytes | None, int | None, bytes], Claim] = {}
        self._tagged: frozenset[int] = frozenset()

    def scan(self, boot_ns: int) -> tuple[OwnerTime, ...]:
        """CPU time by owner since the scan before; raises OSError when nothing can be listed.

        Owners that were seen and used nothing are told with zero. At the first scan all are: what
        they used before is not known to be in any interval.
        """
        began = self._monotonic_seconds()
        pids = self._files.pids()
        self._scan += 1
        self._gone = {}
        for pid in self._known.keys() - set(pids):
            self._part(pid)
        self._retag()
        self._read(self._order(pids), boot_ns, began + READ_UNTIL * self._scan_seconds)
        self._peek(began + PEEK_UNTIL * self._scan_seconds)
        self._judge(began + self._scan_seconds)
        self._scanned_boot_ns = boot_ns
        return self._times()

    def _order(self, pids: list[int]) -> list[int]:
        """Whom to read in this scan: owned processes, new ones, and the others in turns."""
        owned: list[int] = []
        fresh: list[int] = []
        others: list[int] = []
        for pid in pids:
            known = self._known.get(pid)
            if known is None:
                fresh.append(pid)
            elif known.claim is not None or known.is_candidate:
                owned.append(pid)
            elif known.young or (pid - self._scan) % TURNS == 0:
                others.append(pid)
        return owned + sorted(fresh, reverse=True) + others  # the youngest first: jobs are young

    def _read(self, pids: Iterable[int], boot_ns: int, deadline: float) -> None:
        for number, pid in enumerate(pids):
            if number >= READ_MIN and number % 16 == 0 and self._monotonic_seconds() > deadline:
                return
            content = self._files.process_stat(pid)
            stat = None if content is None else process_stat(content, self._tick_ns)
            known = self._known.get(pid)
            if known is not None and (stat is None or stat.start_ns != known.start_ns):
                self._part(pid)
                known = None
            if stat is None:
                continue
            if known is None:
                young = stat.start_ns > boot_ns - YOUNG_NS
                self._known[pid] = known = _Known(stat, whole=self._is_new(stat), young=young)
                known.root = self._root(pid)
                continue
            known.update(stat)
            if known.young:
                known.young = False
                known.variables = known.variables or None

    def _is_new(self, stat: ProcessStat) -> bool:
        """Whether it began after the scan before, so that all its time is of this interval."""
        before = self._scanned_boot_ns
        return before is not None and stat.start_ns >= before - self._tick_ns

    def _part(self, pid: int) -> None:
        known = self._known.pop(pid)
        self._gone.setdefault(known.parent_pid, []).append(known)

    def _retag(self) -> None:
        """Let every process be judged again when tags have changed."""
        version = self._owners.version()
        if version == self._version:
            return
        self._tagged = self._owners.tagged()
        self._version = version
        self._claims.clear()
        for pid, known in self._known.items():
            known.root = self._root(pid)

    def _root(self, pid: int) -> int | None:
        """The nearest registered tag, of itself or an ancestor.

        Where an ancestor has ended, what it led to before still holds.
        """
        remembered: int | None = None
        for _ in range(ANCESTORS_MAX if self._tagged else 0):
            if pid in self._tagged:
                return pid
            known = self._known.get(pid)
            if known is None:
                break
            remembered = known.root if remembered is None else remembered
            pid = known.parent_pid
        return remembered

    def _peek(self, deadline: float) -> None:
        """Look for tags in environments that nobody looked into yet."""
        wanted = [
            pid
            for pid, known in self._known.items()
            if known.variables is None and not known.kernel
        ]
        if not wanted:
            self._peeked.clear()
            return
        wanted.sort(reverse=True)
        left = max(0.0, deadline - self._monotonic_seconds())
        for pid in wanted:
            self._peeked.setdefault(pid, self._known[pid])
        for pid, variables in self._files.variables(wanted, left).items():
            known = self._peeked.pop(pid, None)
            if known is None or self._known.get(pid) is not known:
                continue  # the pid is another process by now
            known.variables = variables
            if known.is_candidate:
                known.judged = None
            elif known.claim is None:
                known.judged = self._version
                known.skip()

    def _judge(self, deadline: float) -> None:
        judged = 0
        for pid, known in self._known.items():
            if not known.is_candidate or known.judged == self._version:
                continue
            if judged >= JUDGED_MIN and self._monotonic_seconds() > deadline:
                return
            judged += 1
            claim = self._claim(pid, known)
            nobody = claim.owner == UNATTRIBUTED_OWNER and not claim.flags
            if known.claim is None and known.judged is not None:
                known.skip()  # until now it was nobody's
            known.claim = None if nobody else claim
            known.judged = self._version
            if nobody:
                known.skip()

    def _claim(self, pid: int, known: _Known) -> Claim:
        """Whose it is; asked once for all processes of one user with the same tags.

        Asking takes milliseconds, and a job may have a thousand processes.
        """
        same = (known.variables, known.root, self._files.user_ids(pid))
        claim = self._claims.get(same)
        if claim is None:
            claim = self._owners.claim(pid)
            if claim.owner != UNATTRIBUTED_OWNER:  # it may only have ended meanwhile
                if len(self._claims) >= CLAIMS_MAX:
                    self._claims.clear()
                self._claims[same] = claim
        return claim

    def _times(self) -> tuple[OwnerTime, ...]:
        sums: dict[tuple[object, ...], tuple[Claim, int]] = {}
        for pid, known in self._known.items():
            claim = known.claim
            if claim is None:
                continue
            used = max(0, known.own_ns - known.counted_own_ns) + self._recovered(pid, known)
            known.skip()
            key = (claim.owner, claim.source, claim.user, claim.flags)
            first, before = sums.get(key, (claim, 0))
            sums[key] = (first, before + used)
        return tuple(OwnerTime(claim=claim, cpu_ns=used) for claim, used in sums.values())

    def _recovered(self, pid: int, known: _Known) -> int:
        """Time of children that ended since the scan before, which nobody counted yet.

        Zero where one of them had another owner: then it cannot be told whose it is.
        """
        reaped = known.children_ns - known.counted_children_ns
        gone = self._gone.get(pid, [])
        assert known.claim is not None
        if reaped <= 0 or any(
            one.claim is None or one.claim.owner != known.claim.owner for one in gone
        ):
            return 0
        counted = sum(one.counted_own_ns + one.counted_children_ns for one in gone)
        return max(0, reaped - counted)
