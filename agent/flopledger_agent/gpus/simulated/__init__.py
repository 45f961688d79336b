"""A simulated NVIDIA driver that stands behind the real pynvml, with exactly known truth.

It takes the place of the library pynvml loads, so every call goes through pynvml's own marshalling
and any other pynvml program runs on it. Energy and GPM counters are exact integrals of a scenario.
It must never be installed unless a scenario was asked for by name, and it invents nothing outside
that scenario. Rooms: `scenario` (what happens), `schedule` (exact counters), `driver` (install,
truth, faults), `library` and `functions` (the NVML calls).
"""

from flopledger_agent.gpus.simulated.driver import (
    Clock,
    SimulatedDriver,
    SimulatedProcess,
    install,
)
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.scenario import (
    Scenario,
    build_scenario,
    load_scenario,
    parse_scenario,
)
from flopledger_agent.gpus.simulated.tables import ScenarioError
from flopledger_agent.gpus.simulated.truth import GpuTruth, Integrals, Truth

__all__ = [
    "Clock",
    "Fault",
    "GpuTruth",
    "Integrals",
    "Scenario",
    "ScenarioError",
    "SimulatedDriver",
    "SimulatedProcess",
    "Truth",
    "build_scenario",
    "install",
    "load_scenario",
    "parse_scenario",
]
