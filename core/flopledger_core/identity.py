"""Who a window of GPU time belongs to: entity, project, model, run, attempt and job are distinct.

Laws test different subjects (a model, a run, a developer, a cluster), so the parts of an identity
are never folded into one string. `idle` and `unattributed` are real accounts, not holes. Ids come
from job environments and may be hostile: they are checked here, once, and refused or kept whole.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from flopledger_core.activities import IDLE, UNATTRIBUTED, UNCLASSIFIED, require_activity
from flopledger_core.errors import InvalidInput

ID_LENGTH_MAX: Final = 128  # long enough for a path-like run name, short enough for a table cell
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+=-]{0,127}")
RESERVED_PROJECTS: Final = frozenset({IDLE, UNATTRIBUTED})

OwnerKind = Literal["attributed", "idle", "unattributed"]


def require_id(field: str, value: str) -> str:
    """`value` if it can be an id of an entity, project, model, run, attempt or job."""
    if _ID.fullmatch(value) is None:
        raise InvalidInput(
            field,
            value,
            "use 1 to 128 letters, digits and ._:/@+=- and begin with a letter or digit",
        )
    return value


def require_project(value: str, field: str = "project") -> str:
    """`value` if it can name a project: an id, and not one of the ledger's own accounts."""
    if value in RESERVED_PROJECTS:
        raise InvalidInput(field, value, "this name is an account of the ledger itself")
    return require_id(field, value)


class Owner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The account a record is posted to."""

    kind: OwnerKind
    entity: str | None = None
    project: str | None = None
    model: str | None = None
    run: str | None = None
    attempt: str | None = None
    job: str | None = None
    activity: str = UNCLASSIFIED

    def __post_init__(self) -> None:
        require_activity(self.activity, "owner.activity")
        if self.kind == "attributed":
            if self.project is None:
                raise InvalidInput("owner.project", None, "attributed work names its project")
            require_project(self.project, "owner.project")
        elif self.project is not None:
            raise InvalidInput("owner.project", self.project, f"{self.kind} work has no project")
        for field in ("entity", "project", "model", "run", "attempt", "job"):
            value = getattr(self, field)
            if value is not None:
                require_id(f"owner.{field}", value)

    @property
    def account(self) -> str:
        """The project, or the name of the ledger's own account."""
        return self.project if self.project is not None else self.kind


IDLE_OWNER: Final = Owner(kind="idle", activity=IDLE)
UNATTRIBUTED_OWNER: Final = Owner(kind="unattributed", activity=UNATTRIBUTED)
