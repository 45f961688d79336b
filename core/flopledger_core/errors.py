"""The errors of the core, one small tree; each says what is wrong and what to do about it.

FlopLedgerError
├── InvalidInput          a value from outside is not acceptable (names the field)
│   ├── WireError         bytes are not one batch in its one byte form
│   │   └── Truncated     the bytes end before the batch does
│   └── UnknownName       a name is not in a closed list
└── SignatureInvalid      the signature does not cover these bytes
"""

from __future__ import annotations

from typing import Final

SHOWN_VALUE_MAX: Final = (
    120  # characters of a hostile value that an error repeats; more helps nobody
)


def shown(value: object) -> str:
    """`value` as an error message may repeat it: quoted, on one line, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE_MAX else text[: SHOWN_VALUE_MAX - 1] + "…"


class FlopLedgerError(Exception):
    """Something FlopLedger can name went wrong."""


class InvalidInput(FlopLedgerError):
    """A value from outside is not acceptable."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{field} is {shown(value)}: {remedy}")


class UnknownName(InvalidInput):
    """A name is not in the closed list it must come from."""


class WireError(InvalidInput):
    """The bytes are not a batch in its one byte form."""


class Truncated(WireError):
    """The bytes end before the batch does."""


class SignatureInvalid(FlopLedgerError):
    """The signature does not cover these bytes under this key."""
