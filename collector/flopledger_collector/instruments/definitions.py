"""What an instrument is: a threshold exactly as its text has it, with its logic, dates and source.

The comparator, the quantity and the date are the law's, not ours: they come from a data file and
nothing in code has a default for them. A text that joins a threshold with facts which meters
cannot see (a modality, a revenue) says so in its logic tree as declared facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from flopledger_collector.instruments.comparison import Comparator
from flopledger_collector.policies.definitions import Policy
from flopledger_collector.policies.evaluation import Quantity
from flopledger_collector.policies.rulefiles import (
    Name,
    RuleId,
    RuleText,
    Sentence,
    Source,
    convert,
    directory_texts,
    packaged_texts,
    require_new_id,
)
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.records import DecimalAmount

LOGIC_DEPTH_MAX: Final = 16  # no text nests deeper; evaluation recurses

Status = Literal["in_force", "proposed", "revoked", "unenforced"]
Subject = Literal["model", "run", "entity", "cluster", "modification"]
Window = Literal["lifetime", "run", "trailing_12_months", "calendar_year"]
Duration = Annotated[
    str, Meta(pattern=r"^P(?=[0-9T])([0-9]+Y)?([0-9]+M)?([0-9]+D)?(T(?=[0-9])([0-9]+H)?)?$")
]


class Threshold(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="threshold",
    tag_field="kind",
):
    """The instrument's own quantity, comparator and threshold."""


class Compare(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="compare",
    tag_field="kind",
):
    """A further comparison that the text joins to its own threshold."""

    quantity: Quantity
    comparator: Comparator
    threshold: DecimalAmount


class Fact(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="fact",
    tag_field="kind",
):
    """A fact that a person declares; undeclared is neither yes nor no."""

    name: Name
    question: Sentence


class AllOf(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="all",
    tag_field="kind",
):
    """Every part must hold."""

    of: Annotated[tuple[Node, ...], Meta(min_length=1)]


class AnyOf(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="any",
    tag_field="kind",
):
    """One part must hold."""

    of: Annotated[tuple[Node, ...], Meta(min_length=1)]


Node = Threshold | Compare | Fact | AllOf | AnyOf


class Trigger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be done, and how long after which event (ISO 8601 duration)."""

    event: Sentence
    duty: Sentence
    deadline: Duration
    citation: Sentence


class Instrument(msgspec.Struct, frozen=True, kw_only=True):
    """A legal threshold, complete; `valid_to` is the first day it no longer holds."""

    id: str
    version: str
    title: str
    jurisdiction: str
    subject: Subject
    quantity: Quantity
    comparator: Comparator
    threshold: int
    scope_policy: str
    window: Window
    status: Status
    valid_from: date
    valid_to: date | None
    review_date: date
    logic: Node
    source: Source
    triggers: tuple[Trigger, ...]
    note: str | None
    digest: str  # SHA-256 of the file's bytes
    file: str

    def facts(self) -> dict[str, str]:
        """The facts this instrument asks a person for: name and question."""
        return {node.name: node.question for node in nodes(self.logic) if isinstance(node, Fact)}


class _InstrumentFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: RuleId
    version: Sentence
    title: Sentence
    jurisdiction: Annotated[str, Meta(pattern="^[A-Z]{2}(-[A-Z0-9]{1,3})?$")]
    subject: Subject
    quantity: Quantity
    comparator: Comparator
    threshold: DecimalAmount
    scope_policy: RuleId
    window: Window
    status: Status
    valid_from: date
    review_date: date
    logic: Node
    source: Source
    triggers: tuple[Trigger, ...]
    valid_to: date | None = None
    note: Sentence | None = None


def nodes(logic: Node) -> Iterator[Node]:
    """Every node of a logic tree, parents first, in the text's order."""
    yield logic
    if isinstance(logic, AllOf | AnyOf):
        for part in logic.of:
            yield from nodes(part)


def load_instruments(
    policies: Mapping[str, Policy], directory: Path | None = None
) -> dict[str, Instrument]:
    """The packaged instruments and those of one's own in `directory`, by id.

    Each must name one of `policies` as its scope.
    """
    texts = packaged_texts("flopledger_collector.instruments")
    if directory is not None:
        texts += directory_texts(directory)
    instruments: dict[str, Instrument] = {}
    for text in texts:
        instrument = parse_instrument(text)
        require_new_id(text.file, instrument.id, instruments)
        if instrument.scope_policy not in policies:
            raise UnknownName(
                f"{text.file}: scope_policy",
                instrument.scope_policy,
                f"name one of the policies: {', '.join(policies)}",
            )
        instruments[instrument.id] = instrument
    return instruments


def parse_instrument(text: RuleText) -> Instrument:
    """One instrument from its file; InvalidInput names the file, the key, the value, the remedy."""
    found = convert(text.file, "", text.content, _InstrumentFile)
    if int(found.threshold) == 0:
        raise InvalidInput(f"{text.file}: threshold", found.threshold, "give a positive threshold")
    _require_logic(text.file, found.logic)
    _require_validity(text.file, found)
    return Instrument(
        id=found.id,
        version=found.version,
        title=found.title,
        jurisdiction=found.jurisdiction,
        subject=found.subject,
        quantity=found.quantity,
        comparator=found.comparator,
        threshold=int(found.threshold),
        scope_policy=found.scope_policy,
        window=found.window,
        status=found.status,
        valid_from=found.valid_from,
        valid_to=found.valid_to,
        review_date=found.review_date,
        logic=found.logic,
        source=found.source,
        triggers=found.triggers,
        note=found.note,
        digest=text.digest,
        file=text.file,
    )


def _require_logic(file: str, logic: Node) -> None:
    if _depth(logic) > LOGIC_DEPTH_MAX:
        raise InvalidInput(
            f"{file}: logic", _depth(logic), f"nest at most {LOGIC_DEPTH_MAX} levels"
        )
    thresholds = sum(isinstance(node, Threshold) for node in nodes(logic))
    if thresholds != 1:
        raise InvalidInput(
            f"{file}: logic", thresholds, "use the instrument's own threshold exactly once"
        )
    names = [node.name for node in nodes(logic) if isinstance(node, Fact)]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(f"{file}: logic", name, "ask for each fact once")


def _depth(logic: Node) -> int:
    if isinstance(logic, AllOf | AnyOf):
        return 1 + max(_depth(part) for part in logic.of)
    return 1


def _require_validity(file: str, found: _InstrumentFile) -> None:
    if found.valid_to is not None and found.valid_to <= found.valid_from:
        raise InvalidInput(
            f"{file}: valid_to", found.valid_to.isoformat(), "end validity after its start"
        )
    if found.status == "revoked" and found.valid_to is None:
        raise InvalidInput(
            f"{file}: valid_to", None, "a revoked instrument says since when it no longer holds"
        )
