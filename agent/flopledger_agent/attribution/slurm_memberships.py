"""Which job of Slurm a process is in, by the control group that slurmd put it into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent.attribution.precedence import Membership
from flopledger_agent.attribution.slurm_cgroups import paths_in, place_of_process

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import Process

FILE_BYTES_MAX: Final = 128 * 1024  # a line for each of some fifteen hierarchies


class SlurmMemberships:
    """Reads control groups afresh each time, a file of /proc for a process; `root` is /proc."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root

    def membership(self, process: Process) -> Membership | None:
        """The job of a process, or that its group names none; None where it cannot be read."""
        try:
            with (self._root / str(process.pid) / "cgroup").open("rb") as file:
                content = file.read(FILE_BYTES_MAX)
        except OSError:
            return None
        place = place_of_process(paths_in(content.decode("utf-8", "replace")))
        if place is None:
            return Membership()
        names = [str(place.job_id)] if place.job_id is not None else []
        names += [place.sluid] if place.sluid is not None else []
        return Membership(jobs=frozenset(("slurm", name) for name in names))
