"""Usage of nodes themselves: folded exactly, never twice, and never as FLOP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flopledger_collector.reports.markdown import statement_markdown
from flopledger_collector.reports.statement import build_statement
from flopledger_collector.status import evaluate_ledger, evaluate_project, load_rules
from flopledger_collector.usage import CPU_FLOP_ABSENT
from flopledger_core.bounds import Bounds, total
from flopledger_core.identity import UNATTRIBUTED_OWNER
from tests.collector.ledgers import budget
from tests.collector.opened import folded, opened, outcomes, send
from tests.collector.sealing import (
    IDLE,
    MINUTE_MS,
    START_UNIX_MS,
    StreamSealer,
    host,
    hosts,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle

RULES = load_rules()
CPU_MS = 4 * MINUTE_MS  # of the node, a minute


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerHandle]:
    """An empty ledger."""
    with opened(tmp_path) as handle:
        yield handle


def _standings(handle: LedgerHandle) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in folded(handle).lines:
        counts[line.standing] = counts.get(line.standing, 0) + line.records
    return counts


def test_cpu_time_of_all_owners_is_what_the_node_had(ledger: LedgerHandle) -> None:
    """Each owner's in its own account, `idle` among them; nothing lost, nothing doubled."""
    sealer = StreamSealer()
    owners = [project_owner(), project_owner("birch"), UNATTRIBUTED_OWNER]
    for minute, owner in enumerate(owners):
        outcomes(ledger, sealer.seal(hosts(minute, owner=owner)))
    lines = {line.account: line for line in folded(ledger).lines}
    assert set(lines) == {"atlas", "birch", "unattributed", "idle"}
    assert all(line.is_host and line.device_name == "" for line in lines.values())
    known = total(line.cpu_time_ms for line in lines.values() if line.cpu_time_ms is not None)
    assert known == Bounds(low=3 * CPU_MS, central=3 * CPU_MS, high=3 * CPU_MS)
    assert lines["idle"].host_energy_mj["node"].central == 3 * 700 * MINUTE_MS
    assert "dram" not in lines["idle"].host_energy_mj  # nobody read it: absent, not zero


def test_a_nodes_own_usage_is_no_flop_and_no_gpu_time(ledger: LedgerHandle) -> None:
    """Absent with its reason; CPU-seconds and energy stand beside, by boundary."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.seal(hosts(0)))
    folded(ledger)
    status = evaluate_project(ledger.ledger, RULES, "atlas")
    own = status.usage
    assert own.works == {}
    for quantity, amount in (
        ("flop", own.work.flop), ("energy_mj", own.energy_mj), ("gpu_time_ms", own.gpu_time_ms),
    ):  # fmt: skip
        assert own.known(quantity, amount) is None, quantity
    assert own.known_cpu_time == Bounds(low=120_000, central=120_000, high=120_000)
    energy = 90 * MINUTE_MS  # cut by a rule: nothing to all of it
    assert own.energy_by_boundary["cpu_package"].central == energy
    assert own.energy_by_boundary["cpu_package"].low == 0
    assert (own.energy_by_boundary["cpu_package"].high or 0) >= 2 * energy
    assert list(own.energy_by_boundary) == ["cpu_package", "node"]
    assert any(CPU_FLOP_ABSENT in reason for reason in status.reasons)


def test_cpu_time_of_unknown_owner_is_in_every_high_bound(ledger: LedgerHandle) -> None:
    """As GPU work is; idle CPU time is nobody's."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.seal(hosts(0)), sealer.seal(hosts(1, owner=UNATTRIBUTED_OWNER)))
    folded(ledger)
    everything = evaluate_ledger(ledger.ledger, RULES)
    (atlas,) = everything.projects
    assert atlas.known_cpu_time == Bounds(low=120_000, central=120_000, high=240_000)
    assert everything.idle.known_cpu_time == Bounds(low=240_000, central=240_000, high=240_000)


@pytest.mark.parametrize("in_one_request", [True, False])
def test_a_nodes_minute_counts_once(tmp_path: Path, in_one_request: bool) -> None:
    """A minute that overlaps one before is disputed whatever its owner; so it stays rebuilt."""
    with opened(tmp_path) as ledger:
        sealer = StreamSealer()
        batches = [
            sealer.seal(hosts(0)),
            sealer.seal(hosts(0, owner=project_owner("birch"))),
            sealer.seal(hosts(1)),
        ]
        if in_one_request:
            send(ledger, *batches)
        else:
            for batch in batches:
                send(ledger, batch)
        assert _standings(ledger) == {"clear": 4, "disputed": 2}
        ledger.rebuild()
        assert _standings(ledger) == {"clear": 4, "disputed": 2}
        half = MINUTE_MS // 2
        late = hosts(1, start_boot_ms=1_000 + MINUTE_MS + half)
        outcomes(ledger, sealer.seal(late))
        assert _standings(ledger) == {"clear": 4, "disputed": 4}


def test_two_streams_of_one_node_dispute_each_other(ledger: LedgerHandle) -> None:
    """A second agent of the same boot; another boot, another node, and GPUs beside are clear."""
    outcomes(ledger, StreamSealer(1).seal([*hosts(0), usage(0)]))
    outcomes(ledger, StreamSealer(2).seal(hosts(0)))
    assert _standings(ledger) == {"clear": 3, "disputed": 2}
    outcomes(ledger, StreamSealer(3, node="node-2").seal(hosts(0)))
    outcomes(ledger, StreamSealer(4, boot_id="boot-2").seal(hosts(0)))
    assert _standings(ledger) == {"clear": 7, "disputed": 2}


def test_a_window_of_an_earlier_boot_is_clear(ledger: LedgerHandle) -> None:
    """Sealed under the new boot's id, without a boot time; the new boot begins behind it."""
    sealer = StreamSealer()
    outcomes(
        ledger,
        sealer.seal(hosts(50)),
        sealer.seal(hosts(51, start_boot_ms=None), boot_id="boot-2"),
        sealer.seal(hosts(52, start_boot_ms=5), boot_id="boot-2"),
    )
    assert _standings(ledger) == {"clear": 6}


def test_what_a_record_could_not_read_is_open(ledger: LedgerHandle) -> None:
    """One minute without CPU time and package energy: limited by the CPUs there were, or open."""
    sealer = StreamSealer()
    blind = host(
        1, cpu_time_ms=None, energy_mj={"node": 5}, energy_sources={"node": "ipmi"},
        absent={"cpu_time": "unreadable", "flop": CPU_FLOP_ABSENT},
    )  # fmt: skip
    outcomes(ledger, sealer.seal(hosts(0)), sealer.seal([blind]))
    (line,) = folded(ledger, "atlas").lines
    assert line.cpu_time_ms == Bounds(low=120_000, central=120_000, high=120_000 + CPU_MS)
    assert line.host_energy_mj["cpu_package"].high is None
    assert line.host_energy_mj["node"].high is not None


def test_dark_time_of_a_node_could_have_been_anybodys(ledger: LedgerHandle) -> None:
    """Between two boots nobody read anything: in every high bound, and in no figure as zero."""
    dark = host(
        1, owner=UNATTRIBUTED_OWNER, start_boot_ms=None, cpu_time_ms=None, energy_mj={},
        energy_sources={}, absent={"cpu_time": "node_restarted"}, flags=(),
    )  # fmt: skip
    sealer = StreamSealer()
    outcomes(ledger, sealer.seal(hosts(0)), sealer.seal([dark], boot_id="boot-2"))
    folded(ledger)
    everything = evaluate_ledger(ledger.ledger, RULES)
    (atlas,) = everything.projects
    assert everything.unattributed.known_cpu_time is None
    assert atlas.known_cpu_time == Bounds(low=120_000, central=120_000, high=120_000 + CPU_MS)
    assert atlas.usage.energy_by_boundary["node"].high is not None
    assert atlas.energy_by_boundary["node"].high is None


def test_disputed_usage_of_a_node_is_only_in_high(ledger: LedgerHandle) -> None:
    """CPU time that does not add up to the node's."""
    outcomes(ledger, StreamSealer().seal([host(0), host(0, owner=IDLE, cpu_time_ms=7)]))
    (line,) = folded(ledger, "atlas").lines
    assert (line.standing, line.cpu_time_ms) == ("disputed", Bounds(low=0, central=0, high=120_000))
    assert line.host_energy_mj["node"].central == 0
    assert line.host_energy_mj["node"].high
    assert line.first_unix_ms == START_UNIX_MS


def test_a_statement_names_disputed_usage_of_nodes(ledger: LedgerHandle) -> None:
    """By the item's number, with CPU time and not with FLOP that nodes do not have."""
    outcomes(ledger, StreamSealer().seal([host(0), host(0, owner=IDLE, cpu_time_ms=7)]))
    folded(ledger)
    found = build_statement(ledger.ledger, RULES, "atlas", generated_unix_ms=START_UNIX_MS)
    assert [item.number for item in found.disputed] == [1]
    text = statement_markdown(found)
    assert "Item 1: 1 disputed record; CPU-seconds 0" in text
    assert "Energy, kWh (node; metered nodes)" in text  # of other nodes nothing is said


def test_energy_of_nodes_is_in_no_budget(ledger: LedgerHandle) -> None:
    """A budget of energy counts devices, and says so beside the usage of a node."""
    outcomes(ledger, StreamSealer().seal(hosts(0)))
    ledger.entries.post(budget(name="power", quantity="energy_mj", limit="1"))
    folded(ledger)
    status = evaluate_project(ledger.ledger, RULES, "atlas")
    (power,) = status.budgets
    assert (power.used, power.verdict) == (Bounds(low=0, central=0, high=0), "below")
    assert any("not that of their nodes" in reason for reason in status.reasons)
    found = build_statement(ledger.ledger, RULES, "atlas", generated_unix_ms=START_UNIX_MS)
    assert set(status.reasons) <= set(found.reasons)
