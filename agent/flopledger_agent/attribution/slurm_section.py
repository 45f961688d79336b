"""`[slurm]` of the configuration: where the prolog's job files are, and what else is read."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

_Path = Annotated[str, Meta(pattern="^/")]


class SlurmSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[slurm]`: without this table nothing of Slurm is looked for."""

    folder: _Path = "/run/flopledger-agent/slurm"
    # None: beside the slurm.conf that the prolog names, else in /etc/slurm.
    gres_conf: _Path | None = None
    job_mapping: _Path | None = None  # dcgm-exporter's folder, where a site has one
    # Listing a small folder takes microseconds; allocations begin and end as exactly as this.
    interval_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 0.5
