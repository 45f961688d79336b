"""NVML functions of event sets: XID errors that the scenario's `xid` faults report.

An event set reports what happens to a device after it was registered, in order of time, each error
once. A wait never blocks here: nothing can happen while scenario time stands still.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pynvml

from flopledger_agent.gpus.simulated.functions.answers import (
    INVALID_ARGUMENT,
    NOT_SUPPORTED,
    SUCCESS,
    DeviceFunction,
    constant,
)
from flopledger_agent.gpus.simulated.marshalling import (
    CArgument,
    address,
    number,
    target,
    write_handle,
)

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.devices import Device
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver
    from flopledger_agent.gpus.simulated.faults import Fault

TIMED_OUT: Final[int] = pynvml.NVML_ERROR_TIMEOUT
XID_EVENT: Final[int] = pynvml.nvmlEventTypeXidCriticalError
NO_INSTANCE: Final = 0xFFFFFFFF
XID_WITHOUT_CODE: Final = 79  # GPU has fallen off the bus


class SimulatedEventSet:
    """What one caller registered, and what it was told already."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(ctypes.c_void_p))
        self.address = ctypes.addressof(self._memory)
        self._since_ns: dict[int, int] = {}  # registration by device position
        self._told: set[Fault] = set()

    def register(self, device: Device, now_ns: int) -> None:
        """Report this device from now on."""
        self._since_ns.setdefault(device.position, now_ns)

    def next(self, devices: tuple[Device, ...], now_ns: int) -> tuple[Device, Fault] | None:
        """The oldest error not told yet."""
        waiting = [
            (fault.at_ns or 0, device.position, device, fault)
            for device in devices
            if device.position in self._since_ns
            for fault in device.faults
            if fault.kind == "xid"
            and fault not in self._told
            and self._since_ns[device.position] <= (fault.at_ns or 0) <= now_ns
        ]
        if not waiting:
            return None
        _, _, device, fault = min(waiting, key=lambda item: item[:2])
        self._told.add(fault)
        return device, fault


def event_set_create(driver: SimulatedDriver, out: CArgument) -> int:
    """Answer nvmlEventSetCreate."""
    events = SimulatedEventSet()
    driver.event_sets[events.address] = events
    write_handle(out, events.address)
    return SUCCESS


def event_set_free(driver: SimulatedDriver, handle: CArgument) -> int:
    """Answer nvmlEventSetFree."""
    known = driver.event_sets.pop(address(handle), None)
    return INVALID_ARGUMENT if known is None else SUCCESS


def event_set_wait(
    driver: SimulatedDriver, handle: CArgument, out: CArgument, _timeout_ms: CArgument
) -> int:
    """Answer nvmlEventSetWait_v2 at once."""
    events = driver.event_sets.get(address(handle))
    if events is None:
        return INVALID_ARGUMENT
    found = events.next(driver.devices, driver.now_ns())
    if found is None:
        return TIMED_OUT
    device, fault = found
    write_handle(out, device.address)  # the handle is the structure's first field
    data = target(out)
    data.eventType = XID_EVENT
    data.eventData = XID_WITHOUT_CODE if fault.code is None else fault.code
    data.gpuInstanceId = NO_INSTANCE
    data.computeInstanceId = NO_INSTANCE
    return SUCCESS


def register_events(
    device: Device, now_ns: int, driver: SimulatedDriver, types: CArgument, handle: CArgument
) -> int:
    """Answer nvmlDeviceRegisterEvents; only XID errors are offered."""
    events = driver.event_sets.get(address(handle))
    if events is None:
        return INVALID_ARGUMENT
    if number(types) & ~XID_EVENT:
        return NOT_SUPPORTED
    events.register(device, now_ns)
    return SUCCESS


SYSTEM_FUNCTIONS: Final[Mapping[str, Callable[..., int]]] = MappingProxyType(
    {
        "nvmlEventSetCreate": event_set_create,
        "nvmlEventSetFree": event_set_free,
        "nvmlEventSetWait_v2": event_set_wait,
    }
)
FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {"nvmlDeviceGetSupportedEventTypes": constant(XID_EVENT)}
)
