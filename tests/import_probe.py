"""A program: imports the named modules and reports everything they did besides defining things.

Usage: python import_probe.py SOURCE_ROOT[:SOURCE_ROOT...] MODULE...
Prints one finding a line, and exits 1 with any.

It watches through the interpreter's own audit events, so that sockets, databases, processes,
threads, GPU libraries and files are seen wherever the call hides. Started by tests/test_house.py.
"""

import importlib
import os
import sys
import sysconfig
import threading
from pathlib import Path

FORBIDDEN = (
    "os.fork",
    "os.forkpty",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.system",
    "signal.signal",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "sqlite3.connect",
    "subprocess.Popen",
    "threading.Thread.start",
)
CODE_SUFFIXES = (".py", ".pyc", ".so", ".pth", ".zip")


def finding(event: str, arguments: tuple[object, ...], data_roots: list[str]) -> str | None:
    """What one audit event says about an import, or None where it is harmless."""
    if event in FORBIDDEN:
        return f"{event}{arguments!r}"
    if event == "ctypes.dlopen" and "nvidia" in str(arguments[0]):
        return f"loads {arguments[0]}"
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, flags = str(Path(os.fsdecode(arguments[0])).resolve()), arguments[2]
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ours = any(path.startswith(root) for root in data_roots)
        if writes and not path.startswith("/dev/"):
            return f"writes {path}"
        if ours and not path.endswith(CODE_SUFFIXES):
            return f"reads {path}"
    return None


def main() -> int:
    """Import each module with the watch on, and report."""
    roots = [str(Path(root).resolve()) for root in sys.argv[1].split(os.pathsep)]
    sys.path[:0] = roots
    sysconfig.get_config_vars()  # reads its own files once, before the watch starts
    current, findings = "", []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if current:
            found = finding(event, arguments, roots)
            if found:
                findings.append(f"{current}: {found}")
                raise RuntimeError(f"at import: {found}")

    def start(_thread: threading.Thread) -> None:
        watch("threading.Thread.start", ())  # older interpreters raise no audit event for it

    setattr(threading.Thread, "start", start)  # noqa: B010 - the type checkers rightly object
    sys.addaudithook(watch)
    for name in sys.argv[2:]:
        current = name
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever an import raises is the finding
            if not findings or not findings[-1].startswith(name):
                findings.append(f"{name}: {type(error).__name__}: {error}")
        current = ""
    for line in findings:
        print(line)  # noqa: T201 - this is a program
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
