"""Each device is metered by the best source it has now; what cannot be believed is not used."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec
import pytest

from flopledger_agent.config import DcgmSection
from flopledger_agent.gpus.ladder import Freshness, LadderSource, freshness_of, over
from flopledger_agent.gpus.nvml_errors import remedy_for
from flopledger_core.records import Cycles, Slices
from tests.agent.gpus.exporter import ENERGY, ENGINE, SM_ACTIVE, TENSOR, UTIL, golden, render
from tests.agent.gpus.rungs import A100, FRESH, TABLE, Rung, coarse
from tests.agent.sampling import SECOND_NS, node


def page(tensor: object = 0.5, energy: object = 0, **more: object) -> str:
    """A page of the A100 with a tensor ratio; `more` by metric."""
    values = {TENSOR: tensor, ENERGY: energy, **more}
    return render({metric: {A100.uuid: value} for metric, value in values.items()})


# --- which tier ----------------------------------------------------------------------------------


def test_a_tensor_ratio_makes_the_pipes_tier() -> None:
    """Ratios take the place of the coarse share; the rest of the sample stays the driver's."""
    rung = Rung()
    before = rung.one()
    rung.exporter.show(golden("a100-default-fields"), "gpu-node-17")
    after = rung.one(power_mw=400_000, processes=(7,))

    assert (before.tier, before.absent["dcgm"]) == ("gpu_util", "dcgm_not_asked_yet")
    assert after.tier == "dcgm_pipes"
    assert after.utilization == {"any_tensor": Fraction(0.929260)}
    assert after.cycles is None
    assert (after.sm_clock_khz, after.power_mw, after.processes) == (1_410_000, 400_000, (7,))
    assert after.absent == {
        "cycles": "gpm_not_supported",
        "utilization.others": "dcgm_not_exported",
    }


def test_only_sm_active_makes_its_own_tier() -> None:
    """Without a tensor ratio the next rung down, and it says what is missing."""
    rung = Rung()
    rung.exporter.show(page(float("nan"), **{SM_ACTIVE: 0.75}))
    found = rung.one()

    assert (found.tier, found.utilization) == ("sm_active", {"sm_active": Fraction(3, 4)})
    assert found.absent["utilization.any_tensor"] == "not_a_number"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (page(float("nan")), "not_a_number"),
        (page(140737488355329.0), "not_found"),
        (page(1.29), "out_of_range"),
        (render({UTIL: {A100.uuid: 100}}), "dcgm_not_exported"),
        (render({TENSOR: {"GPU-other": 0.5}}), "dcgm_device_not_on_page"),
        (render({TENSOR: {f"{A100.uuid}/3": 0.5}}), "dcgm_device_not_on_page"),
        (golden("two-hosts").replace("gpu-node-18.example.org", "node-1"), "dcgm_other_hosts_only"),
    ],
)
def test_what_cannot_be_used_leaves_the_drivers_sample_and_says_why(text: str, reason: str) -> None:
    """The driver's own tier stands, untouched but for the reason, which has a remedy."""
    rung = Rung()
    rung.exporter.show(text)
    found = rung.one()

    assert found == coarse(rung.clock, absent={"cycles": "gpm_not_supported", "dcgm": reason})
    assert remedy_for(reason) is not None


def test_better_tiers_are_left_alone() -> None:
    """Cycles and GPM's own ratios are not improved, nor is a sample that begins counting."""
    rung = Rung()
    rung.exporter.show(page())
    cycles = Cycles(elapsed=1, any_tensor=0)
    better: tuple[dict[str, Any], ...] = (
        {"tier": "gpm_cycles", "cycles": cycles, "utilization": None, "absent": {}},
        {"tier": "gpm_util", "utilization": {"any_tensor": Fraction(1)}},
        {"tier": "gpu_util", "cycles": cycles},
    )
    for fields in better:
        assert rung.one(**fields) == coarse(rung.clock, **fields)


def test_the_exporters_clock_serves_where_the_driver_tells_none() -> None:
    """Without any clock a ratio is no cycles, and stays unused."""
    rung = Rung()
    missing = {"cycles": "gpm_not_supported", "sm_clock_khz": "not_supported"}
    rung.exporter.show(page())
    assert rung.one(sm_clock_khz=None, absent=missing).absent["dcgm"] == "no_sm_clock_or_count"
    rung.exporter.show(page(0.25, DCGM_FI_DEV_SM_CLOCK=1215))
    found = rung.one(sm_clock_khz=None, absent=missing)
    assert (found.tier, found.sm_clock_khz) == ("dcgm_pipes", 1_215_000)
    assert "sm_clock_khz" not in found.absent
    assert rung.one(device=msgspec.structs.replace(A100, sm_count=None)).tier == "gpu_util"


def test_instances_get_their_own_series_and_unused_slices_none() -> None:
    """By the GPU instance's id; the whole GPU's series is nobody's part."""
    rung = Rung()
    rung.exporter.show(golden("a100-instances"), "gpu-node-17")
    part = Slices(first_index=0, count=1, of_count=7)
    one, other, rest = (
        msgspec.structs.replace(A100, gpu_instance=instance, slices=part)
        for instance in (13, 2, None)
    )
    nothing: dict[str, Any] = {"tier": "none", "utilization": None}
    found = rung.tick(
        *(coarse(rung.clock, device, **nothing) for device in (one, other, rest))
    ).samples

    assert [sample.tier for sample in found] == ["dcgm_pipes", "dcgm_pipes", "none"]
    assert found[0].utilization == {
        "any_tensor": Fraction(0.930433),
        "sm_active": Fraction(0.990100),
    }
    assert found[1].absent["utilization.sm_active"] == "out_of_range"
    assert "dcgm" not in found[2].absent


# --- what is not believed ------------------------------------------------------------------------


def test_peers_row_2_profiling_that_reads_zero_while_the_gpu_works_is_not_believed() -> None:
    """NVIDIA/DCGM#303: after Xid 31 the fields are zero until DCGM restarts."""
    rung = Rung()
    rung.exporter.show(golden("a100-default-fields"), "gpu-node-17")
    assert rung.one().tier == "dcgm_pipes"
    rung.exporter.show(golden("a100-after-xid-31"), "gpu-node-17")
    found = rung.one()
    assert (found.tier, found.absent["dcgm"]) == ("gpu_util", "dcgm_contradicts_gpu_util")
    assert found.utilization == {"sm_active": Fraction(1)}
    rung.exporter.show(golden("a100-default-fields"), "gpu-node-17")
    assert rung.one().tier == "dcgm_pipes"


def test_zeros_of_a_gpu_in_some_use_are_not_believed_twice() -> None:
    """The two are not of the same second, so a little use needs a second page."""
    rung = Rung()
    tiers = []
    for energy, used in enumerate((30, 30, 0, 30)):
        rung.exporter.show(page(0.0, energy, **{ENGINE: 0.0, UTIL: used}))
        tiers.append(rung.one().tier)
    assert tiers == ["dcgm_pipes", "gpu_util", "dcgm_pipes", "dcgm_pipes"]


def test_a_gpu_that_works_without_tensors_is_believed() -> None:
    """The engine is a witness that profiling sees something; an idle GPU's zeros are zeros."""
    rung = Rung()
    for look, engine, used in ((1, 0.99, 100), (2, 0.99, 100), (3, 0.0, 0), (4, 0.0, 0)):
        rung.exporter.show(page(0.0, look, **{ENGINE: engine, UTIL: used}))
        found = rung.one()
        assert (found.tier, found.utilization) == ("dcgm_pipes", {"any_tensor": Fraction(0)})


def test_peers_row_8_figures_that_stand_still_are_stale() -> None:
    """Served with success and never changed: after three of its intervals a page is old."""
    rung = Rung()
    tiers = {}
    for at in range(0, 200, 10):
        if at < 150:
            rung.exporter.show(page(0.5))
        else:
            rung.exporter.show(page(0.5 + at / 1000))
        (found,) = rung.tick(seconds=10).samples
        tiers[at] = (found.tier, found.absent.get("dcgm"))
    assert all(tiers[at] == ("dcgm_pipes", None) for at in range(0, 90, 10))
    assert all(tiers[at] == ("gpu_util", "dcgm_stale") for at in range(90, 150, 10))
    assert all(tiers[at] == ("dcgm_pipes", None) for at in range(150, 200, 10))


def test_an_exporter_that_is_gone_is_left_and_taken_again() -> None:
    """Its last page serves for three of our intervals; then the driver's tier with the reason."""
    rung = Rung()
    rung.exporter.show(page())
    rung.exporter.fail("dcgm_unreachable")
    assert rung.tick(seconds=29).samples[0].tier == "dcgm_pipes"
    (found,) = rung.tick(seconds=2).samples
    assert (found.tier, found.absent["dcgm"]) == ("gpu_util", "dcgm_unreachable")
    rung.exporter.show(page(0.25))
    assert rung.tick().samples[0].tier == "dcgm_pipes"


def test_the_multiples_are_those_of_the_configured_intervals() -> None:
    """Three of ours for a page, three of the exporter's for its figures."""
    assert freshness_of(DcgmSection()) == FRESH
    assert freshness_of(DcgmSection(interval_seconds=60, exporter_interval_seconds=1)) == Freshness(
        fetched_ns=180 * SECOND_NS, looked_ns=180 * SECOND_NS
    )


def test_without_an_exporter_there_is_no_ladder() -> None:
    """Nobody is asked for anything unless it is configured."""
    rung = Rung()
    assert over(rung, None, rung.clock, TABLE, "node-1") is rung
    assert isinstance(over(rung, DcgmSection(), rung.clock, TABLE, "node-1"), LadderSource)


def test_pausing_and_closing_reach_the_driver() -> None:
    """And the exporter is asked no more once closed; what retires is forgotten."""
    rung = Rung()
    rung.exporter.show(page())
    rung.one()
    assert rung.ladder._rungs
    rung.driver = msgspec.structs.replace(node(1), retired=(A100.key,))
    rung.ladder.sample()
    assert not rung.ladder._rungs
    rung.ladder.pause()
    assert rung.paused
    rung.ladder.resume()
    assert not rung.paused
    rung.ladder.close()
    assert (rung.closed, rung.exporter.closed) == (True, True)
