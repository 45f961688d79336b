"""The one evaluation: what counts, what is open, what is shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.handle import LedgerHandle
from flopledger_collector.ledger.totals import Line
from flopledger_collector.status import (
    evaluate_ledger,
    evaluate_project,
    load_rules,
)
from flopledger_collector.usage import possible, usage_of
from flopledger_core.bounds import Bounds, total
from flopledger_core.errors import UnknownName
from flopledger_core.flop import Work
from tests.collector.ledgers import budget, declaration, rich_ledger
from tests.collector.opened import opening

RULES = load_rules()
AMOUNTS = st.integers(0, 10**30)


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[LedgerHandle]:
    """The ledger with something of everything."""
    with rich_ledger(tmp_path) as opened:
        yield opened


def line(**changes: object) -> Line:
    """A declared line without amounts."""
    zero = Bounds(low=0, central=0, high=0)
    fields: dict[str, object] = {
        "account": "atlas", "project": "atlas", "kind": "attributed", "model": None, "run": None,
        "activity": "pretrain", "device_name": "", "pci_device_id": None,
        "compute_capability": None, "accelerator": None, "stand_in": False, "tier": "declared",
        "peak_basis": None, "precision": None, "assumed_precision": None,
        "precision_origin": "unknown", "standing": "clear", "simulated": False, "records": 1,
        "sums": {}, "work": Work(), "energy_mj": zero, "energy_boundary": "gpu",
        "cpu_time_ms": None, "host_energy_mj": {}, "first_model_version": None,
        "first_table_version": None, "first_flop": None, "first_unix_ms": 0, "last_unix_ms": 0,
    }  # fmt: skip
    return Line(**(fields | changes))  # type: ignore[arg-type]


def test_one_project_is_evaluated_as_all_are(handle: LedgerHandle) -> None:
    """The status of a project is the same alone and among the others."""
    everything = evaluate_ledger(handle.ledger, RULES)
    assert [one.info.project for one in everything.projects] == ["atlas", "birch", "empty", "stray"]
    for one in everything.projects:
        assert evaluate_project(handle.ledger, RULES, one.info.project) == one


def test_work_of_unknown_owner_is_in_every_high_bound(handle: LedgerHandle) -> None:
    """Two unattributed minutes widen every project upwards and none downwards."""
    everything = evaluate_ledger(handle.ledger, RULES)
    unknown = everything.unattributed.work.flop
    assert unknown.high
    for one in everything.projects:
        assert one.shared.work.flop == Bounds(low=0, central=0, high=unknown.high)
        assert one.flop == one.usage.work.flop + one.shared.work.flop
        assert one.flop.central == one.usage.work.flop.central
        for found in one.policies:
            shared = [item for item in found.view.lines if item.activity == "unattributed"]
            assert [item.contribution for item in shared] == [one.shared.work.flop]


def test_idle_devices_are_nobodys_work(handle: LedgerHandle) -> None:
    """The idle account is shown and enters no project."""
    everything = evaluate_ledger(handle.ledger, RULES)
    assert everything.idle.gpu_time_ms.central == 60_000
    assert not [one for one in everything.projects if "idle" in one.usage.works]


def test_disputed_records_are_only_in_high_bounds(handle: LedgerHandle) -> None:
    """A simulated minute in a real ledger adds to no certain figure."""
    atlas = evaluate_project(handle.ledger, RULES, "atlas")
    disputed = [one for one in atlas.lines if one.standing == "disputed"]
    clear = usage_of(one for one in atlas.lines if one.standing == "clear")
    assert atlas.usage.disputed_records == 1
    assert len(disputed) == 1
    assert atlas.usage.work.flop.low == clear.work.flop.low
    assert atlas.usage.gpu_time_ms.central == clear.gpu_time_ms.central
    assert (atlas.usage.gpu_time_ms.high or 0) == (clear.gpu_time_ms.high or 0) + 60_000


def test_a_project_nobody_opened_is_shown_and_flagged(handle: LedgerHandle) -> None:
    """Usage of an unknown id is never dropped."""
    stray = evaluate_project(handle.ledger, RULES, "stray")
    assert not stray.info.opened
    assert stray.usage.work.flop.central > 0


def test_an_unknown_project_is_an_error_with_its_remedy(handle: LedgerHandle) -> None:
    """The sentence names what exists and how to open what does not."""
    with pytest.raises(UnknownName, match=r"'nope'.*atlas, birch.*flopledger project create"):
        evaluate_project(handle.ledger, RULES, "nope")


def test_declared_work_without_energy_leaves_energy_open(handle: LedgerHandle) -> None:
    """Absent is not zero: 1e25 FLOP took energy, though nobody said how much."""
    birch = evaluate_project(handle.ledger, RULES, "birch")
    assert birch.energy_mj == Bounds(low=0, central=0, high=None)
    assert birch.usage.known("energy_mj", birch.energy_mj) is None
    reason = "energy of the declaration of pretrain work from 2025-11-24 is not stated"
    assert f"{reason}: open upwards" in birch.reasons


def test_an_energy_budget_is_never_below_while_energy_is_open(handle: LedgerHandle) -> None:
    """An undeclared input makes a verdict undecided, never below."""
    handle.entries.post(
        budget("birch", name="power", quantity="energy_mj", limit=str(10**12)),
    )
    handle.folder.fold()
    (found,) = evaluate_project(handle.ledger, RULES, "birch").budgets
    assert found.verdict == "may_exceed"


@pytest.mark.parametrize(
    "stated",
    [
        {"flop_low": "1", "flop_central": "1", "flop_high": "1", "flop_basis": "model"},
        {"gpu_time_ms": "3600000"},
        {"energy_mj": "3600000000"},
        {"cost_cents": "100", "currency": "USD"},
    ],
    ids=["model-flop", "gpu-hours", "energy", "cost"],
)
def test_declared_work_without_executed_flop_is_never_below(
    handle: LedgerHandle, stated: dict[str, str]
) -> None:
    """Absent is not zero: FLOP stays open, the reason names the declaration, nothing is below."""
    silent = {"flop_low": None, "flop_central": None, "flop_high": None}
    handle.entries.post(declaration("empty", **(silent | stated)))
    handle.folder.fold()
    empty = evaluate_project(handle.ledger, RULES, "empty")
    assert empty.usage.work.flop == Bounds(low=0, central=0, high=None)
    assert {one.evaluation.verdict for one in empty.assessments} <= {
        "may_exceed", "undetermined", "not_in_force",
    }  # fmt: skip
    reason = "executed FLOP of the declaration of pretrain work from 2025-11-24 is not stated"
    assert f"{reason}: open upwards" in empty.reasons


def test_a_silent_declaration_is_not_hidden_by_one_that_speaks(handle: LedgerHandle) -> None:
    """Two declarations of one group: FLOP of the first does not answer for the second."""
    silent = {"flop_low": None, "flop_central": None, "flop_high": None}
    handle.entries.post(declaration("empty"))
    handle.entries.post(declaration("empty", **silent, energy_mj="5"))
    handle.folder.fold()
    assert evaluate_project(handle.ledger, RULES, "empty").usage.work.flop.high is None


def test_declared_flop_says_nothing_of_integer_operations(handle: LedgerHandle) -> None:
    """California counts integer operations too: open until they are stated, zero included."""
    small = {"flop_low": "1", "flop_central": "1", "flop_high": "1"}
    handle.entries.post(declaration("empty", **small))
    handle.folder.fold()
    empty = evaluate_project(handle.ledger, RULES, "empty")
    verdicts = {one.instrument.id: one.evaluation.would_be for one in empty.assessments}
    assert verdicts["us-ca-sb53"] == "may_exceed"
    assert verdicts["eu-aia-51-2"] == "below"
    assert [one for one in empty.reasons if one.startswith("integer operations of the decl")]
    handle.entries.post(opening("stated"))
    handle.entries.post(declaration("stated", **small, integer_operations="0"))
    handle.folder.fold()
    stated = evaluate_project(handle.ledger, RULES, "stated")
    assert {one.evaluation.would_be for one in stated.assessments} <= {"below", "undetermined"}


def test_a_cost_budget_is_open_while_usage_has_no_declared_cost(handle: LedgerHandle) -> None:
    """What nobody put a price on did not cost nothing."""
    handle.entries.post(
        budget("empty", name="money", quantity="cost_cents", currency="USD", limit="1000")
    )
    handle.entries.post(declaration("empty", cost_cents="100", currency="USD"))
    handle.folder.fold()
    empty = evaluate_project(handle.ledger, RULES, "empty")  # two minutes belong to nobody
    assert empty.budgets[0].used == Bounds(low=100, central=100, high=None)
    assert empty.budgets[0].verdict == "may_exceed"
    reason = "usage carries no declared cost in USD: what was spent is open upwards"
    assert reason in empty.reasons


def test_what_is_exceeded_is_named(handle: LedgerHandle) -> None:
    """Only what is certain is exceeded: a budget by its low bound."""
    assert evaluate_project(handle.ledger, RULES, "atlas").exceeded == ("compute",)
    assert evaluate_project(handle.ledger, RULES, "birch").exceeded == ()


def test_model_flop_is_never_executed_flop(handle: LedgerHandle) -> None:
    """A declaration by architecture stands apart; what was executed stays open."""
    handle.entries.post(declaration("empty", flop_basis="model"))
    handle.folder.fold()
    empty = evaluate_project(handle.ledger, RULES, "empty")
    assert empty.usage.model_flop.central == 94 * 10**23
    assert empty.usage.work.flop == Bounds(low=0, central=0, high=None)


def test_policies_can_be_chosen(handle: LedgerHandle) -> None:
    """A person may ask for other views; an unknown one is named."""
    found = evaluate_project(handle.ledger, RULES, "atlas", policies=("ec-training",))
    assert [one.view.policy_id for one in found.policies] == ["ec-training"]
    with pytest.raises(UnknownName, match="policy is 'nope'"):
        evaluate_project(handle.ledger, RULES, "atlas", policies=("nope",))
    with pytest.raises(UnknownName, match="policy is 'nope'"):
        load_rules(("nope",))


@given(st.lists(st.tuples(AMOUNTS, AMOUNTS, AMOUNTS, st.booleans()), max_size=6))
def test_usage_adds_up_however_it_is_cut(parts: list[tuple[int, int, int, bool]]) -> None:
    """Sums over lines are the sums of sums, exactly, and possible work has no certain part."""
    lines = [
        line(
            activity="pretrain" if clear else "ablation",
            standing="clear" if clear else "disputed",
            work=Work(flop=Bounds(low=a if clear else 0, central=a if clear else 0, high=a + b)),
            sums={"declared_energy_mj": c, "declared_gpu_time_ms": b},
        )
        for a, b, c, clear in parts
    ]
    whole = usage_of(lines)
    halves = [usage_of(lines[: len(lines) // 2]), usage_of(lines[len(lines) // 2 :])]
    assert whole.work.flop == total(one.work.flop for one in halves)
    assert whole.gpu_time_ms == total(one.gpu_time_ms for one in halves)
    assert whole.records == sum(one.records for one in halves)
    shared = possible(whole)
    assert shared.work.flop == Bounds(low=0, central=0, high=whole.work.flop.high)
    assert shared.gpu_time_ms.central == 0


def test_the_position_of_a_status_is_one_position(handle: LedgerHandle) -> None:
    """All accounts of a status are read at the same heads, also while the fold moves."""

    class Moving:
        """A ledger that is folded between two of its answers."""

        def __init__(self) -> None:
            self.calls = 0
            for name in ("projects", "budgets", "declarations"):
                setattr(self, name, getattr(handle.ledger, name))

        def totals(self, project: str | None = None, **period: int | None) -> object:
            self.calls += 1
            found = handle.ledger.totals(project, **period)
            root = f"{self.calls:064d}"
            position = msgspec.structs.replace(found.position, heads_root=root)
            return msgspec.structs.replace(found, position=position)

    ledger = Moving()
    found = evaluate_project(ledger, RULES, "atlas")  # type: ignore[arg-type]
    assert found.usage == evaluate_project(handle.ledger, RULES, "atlas").usage
    assert found.position.heads_root == f"{ledger.calls:064d}"
