"""The object that takes the place of pynvml.nvmlLib: one Python callable per C function.

Every call passes the same gate: initialised, handle known, no fault in the way; then the function
of that name answers. pynvml looks functions up by attribute, and a missing attribute is what makes
it raise FUNCTION_NOT_FOUND. The gate never lets a Python exception of bad C arguments out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import pynvml

from flopledger_agent.gpus.simulated.functions import (
    events,
    fields,
    gpm,
    identity,
    mig,
    processes,
    readings,
    system,
)
from flopledger_agent.gpus.simulated.functions.answers import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    NOT_SUPPORTED,
    SUCCESS,
    DeviceFunction,
)
from flopledger_agent.gpus.simulated.marshalling import (
    POINTER,
    CArgument,
    InvalidArgument,
    number,
    target,
)

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.devices import MigHandle
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver

UNINITIALIZED: Final[int] = pynvml.NVML_ERROR_UNINITIALIZED
_DEVICE_MODULES: Final = (identity, readings, processes, fields, gpm, events, mig)
# The words of nvmlErrorString; pynvml keeps the same list for codes it knows.
_ERROR_STRINGS: Final = {0: "Success"}


class SimulatedLibrary:
    """What pynvml takes for the loaded libnvidia-ml.so.1."""

    def __init__(self, driver: SimulatedDriver) -> None:
        for name, call in _callables(driver):
            if name not in driver.scenario.missing_functions:
                setattr(self, name, call)


def _callables(driver: SimulatedDriver) -> Iterator[tuple[str, Callable[..., int | bytes]]]:
    yield "nvmlInitWithFlags", _init(driver, "nvmlInitWithFlags")
    yield "nvmlInit_v2", _init(driver, "nvmlInit_v2")
    yield "nvmlShutdown", _shutdown(driver)
    yield "nvmlErrorString", _error_string
    for name, answer in (*system.FUNCTIONS.items(), *events.SYSTEM_FUNCTIONS.items()):
        yield name, _system_call(driver, name, answer)
    for module in _DEVICE_MODULES:
        for name, function in module.FUNCTIONS.items():
            refused = name in mig.REFUSED_WITH_MIG
            answer = mig.without_mig(function) if refused else function
            yield name, _device_call(driver, name, answer)
    whole_sample = mig.without_mig(_with(driver, gpm.sample_get))
    yield "nvmlGpmSampleGet", _device_call(driver, "nvmlGpmSampleGet", whole_sample)
    part_sample = _with(driver, mig.mig_sample_get)
    yield "nvmlGpmMigSampleGet", _device_call(driver, "nvmlGpmMigSampleGet", part_sample)
    yield (
        "nvmlDeviceRegisterEvents",
        _device_call(driver, "nvmlDeviceRegisterEvents", _with(driver, events.register_events)),
    )
    yield "nvmlDeviceGetIndex", _device_call(driver, "nvmlDeviceGetIndex", _with(driver, _index))


def _init(driver: SimulatedDriver, name: str) -> Callable[..., int]:
    def call(_flags: CArgument = 0) -> int:
        code = driver.fault_code(name, driver.faults)
        if code == SUCCESS:
            driver.initialised += 1
        return code

    return call


def _shutdown(driver: SimulatedDriver) -> Callable[..., int]:
    def call() -> int:
        if not driver.initialised:
            return UNINITIALIZED
        driver.initialised -= 1
        return SUCCESS

    return call


def _error_string(result: CArgument) -> bytes:
    code = number(result)
    known: dict[int, str] = pynvml.NVMLError._errcode_to_string  # noqa: SLF001  (NVIDIA's own words)
    return (_ERROR_STRINGS.get(code) or known.get(code) or f"Unknown Error ({code})").encode()


def _system_call(
    driver: SimulatedDriver, name: str, answer: system.SystemFunction
) -> Callable[..., int]:
    def call(*arguments: CArgument) -> int:
        if not driver.initialised:
            return UNINITIALIZED
        if driver.faults:
            code = driver.fault_code(name, driver.faults)
            if code:
                return code
        try:
            return answer(driver, *arguments)
        except InvalidArgument:
            return INVALID_ARGUMENT

    return call


def _device_call(
    driver: SimulatedDriver, name: str, function: DeviceFunction
) -> Callable[..., int]:
    devices = driver.device_by_address
    mig_handles = driver.mig_by_address
    now_ns = driver.now_ns

    def call(handle: CArgument, *arguments: CArgument) -> int:
        if not driver.initialised:
            return UNINITIALIZED
        try:
            place = POINTER.unpack_from(handle)[0]
            if place in mig_handles:
                return _mig_call(driver, name, mig_handles[place], arguments)
            device = devices[place]
        except (KeyError, TypeError, struct.error):
            return INVALID_ARGUMENT
        if device.faults:
            code = driver.fault_code(name, device.faults)
            if code:
                return code
        try:
            return function(device, now_ns(), *arguments)
        except InvalidArgument:
            return INVALID_ARGUMENT

    return call


def _mig_call(
    driver: SimulatedDriver, name: str, handle: MigHandle, arguments: tuple[CArgument, ...]
) -> int:
    now_ns = driver.now_ns()
    spec = handle.instance.spec
    code = driver.fault_code(name, (*handle.parent.faults, *spec.faults))
    if code:
        return code
    if not spec.alive(now_ns):
        return NOT_FOUND
    function = mig.MIG_FUNCTIONS.get(name)
    if function is None:
        return NOT_SUPPORTED
    try:
        return function(handle, now_ns, *arguments)
    except InvalidArgument:
        return INVALID_ARGUMENT


def _with(driver: SimulatedDriver, function: Callable[..., int]) -> DeviceFunction:
    def call(device: CArgument, now_ns: int, *arguments: CArgument) -> int:
        return function(device, now_ns, driver, *arguments)

    return call


def _index(device: CArgument, _now_ns: int, driver: SimulatedDriver, out: CArgument) -> int:
    target(out).value = driver.visible_devices().index(device)
    return SUCCESS
