"""Admission: what is journaled, what is refused, and that no refusal ever moves a total."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flopledger_collector import ingest
from flopledger_collector.errors import RequestRefused
from flopledger_core.records import BudgetSet
from flopledger_core.units import UNIX_MS_MAX
from tests.collector.opened import amounts, folded, opened, outcomes, send
from tests.collector.sealing import (
    ELAPSED_PER_MINUTE,
    MINUTE_MS,
    START_UNIX_MS,
    StreamSealer,
    TestClock,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerHandle]:
    """An empty ledger."""
    with opened(tmp_path) as handle:
        yield handle


# --- idempotence, order, links --------------------------------------------------------------------


def test_the_same_bytes_again_are_a_duplicate_and_change_nothing(ledger: LedgerHandle) -> None:
    """An agent that missed its answer sends again."""
    batch = StreamSealer().minute(0)
    assert outcomes(ledger, batch) == ["admitted"]
    before = amounts(ledger)

    assert outcomes(ledger, batch, batch) == ["duplicate", "duplicate"]
    assert amounts(ledger) == before


def test_duplicates_within_one_request_are_admitted_once(ledger: LedgerHandle) -> None:
    """A relay may bundle the same batch twice."""
    batch = StreamSealer().minute(0)

    assert outcomes(ledger, batch, batch) == ["admitted", "duplicate"]
    assert folded(ledger).position.entries == 1


def test_other_bytes_at_a_journaled_place_conflict_and_are_audited_once(
    ledger: LedgerHandle,
) -> None:
    """A cloned key shows as two contents for one place."""
    sealer = StreamSealer()
    other = sealer.peek([usage(0, busy_per_mille=100)])
    outcomes(ledger, sealer.minute(0))
    before = amounts(ledger)

    assert outcomes(ledger, other) == ["conflict"]
    assert outcomes(ledger, other) == ["conflict"]
    assert amounts(ledger) == before
    health = ledger.ledger.health()
    assert health.audit_counts == {"conflict": 1}
    assert health.conflict_entries == 1


def test_a_batch_ahead_of_its_stream_says_what_is_expected(ledger: LedgerHandle) -> None:
    """The agent learns where to continue."""
    sealer = StreamSealer()
    first, second, third = (sealer.minute(minute) for minute in range(3))

    (answer,) = send(ledger, second)
    assert (answer.outcome, answer.expected_sequence) == ("out_of_order", 0)
    assert outcomes(ledger, first, third) == ["admitted", "out_of_order"]
    assert outcomes(ledger, second, third) == ["admitted", "admitted"]


def test_a_wrong_link_is_a_conflict(ledger: LedgerHandle) -> None:
    """The next place, but not after this head."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.minute(0))
    before = amounts(ledger)

    (answer,) = send(ledger, sealer.peek([usage(1)], previous_hash="ab" * 32))
    assert answer.outcome == "conflict"
    assert "header.previous_hash" in answer.message
    assert amounts(ledger) == before
    assert ledger.ledger.health().audit_counts == {"wrong_link": 1}


def test_a_backlog_in_one_request_is_admitted_in_order(ledger: LedgerHandle) -> None:
    """An agent that was cut off sends hours at once, two streams mixed."""
    one, two = StreamSealer(1), StreamSealer(2, node="node-2")
    batches = [sealer.minute(minute) for minute in range(40) for sealer in (one, two)]

    assert set(outcomes(ledger, *batches)) == {"admitted"}
    assert folded(ledger).position.entries == 80


# --- hostile input --------------------------------------------------------------------------------


def _spoiled(find: bytes, put: bytes) -> bytes:
    """A batch with some of its sealed bytes exchanged."""
    batch = StreamSealer().minute(0, gpus=1)
    assert find in batch
    return batch.replace(find, put, 1)


def _resealed(**changes: Any) -> bytes:
    """A batch whose author sealed something the schema does not allow."""
    return StreamSealer().peek([usage(0, 0)], **changes)


def _record_time(start_unix_ms: int) -> bytes:
    find = b'"start_unix_ms":%d,"start_boot' % START_UNIX_MS
    return _spoiled(find, b'"start_unix_ms":%d,"start_boot' % start_unix_ms)


def _with_record(**changes: Any) -> bytes:
    return StreamSealer().peek([usage(0, 0, **changes)])


HOSTILE: dict[str, tuple[bytes, str]] = {
    "truncated in the header": (StreamSealer().minute(0)[:90], "header"),
    "truncated in a leaf": (StreamSealer().minute(0)[:-40], "leaf 7"),
    "truncated at a line": (StreamSealer().minute(0, gpus=2).rsplit(b"\n", 2)[0] + b"\n", "leaf 1"),
    "no batch at all": (b"hello\n", "header"),
    "bytes that are no text": (b"\xff\xfe\x00\n", "header"),
    "deep nesting": (b"[" * 100_000 + b"\n", "header"),
    "an endless line": (b" " * (2 * 1024 * 1024 + 1), "header"),
    "a schema version to come": (_spoiled(b'"schema_version":1', b'"schema_version":2'), "version"),
    "an unknown field": (_spoiled(b'{"schema_version"', b'{"x":1,"schema_version"'), "x"),
    "a sequence that is text": (_spoiled(b'"sequence":0', b'"sequence":"0"'), "sequence"),
    "a negative sequence": (_spoiled(b'"sequence":0', b'"sequence":-1'), "sequence"),
    "a fraction": (_spoiled(b'"gpu_time_ms":60000,"all', b'"gpu_time_ms":6e4,"all'), "gpu_time_ms"),
    "NaN": (_spoiled(b'"energy_mj":36000000,"energy_o', b'"energy_mj":NaN,"energy_o'), "leaf 0"),
    "negative energy": (_with_record(energy_mj=-1), "energy_mj"),
    "negative cycles": (_spoiled(b'"elapsed":', b'"elapsed":-'), "elapsed"),
    "more than 64 bits": (_with_record(energy_mj=2**63), "energy_mj"),
    "a time before 1970": (_record_time(-1), "start_unix_ms"),
    "a time after 9999": (
        _spoiled(
            b'"window_end_unix_ms":%d' % (START_UNIX_MS + MINUTE_MS),
            b'"window_end_unix_ms":%d' % (UNIX_MS_MAX + 1),
        ),
        "window_end_unix_ms",
    ),
    "a record that ends after 9999": (_record_time(UNIX_MS_MAX - 1), "start_unix_ms"),
    "an unknown activity": (_spoiled(b'"activity":"pretrain"', b'"activity":"mining"'), "activity"),
    "a project that is no id": (_spoiled(b'"project":"atlas"', b'"project":"<b>"'), "project"),
    "an account of the ledger": (_spoiled(b'"project":"atlas"', b'"project":"idle"'), "project"),
    "an unknown flag": (_spoiled(b'"flags":[]', b'"flags":["x"]'), "flags"),
    "a name nobody committed to": (
        _spoiled(b'"names":null', b'"names":{"salt":"%s","user":"eve"}' % (b"0" * 32)),
        "names",
    ),
    "a record changed after sealing": (_spoiled(b"GPU-node-1-0", b"GPU-node-1-9"), "merkle_root"),
    "a manifest that does not add up": (_resealed(manifest=()), "manifest"),
    "another record count": (_resealed(record_count=0), "header"),
    "a header changed after signing": (_spoiled(b'"boot-1"', b'"boot-2"'), "signature"),
    "a signature of another key": (
        _spoiled(
            b'"signature":"',
            b'"signature":"' + base64.b64encode(b"\x01" * 64)[:-2] + b'==","old":"',
        ),
        "signature",
    ),
    "a key that is no key": (
        _resealed().replace(b'"public_key":"', b'"public_key":"!', 1),
        "public_key",
    ),
    "spaces between fields": (
        _spoiled(b'{"schema_version":1,', b'{"schema_version":1, '),
        "header",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_with_a_sentence_naming_the_field(
    name: str, ledger: LedgerHandle
) -> None:
    """The ledger stands, its totals are unchanged, and the next honest batch is admitted."""
    honest = StreamSealer(9, node="node-9")
    outcomes(ledger, honest.minute(0))
    before = amounts(ledger)
    content, field = HOSTILE[name]

    answers = send(ledger, content)

    assert {answer.outcome for answer in answers} == {"refused"}
    assert field in answers[0].message, answers[0].message
    assert len(answers[0].message) < 1_000
    assert "\n" not in answers[0].message
    assert amounts(ledger) == before
    assert outcomes(ledger, honest.minute(1)) == ["admitted"]


def test_a_signature_over_other_bytes_is_refused(ledger: LedgerHandle) -> None:
    """The signature line of one batch under the header of another."""
    sealer = StreamSealer()
    one, two = sealer.peek([usage(0)]), sealer.peek([usage(0, busy_per_mille=10)])
    lines = one.split(b"\n")
    lines[1] = two.split(b"\n")[1]

    (answer,) = send(ledger, b"\n".join(lines))
    assert answer.outcome == "refused"
    assert answer.message.startswith("signature")


def test_a_broken_tail_does_not_cost_the_batches_before_it(ledger: LedgerHandle) -> None:
    """One answer per batch, and one for what could not be cut apart."""
    sealer = StreamSealer()
    whole, torn = sealer.minute(0), sealer.minute(1)[:-10]

    first, second = send(ledger, whole, torn)
    assert first.outcome == "admitted"
    assert (second.outcome, second.stream_id) == ("refused", None)


@pytest.mark.parametrize(
    ("content", "kind", "field"),
    [
        (b"", "malformed", "body"),
        (b" " * (ingest.REQUEST_BYTES_MAX + 1), "too_large", "body"),
    ],
)
def test_a_request_out_of_bounds_is_refused_whole(
    content: bytes, kind: str, field: str, ledger: LedgerHandle
) -> None:
    """Nothing of it is looked at."""
    with pytest.raises(RequestRefused) as refusal:
        send(ledger, content)
    assert (refusal.value.kind, refusal.value.field) == (kind, field)


def test_too_many_batches_in_a_request_are_refused_whole(
    ledger: LedgerHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction stays short."""
    monkeypatch.setattr(ingest, "BATCHES_PER_REQUEST_MAX", 2)
    sealer = StreamSealer()

    with pytest.raises(RequestRefused, match="batches is"):
        send(ledger, *(sealer.minute(minute, gpus=1) for minute in range(3)))
    assert folded(ledger).position.entries == 0


# --- trust ----------------------------------------------------------------------------------------


def test_an_unknown_key_from_elsewhere_is_refused_with_the_remedy(ledger: LedgerHandle) -> None:
    """Loopback trusts on first use; a network does not."""
    sealer = StreamSealer()
    (answer,) = send(ledger, sealer.peek([usage(0)]), loopback=False)

    assert answer.outcome == "refused"
    assert sealer.key.public_key in answer.message
    assert "[trust] keys" in answer.message
    assert outcomes(ledger, sealer.minute(0)) == ["admitted"]
    assert outcomes(ledger, sealer.minute(1), loopback=False) == ["admitted"]


@pytest.mark.parametrize(
    "more", ['[trust]\nfirst_use = "never"', '[web]\nlisten_address = "0.0.0.0:16180"']
)
def test_first_use_needs_the_configuration_and_a_server_on_loopback(
    more: str, tmp_path: Path
) -> None:
    """Behind a proxy every peer looks like loopback."""
    with opened(tmp_path, more) as handle:
        assert outcomes(handle, StreamSealer().minute(0)) == ["refused"]


def test_a_listed_key_is_trusted_and_revoked_once_it_is_no_longer_listed(tmp_path: Path) -> None:
    """The configuration decides, at every start anew."""
    sealer = StreamSealer()
    listed = f'[trust]\nfirst_use = "never"\nkeys = [{{public_key = "{sealer.key.public_key}"}}]'
    with opened(tmp_path, listed) as handle:
        assert outcomes(handle, sealer.minute(0), loopback=False) == ["admitted"]
    with opened(tmp_path) as handle:
        (answer,) = send(handle, sealer.minute(1))
        assert answer.outcome == "refused"
        assert "revoked" in answer.message
    with opened(tmp_path, listed) as handle:
        sealer.sequence, sealer.head_hash = 1, handle_head(handle)
        assert outcomes(handle, sealer.minute(1), loopback=False) == ["admitted"]


def handle_head(handle: LedgerHandle) -> str:
    """The head hash of the only stream."""
    with handle.database.writing() as writing:
        return writing.journal.streams([f"{1:032x}"])[f"{1:032x}"].head_hash


def test_another_ledgers_batch_is_refused_and_audited(ledger: LedgerHandle) -> None:
    """A node moved between collectors must not count twice."""
    (answer,) = send(ledger, StreamSealer().peek([usage(0)], ledger_id="cd" * 16))

    assert answer.outcome == "refused"
    assert "header.ledger_id" in answer.message
    assert ledger.ledger.health().audit_counts == {"other_ledger": 1}
    own = StreamSealer(ledger_id=ledger.ledger_id)
    assert outcomes(ledger, own.minute(0)) == ["admitted"]


def test_a_stream_is_written_by_its_own_key_only(ledger: LedgerHandle) -> None:
    """Even a trusted key writes only its own streams."""
    outcomes(ledger, StreamSealer(1).minute(0))
    thief = StreamSealer(2, stream_id=f"{1:032x}")
    before = amounts(ledger)

    (answer,) = send(ledger, thief.peek([usage(0)]))
    assert answer.outcome == "refused"
    assert "header.stream_id" in answer.message
    assert amounts(ledger) == before


def test_an_agents_key_cannot_speak_for_people(ledger: LedgerHandle) -> None:
    """Budgets and declarations come from the collector's own key."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.minute(0))
    budget = BudgetSet(
        project="atlas", name="b", quantity="flop", currency=None, limit="1",
        at_unix_ms=START_UNIX_MS, author="eve",
    )  # fmt: skip

    (answer,) = send(ledger, sealer.peek([budget], author="collector"))
    assert answer.outcome == "refused"
    assert "header.author" in answer.message
    assert outcomes(ledger, sealer.seal([budget])) == ["admitted"]
    folded(ledger)
    assert ledger.ledger.budgets() == ()


# --- authentic but impossible ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"energy_mj": 10**12},
        {"gpu_time_ms": MINUTE_MS - 1},
        {"start_boot_ms": 0, "end_boot_ms": 0},
        {
            "cycles": msgspec.structs.replace(
                usage().cycles, elapsed=20 * ELAPSED_PER_MINUTE, any_tensor=19 * ELAPSED_PER_MINUTE
            )
        },
        {"cycles": msgspec.structs.replace(usage().cycles, fp32=2 * ELAPSED_PER_MINUTE)},
    ],
    ids=["energy", "tiling", "window", "clock", "active"],
)
def test_an_impossible_record_is_journaled_and_disputed(
    changes: dict[str, Any], ledger: LedgerHandle
) -> None:
    """Out of central and low, in high, and the honest record beside it stays clear."""
    sealer = StreamSealer()
    batch = sealer.seal([usage(0, 0), usage(0, 1, **changes)])

    assert outcomes(ledger, batch) == ["admitted"]
    lines = {line.standing: line for line in folded(ledger, "atlas").lines}

    assert set(lines) == {"clear", "disputed"}
    assert lines["clear"].records == lines["disputed"].records == 1
    disputed = lines["disputed"].work.flop
    assert (disputed.low, disputed.central) == (0, 0)
    assert disputed.high is not None
    assert disputed.high > 0
    assert lines["disputed"].energy_mj.central == 0
    assert ledger.ledger.health().disputed_records == 1


def test_simulated_batches_are_disputed_unless_the_ledger_is_a_demonstration(
    tmp_path: Path,
) -> None:
    """A demonstration's FLOP never enters a real total."""
    for simulated, standing in ((False, "disputed"), (True, "clear")):
        more = f"[ledger]\nsimulated = {str(simulated).lower()}"
        with opened(tmp_path / standing, more) as handle:
            assert outcomes(handle, StreamSealer(simulated=True).minute(0)) == ["admitted"]
            (line,) = folded(handle).lines
            assert (line.standing, line.simulated) == (standing, True)


def test_a_device_in_two_streams_at_once_is_disputed_in_the_second(ledger: LedgerHandle) -> None:
    """The first keeps counting; the second counts once the first has ended."""
    first, second = StreamSealer(1), StreamSealer(2)
    outcomes(ledger, *(first.minute(minute, gpus=1) for minute in range(3)))

    assert outcomes(ledger, second.minute(1, gpus=1), second.minute(3, gpus=1)) == ["admitted"] * 2
    assert outcomes(ledger, first.minute(4, gpus=1)) == ["admitted"]
    counts = {line.standing: line.records for line in folded(ledger).lines}
    assert counts == {"clear": 5, "disputed": 1}


def test_an_old_streams_backlog_of_its_own_time_is_clear(ledger: LedgerHandle) -> None:
    """A device that moved on meanwhile was held by nobody else then."""
    old, new = StreamSealer(1), StreamSealer(2)
    late = old.minute(0, gpus=1)
    outcomes(ledger, new.minute(5, gpus=1))

    outcomes(ledger, late)
    assert {line.standing for line in folded(ledger).lines} == {"clear"}


def test_a_node_clock_ahead_is_flagged_but_not_disputed(tmp_path: Path) -> None:
    """Wall time places a record and never decides about it."""
    with opened(tmp_path, clock=TestClock(START_UNIX_MS)) as handle:
        assert outcomes(handle, StreamSealer().minute(60)) == ["admitted"]
        with handle.database.reading() as reading:
            (entry,) = reading.unfolded(1)
        assert "clock_skew" in entry.findings
        assert {line.standing for line in folded(handle).lines} == {"clear"}


def test_an_unknown_project_is_admitted_and_flagged(ledger: LedgerHandle) -> None:
    """Never dropped; a person opens it later."""
    owner = project_owner("nobody-opened-this")
    outcomes(ledger, StreamSealer().minute(0, owner=owner))
    folded(ledger)

    (project,) = ledger.ledger.projects()
    assert (project.project, project.opened) == ("nobody-opened-this", False)
    assert project.first_unix_ms == START_UNIX_MS
    assert project.last_unix_ms == START_UNIX_MS + MINUTE_MS
