"""The accuracy cases on the simulated driver: real pynvml, real metering, a truth that is known.

What instructions a pipe ran is the case's own knowledge (`rates`), as it would be of a real kernel;
the meter only sees the pipe and what was declared.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Final

import msgspec

from benchmarks.accuracy.cases import Outcome, Run
from benchmarks.accuracy.metered import Meter
from flopledger_agent.gpus import simulated
from flopledger_agent.gpus.source import NvmlSource
from flopledger_core.accelerators import load_table
from tests.agent.sampling import SECOND_NS, TestClock

if TYPE_CHECKING:
    from flopledger_core.records import Precision

MODEL: Final = "NVIDIA H200"
DRIVERS: Final = ("595.71.05", "580.159.04")  # with cycle counters, and with percentages only
WARM_UP_SECONDS: Final = 5
PAUSE_SECONDS: Final = 2
LEGACY: Final = Fraction(625, 1000)  # of the wgmma rate, at a pipe that reads as busy


class SimulatedCase(msgspec.Struct, frozen=True, kw_only=True):
    """What the device does, and what its pipes really carry out per active SM-cycle."""

    name: str
    precision: Precision | None
    phases: tuple[dict[str, object], ...]  # as in a scenario
    rates: dict[str, Fraction]
    quantity: str = "flop"
    note: str = ""

    @property
    def seconds(self) -> int:
        """Whole seconds from start to end."""
        return int(sum(Fraction(str(phase["seconds"])) for phase in self.phases))


def _phase(seconds: float, clock_mhz: int, watts: int, **pipes: float) -> dict[str, object]:
    return {
        "seconds": seconds,
        "sm_clock_mhz": clock_mhz,
        "power_watts": watts,
        "sm_active": max(pipes.values(), default=0.0),
        "pipes": pipes,
        "processes": ["bench"],  # it stays: whose a second is, the claims say
    }


def _product(
    name: str, precision: Precision | None, pipe: str, rate: Fraction | int, note: str = ""
) -> SimulatedCase:
    return SimulatedCase(
        name=name,
        precision=precision,
        phases=(_phase(10, 1755, 640, **{pipe: 0.9}),),
        rates={pipe: Fraction(rate)},
        quantity="operations" if pipe == "imma" else "flop",
        note=note,
    )


CASES: Final[tuple[SimulatedCase, ...]] = (
    _product("product-fp64-tensor", "fp64", "dmma", 256),
    _product("product-tf32", "tf32", "hmma", 2048),
    _product("product-fp16", "fp16", "hmma", 4096),
    _product("product-bf16", "bf16", "hmma", 4096),
    _product("product-bf16-undeclared", None, "hmma", 4096, "central assumes BF16"),
    _product("product-fp8", "fp8", "hmma", 8192),
    _product("product-fp8-undeclared", None, "hmma", 8192, "central assumes BF16: half"),
    _product("product-int8", "int8", "imma", 8192, "operations, never FLOP"),
    _product("product-fp32-cores", "bf16", "fp32", 256, "CUDA cores"),
    _product("additions-fp32-cores", "bf16", "fp32", 128, "additions are counted as multiply-adds"),
    _product("sparse-2-4-bf16", "bf16", "hmma", 4096, "carried out, not skipped"),
    _product("zeros-bf16", "bf16", "hmma", 4096, "dropped-out zeros are carried out"),
    _product("legacy-mma-bf16", "bf16", "hmma", 4096 * LEGACY, "inside the floor"),
    SimulatedCase(
        name="training-step",
        precision="bf16",
        phases=(_phase(12, 1755, 600, hmma=0.45, fp32=0.03),),
        rates={"hmma": Fraction(4096), "fp32": Fraction(256)},
    ),
    SimulatedCase(
        name="training-step-recomputed",
        precision="bf16",
        phases=(_phase(16, 1755, 600, hmma=0.45, fp32=0.03),),
        rates={"hmma": Fraction(4096), "fp32": Fraction(256)},
        note="a third more work carried out",
    ),
    SimulatedCase(
        name="mixed-pipes",
        precision=None,
        phases=(_phase(4, 1755, 640, hmma=0.5, imma=0.2, dmma=0.1, fp32=0.1),),
        rates={"hmma": Fraction(4096), "dmma": Fraction(256), "fp32": Fraction(256)},
    ),
    SimulatedCase(
        name="bursts",
        precision="bf16",
        phases=tuple(
            part
            for _ in range(20)
            for part in (_phase(0.05, 1980, 500, hmma=0.9), _phase(0.45, 1980, 150, hmma=0.0))
        ),
        rates={"hmma": Fraction(4096)},
        note="50 ms of work in each 500 ms",
    ),
    SimulatedCase(
        name="power-capped",
        precision="bf16",
        phases=tuple(
            _phase(0.25, clock, 690, hmma=0.9)
            for _ in range(10)
            for clock in (1980, 1650, 1400, 1755)
        ),
        rates={"hmma": Fraction(4096)},
        note="the clock moves four times a second",
    ),
    SimulatedCase(
        name="at-rest", precision=None, phases=(_phase(10, 345, 75, hmma=0.0),), rates={}
    ),
)  # fmt: skip


def run(driver: str) -> Run:
    """Every case on one driver version, in virtual time."""
    clock = TestClock()
    phases: list[dict[str, object]] = [_phase(WARM_UP_SECONDS, 1200, 120, hmma=0.1)]
    for case in CASES:
        phases += [*case.phases, _phase(PAUSE_SECONDS, 1200, 120)]
    scenario = {
        "driver_version": driver,
        "start_boottime_ns": clock.boottime_ns(),
        "processes": {"bench": {"pid": 10_000_001}},
        "gpus": [{"model": MODEL, "phases": phases}],
    }
    table = load_table()
    outcomes: list[Outcome] = []
    edges: dict[str, tuple[int, int]] = {}
    with simulated.install(simulated.build_scenario(scenario), clock) as device:
        meter = Meter(NvmlSource(clock, table, deadline_seconds=30.0), table)

        def seconds(count: int) -> None:
            for _ in range(count):
                meter.tick()
                clock.now_ns += SECOND_NS

        seconds(WARM_UP_SECONDS)
        for case in CASES:
            start_ns = clock.boottime_ns()
            meter.begin(case.name, case.precision)
            seconds(case.seconds)
            meter.end()
            edges[case.name] = (start_ns, clock.boottime_ns())
            seconds(PAUSE_SECONDS)
        amounts = meter.amounts()
        for case in CASES:
            true = device.truth_between(*edges[case.name]).gpus[0].whole
            got = amounts[case.name]
            bounds = (
                got.work.flop if case.quantity == "flop" else got.work.tensor_integer_operations
            )
            outcomes.append(
                Outcome(
                    case=case.name,
                    precision=case.precision,
                    tier="+".join(got.tiers),
                    seconds=got.time_ms / 1000,
                    quantity=case.quantity,
                    truth=int(
                        sum(
                            (true.active_cycles[pipe] * rate for pipe, rate in case.rates.items()),
                            Fraction(0),
                        )
                    ),
                    truth_method="simulated schedule",
                    low=bounds.low,
                    central=bounds.central,
                    high=bounds.high,
                    energy_mj=got.energy_mj,
                    energy_check_mj=int(true.energy_mj),
                    note=case.note,
                )
            )
    return Run(
        device=f"{MODEL}, simulated",
        driver=driver,
        method="virtual clock, one sample a second, truth from the simulator's schedule",
        date="",
        outcomes=tuple(outcomes),
    )
