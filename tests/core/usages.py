"""Usage records of any shape for property tests: tiers, absences, sharers, slices, origins."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from flopledger_core.records import Attribution, Cycles, Device, Slices, UsageRecord
from tests.core.sealed import H100, MINUTE_MS, usage

counts = st.integers(0, 10**13)
H100_SMS = 132
# SMs of an H100's GPU instances by their compute slices.
INSTANCES = {1: 16, 2: 32, 3: 60, 4: 64, 7: 132}


@st.composite
def cycles(draw: st.DrawFn, *, absent: bool = True) -> Cycles:
    """Counters a device could have: pipes within elapsed, any tensor over its parts."""
    hmma, imma, fp64 = draw(counts), draw(counts), draw(counts)
    cores = [draw(counts) for _ in range(4)]
    any_tensor = hmma + imma + fp64
    elapsed = max(any_tensor, *cores) + draw(counts)
    values = dict(
        zip(("fp64", "fp32", "fp16", "integer"), cores, strict=True),
        sm_active=draw(st.integers(0, elapsed)), any_tensor=any_tensor, hmma=hmma, imma=imma,
        dmma=fp64, dfma=draw(st.integers(0, fp64)),
    )  # fmt: skip
    hidden = draw(st.sets(st.sampled_from(sorted(values)))) if absent else set[str]()
    return Cycles(elapsed=elapsed, **{k: v for k, v in values.items() if k not in hidden})


@st.composite
def devices(draw: st.DrawFn) -> Device:
    """An H100, whole or one of its GPU instances."""
    if draw(st.booleans()):
        return H100
    count = draw(st.sampled_from(sorted(INSTANCES)))
    first = draw(st.integers(0, 7 - count))
    slices = Slices(first_index=first, count=count, of_count=7, sms_of=H100_SMS)
    return msgspec.structs.replace(
        H100, gpu_instance=first + 1, sm_count=INSTANCES[count], slices=slices
    )


@st.composite
def usages(draw: st.DrawFn) -> UsageRecord:
    """Any minute of an H100, or of a part of it, for any of its owners."""
    device = draw(devices())
    tier = draw(st.sampled_from(["gpm_cycles", "gpm_util", "dcgm_pipes", "sm_active", "gpu_util",
                                 "none"]))  # fmt: skip
    counted = tier == "gpm_cycles" or (tier == "dcgm_pipes" and draw(st.booleans()))
    found = Cycles() if tier == "none" else draw(cycles())
    weights = draw(st.integers(1, 4))
    weight = draw(st.integers(1, weights))
    sharers = 1 if weight == weights else 2
    energy = draw(st.none() | st.integers(0, 10**7))
    origin = "absent" if energy is None else draw(st.sampled_from(["counter", "power_integral"]))
    flags = draw(st.sets(st.sampled_from(["recovered"])))
    if device.slices is not None:
        flags |= {"apportioned"}
    return usage(
        device=device, tier=tier, cycles=found,
        cycles_origin="absent" if tier == "none" else "measured" if counted else "derived",
        attribution=Attribution(source="tag", sharers=sharers, weight=weight, weights=weights),
        gpu_time_ms=MINUTE_MS * weight // weights, uncertain_cycles=draw(st.integers(0, 10**6)),
        precision=draw(st.sampled_from([None, "bf16", "fp8", "tf32", "fp4", "int8", "fp64"])),
        energy_mj=energy, energy_origin=origin,
        energy_scope=draw(st.sampled_from(["gpu", "module"])), flags=tuple(sorted(flags)),
    )  # fmt: skip
