"""The errors of the collector, one small tree beside the core's.

FlopLedgerError (core)
├── InvalidInput (core)
│   ├── ConfigInvalid     the configuration file is not acceptable (names the key)
│   └── RequestRefused    a whole request is refused before any batch of it was looked at
└── CollectorError
    ├── StoreError        the database did not do what was asked
    │   ├── StoreBusy     another process kept the database longer than the busy timeout
    │   ├── StoreFull     the disk is full; nothing was acknowledged
    │   └── SchemaOutdated  the database was written by another version; migrate it
    └── WriterStopped     the writer is closing, or its queue is full; send again later
"""

from __future__ import annotations

from typing import Literal

from flopledger_core.errors import FlopLedgerError, InvalidInput

RefusalKind = Literal["too_large", "unsupported_encoding", "malformed"]


class ConfigInvalid(InvalidInput):
    """The configuration file is not acceptable."""


class RequestRefused(InvalidInput):
    """A whole request is refused before any batch of it was looked at."""

    def __init__(self, kind: RefusalKind, field: str, value: object, remedy: str) -> None:
        self.kind = kind
        super().__init__(field, value, remedy)


class CollectorError(FlopLedgerError):
    """Something of the collector's own went wrong."""


class StoreError(CollectorError):
    """The database did not do what was asked; nothing of the transaction remains."""


class StoreBusy(StoreError):
    """Another process kept the database longer than the busy timeout."""


class StoreFull(StoreError):
    """The disk is full; nothing of the transaction remains and nothing was acknowledged."""


class SchemaOutdated(StoreError):
    """The database's tables are of another version than this program's."""


class WriterStopped(CollectorError):
    """The writer takes no more work: it is closing, or too much is waiting already."""
