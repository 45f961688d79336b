"""Shapes that many NVML functions share, so that each of them is one line elsewhere.

Nothing here knows what a value means; a value of None is NVML_ERROR_NOT_SUPPORTED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.marshalling import CArgument, target, write_text

DeviceFunction: TypeAlias = Callable[..., int]  # (device, now_ns, *C arguments) -> NVML code
Read: TypeAlias = Callable[[Device, int], int | None]

SUCCESS: int = pynvml.NVML_SUCCESS
NOT_SUPPORTED: int = pynvml.NVML_ERROR_NOT_SUPPORTED
INVALID_ARGUMENT: int = pynvml.NVML_ERROR_INVALID_ARGUMENT
INSUFFICIENT_SIZE: int = pynvml.NVML_ERROR_INSUFFICIENT_SIZE
NOT_FOUND: int = pynvml.NVML_ERROR_NOT_FOUND


def scalar(read: Read) -> DeviceFunction:
    """A function with one integer out-parameter."""

    def call(device: Device, now_ns: int, out: CArgument) -> int:
        value = read(device, now_ns)
        if value is None:
            return NOT_SUPPORTED
        target(out).value = value
        return SUCCESS

    return call


def fixed(value: int) -> Read:
    """A reading that never changes."""
    return lambda _device, _now_ns: value


def constant(value: int) -> DeviceFunction:
    """A function whose one integer out-parameter never changes."""
    return scalar(fixed(value))


def pair(first: Read, second: Read) -> DeviceFunction:
    """A function with two integer out-parameters."""

    def call(device: Device, now_ns: int, first_out: CArgument, second_out: CArgument) -> int:
        values = first(device, now_ns), second(device, now_ns)
        outs = target(first_out), target(second_out)
        if None in values:
            return NOT_SUPPORTED
        for out, value in zip(outs, values, strict=True):
            out.value = value
        return SUCCESS

    return call


def c_text(read: Callable[[Device], str]) -> DeviceFunction:
    """A function that fills a char buffer of a given length."""

    def call(device: Device, _now_ns: int, buffer: CArgument, length: CArgument) -> int:
        return SUCCESS if write_text(read(device), buffer, length) else INSUFFICIENT_SIZE

    return call


def unsupported(_device: Device, _now_ns: int, *_arguments: CArgument) -> int:
    """A function this hardware does not offer."""
    return NOT_SUPPORTED


def forbidden(_device: Device, _now_ns: int, *_arguments: CArgument) -> int:
    """A function that changes the device: refused, as to any unprivileged caller."""
    code: int = pynvml.NVML_ERROR_NO_PERMISSION
    return code
