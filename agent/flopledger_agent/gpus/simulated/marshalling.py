"""The C side of a pynvml call: reading arguments and writing results as a driver would.

pynvml passes ctypes values, `byref` objects, arrays, char buffers and pointers. Whatever a C
library could not use (a null pointer, the wrong kind) becomes InvalidArgument, which the library
answers with NVML_ERROR_INVALID_ARGUMENT. No memory outside the caller's own objects is touched.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Final, TypeAlias

# A ctypes argument: its classes are private to pynvml and differ between callers (nvitop brings
# structures of its own), and `byref` results have no public type. Hence Any, named once here.
CArgument: TypeAlias = Any

POINTER: Final = struct.Struct("P")
_BYREF: Final[type[Any]] = type(ctypes.byref(ctypes.c_int()))
# ctypes names these base classes only with an underscore; they are the documented hierarchy.
_POINTER_CLASS: Final[type[Any]] = ctypes._Pointer  # noqa: SLF001
_OBJECT_CLASSES: Final[tuple[type[Any], ...]] = (
    ctypes.Array,
    ctypes.Structure,
    ctypes.Union,
    ctypes._SimpleCData,  # noqa: SLF001
)
_NULL: Final = 0


class InvalidArgument(Exception):
    """The caller passed something a C library could not use."""


def target(argument: CArgument) -> CArgument:
    """The object an out-parameter points to."""
    if type(argument) is _BYREF:
        return argument._obj  # noqa: SLF001  (the only way to what byref() refers to)
    if isinstance(argument, _POINTER_CLASS):
        if address(argument) == _NULL:
            raise InvalidArgument
        return argument.contents
    if isinstance(argument, _OBJECT_CLASSES):
        return argument  # a caller may hand over the object itself where C takes its address
    raise InvalidArgument


def number(argument: CArgument) -> int:
    """An integer passed by value."""
    value = argument if isinstance(argument, int) else getattr(argument, "value", None)
    if not isinstance(value, int):
        raise InvalidArgument
    return value


def address(argument: CArgument) -> int:
    """The address inside an opaque handle."""
    try:
        return int(POINTER.unpack_from(argument)[0])
    except (TypeError, struct.error):
        raise InvalidArgument from None


def write_handle(argument: CArgument, value: int) -> None:
    """Store an opaque handle in the caller's pointer."""
    POINTER.pack_into(target(argument), 0, value)


def text(argument: CArgument) -> str:
    """A C string passed in."""
    value = argument if isinstance(argument, bytes | str) else getattr(argument, "value", None)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str):
        return value
    raise InvalidArgument


def write_text(value: str, buffer: CArgument, length: CArgument) -> bool:
    """Write a C string with its closing zero; False when the buffer is too small."""
    encoded = value.encode()
    if len(encoded) + 1 > number(length):
        return False
    target(buffer).value = encoded
    return True
