"""The driver worker: the process in which the NVIDIA library is loaded, and which may get stuck.

Run by the agent as `python -m flopledger_agent.gpus.worker`, with a pipe each way. It is told once
what to read, then samples when asked, and leaves when the pipe closes: when the agent lets it go or
is no more. Nothing of the agent's state is here, so it can be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent.clocks import Clock, ScaledClock, SystemClock
from flopledger_agent.gpus.source import NvmlSource
from flopledger_agent.gpus.worker_messages import (
    Answer,
    Ask,
    Hello,
    Inbox,
    framed,
    request_of,
)
from flopledger_core.accelerators import load_table

if TYPE_CHECKING:
    from flopledger_agent.gpus.worker_messages import SimulatedNode

READ_BYTES: Final = 64 * 1024
STANDARD_INPUT: Final = 0
STANDARD_OUTPUT: Final = 1
STANDARD_ERROR: Final = 2


def make_source(hello: Hello) -> NvmlSource:
    """The source that a greeting asks for; with a scenario, on a simulated driver."""
    clock: Clock = SystemClock()
    if hello.simulated is not None:
        clock = _on_scenario(hello.simulated)
    return NvmlSource(
        clock,
        load_table(),
        known=hello.known,
        deadline_seconds=hello.deadline_seconds,
        selection=hello.selection,
        scales=hello.scales,
        scales_of_driver=hello.scales_of_driver,
    )


def _on_scenario(simulated: SimulatedNode) -> Clock:
    # Imported only here: a production worker never loads the simulator.
    from flopledger_agent.gpus.simulated import install, load_scenario  # noqa: PLC0415

    clock: Clock = SystemClock()
    if simulated.clock is not None:
        clock = ScaledClock(simulated.clock, tie_ns=simulated.tie_ns)
    scenario = load_scenario(Path(simulated.scenario))
    started = dataclasses.replace(scenario, start_boottime_ns=simulated.start_boottime_ns)
    install(started, clock)
    return clock


class Worker:
    """One source behind two pipes."""

    def __init__(self, receiving_fd: int, sending_fd: int) -> None:
        self._receiving_fd = receiving_fd
        self._sending_fd = sending_fd
        self._inbox = Inbox()
        self._source: NvmlSource | None = None

    def serve(self) -> None:
        """Answer until the pipe closes. Errors: BrokenMessage, OSError when the agent is gone."""
        while True:
            body = self._inbox.take()
            if body is None:
                content = os.read(self._receiving_fd, READ_BYTES)
                if not content:
                    return
                self._inbox.feed(content)
                continue
            request = request_of(body)
            if isinstance(request, Hello):
                self._source = make_source(request)
                gc.collect()
                gc.freeze()  # what was imported is never garbage: collections stay short
            elif self._source is not None:
                self._send(framed(answer(self._source, request)))

    def close(self) -> None:
        """Shut the driver down as far as it lets us, within the source's deadline."""
        if self._source is not None:
            self._source.close()

    def _send(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[os.write(self._sending_fd, left) :]


def answer(source: NvmlSource, ask: Ask) -> Answer:
    """One tick of a source."""
    if not ask.delivered:
        source.withdraw()
    sample = source.sample()
    survey = source.survey()
    return Answer(
        number=ask.number,
        sample=sample,
        scales=source.scales(),
        places=survey.places,
        device_count=survey.device_count,
        stuck_index=survey.stuck_index,
    )


def main() -> None:
    """Serve the agent at standard input and output; never returns."""
    # Whatever a library prints must not come between messages.
    sending_fd = os.dup(STANDARD_OUTPUT)
    os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A signal to the whole group is the agent's to answer: it still takes a last sample.
        signal.signal(number, signal.SIG_IGN)
    worker = Worker(STANDARD_INPUT, sending_fd)
    status = 1
    try:
        worker.serve()
        worker.close()
        status = 0
    except BrokenPipeError:
        status = 0  # the agent went away while it was answered
    except Exception:  # noqa: BLE001  (told, and then this process ends whatever it is)
        traceback.print_exc()
    finally:
        # Not sys.exit: threads that hang in the driver must not hold the process.
        os._exit(status)


if __name__ == "__main__":
    main()
