"""Reads files of rules (policies, instruments): one strict way from TOML text to a frozen value.

A threshold or a verdict that is silently misread would make every statement a lie, so nothing
here has a default for what a law says: an unknown key, a wrong type or a missing citation is an
error that names the file, the key, the value and the remedy. A file of one's own never replaces a
packaged one; it takes an id of its own. The digest of the exact bytes travels with the value.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from flopledger_core.errors import InvalidInput

RULE_FILE_BYTES_MAX: Final = 262_144  # the longest packaged file has 8 KiB; this is no data store
RULE_FILES_MAX: Final = 256  # of one's own; every one of them is evaluated for every project

RuleId = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
Name = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,62}$")]
Sentence = Annotated[str, Meta(min_length=1, max_length=1024)]

# How the source was read: P its own text, Px an excerpt of it, M a mirror or transcription of it,
# S a secondary source only.
ReadStatus = Literal["P", "Px", "M", "S"]
READ_STATUSES: Final[dict[str, str]] = {
    "P": "source text read",
    "Px": "excerpt of the source read",
    "M": "transcription of the source read",
    "S": "secondary source only",
}

_T = TypeVar("_T", bound=msgspec.Struct)
_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a rule file's content comes from and how well that was read."""

    citation: Sentence
    url: Sentence
    read_status: ReadStatus
    as_of: date  # the source is known to say so on this day


class RuleText(msgspec.Struct, frozen=True, kw_only=True):
    """One rule file as found: its name for error sentences, its parsed content, its digest."""

    file: str
    content: dict[str, Any]
    digest: str  # SHA-256 of the file's bytes, lower-case hex


def read_rule_text(file: str, text: str) -> RuleText:
    """Parse the TOML text of one rule file; InvalidInput when it is too long or no TOML."""
    encoded = text.encode()
    if len(encoded) > RULE_FILE_BYTES_MAX:
        raise InvalidInput(
            f"{file}: size", len(encoded), f"keep a rule file within {RULE_FILE_BYTES_MAX} bytes"
        )
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(file, str(error), "write the rule file as valid TOML") from error
    return RuleText(file=file, content=content, digest=hashlib.sha256(encoded).hexdigest())


def convert(file: str, prefix: str, content: object, kind: type[_T]) -> _T:
    """`content` as the value type `kind`; InvalidInput names the file, the key and the value."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        _refuse(file, prefix, content, str(error), error)


def packaged_texts(package: str) -> list[RuleText]:
    """Every `.toml` file that ships inside `package`, by file name."""
    folder = resources.files(package)
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".toml")),
        key=lambda entry: entry.name,
    )
    return [read_rule_text(entry.name, entry.read_text(encoding="utf-8")) for entry in files]


def directory_texts(directory: Path) -> list[RuleText]:
    """Every `.toml` file of one's own in `directory`, by file name."""
    if not directory.is_dir():
        raise InvalidInput("rule directory", str(directory), "name an existing directory")
    paths = sorted(directory.glob("*.toml"))
    if len(paths) > RULE_FILES_MAX:
        raise InvalidInput(
            "rule directory", len(paths), f"keep at most {RULE_FILES_MAX} rule files in it"
        )
    return [read_rule_text(str(path), _read(path)) for path in paths]


def require_new_id(file: str, rule_id: str, known: Collection[str]) -> None:
    """Refuse an id that another rule file has: no file silently replaces what another says."""
    if rule_id in known:
        raise InvalidInput(
            f"{file}: id", rule_id, "choose an id that no packaged or other rule file has"
        )


def value_at(content: object, path: str) -> object:
    """What stands at a path such as `.logic.of[0].kind`; None where the path leads nowhere."""
    value: Any = content
    for step in _STEP.finditer(path):
        key = step["key"] if step["index"] is None else int(step["index"])
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            str(path), str(error), "make the file readable and encode it as UTF-8"
        ) from error


def _refuse(file: str, prefix: str, content: object, message: str, error: Exception) -> NoReturn:
    """Turn a schema error into a sentence that shows where, what and how to mend it."""
    found = _PATH.search(message)
    path = found["path"] if found else ""
    value = value_at(content, path)
    complaint = message[: found.start()] if found else message
    key = f"{prefix}{path}".strip(".") or "file"
    raise InvalidInput(
        f"{file}: {key}", value, f"{complaint[0].lower()}{complaint[1:]}; correct this key"
    ) from error
