"""A pair of GPM samples and what may be read between them, for one GPU or one GPU instance.

Owns memory of the driver: whoever makes a pair frees it on every way out.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from flopledger_agent.gpus.gpm import ALL_IDS, PERCENTAGE_IDS, GpmMeter, GpmReading
from flopledger_agent.gpus.nvml_errors import DriverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.gpus.nvml import GpmQuery, GpmSampleBuffer, Nvml


class GpmPair:
    """The two sample buffers of a device or GPU instance, and the query over them.

    `_buffers[0]` is the baseline, `_buffers[1]` the newest sample; they are swapped once a sample
    is known to be delivered, so no cycle falls between two means.
    """

    def __init__(
        self, nvml: Nvml, freeze: Callable[[GpmSampleBuffer], None], meter: GpmMeter
    ) -> None:
        """`freeze` fills a buffer with the counters as they are now. Errors: DriverError."""
        self._nvml = nvml
        self._freeze = freeze
        self._buffers: list[GpmSampleBuffer] = []
        self._query: GpmQuery = nvml.gpm_query(ALL_IDS)
        self._whole = True
        self._baseline = False  # the baseline buffer holds the last delivered sample
        self._fresh = False
        self.meter = meter
        try:
            for _ in range(2):
                self._buffers.append(nvml.gpm_allocate())
            freeze(self._buffers[0])  # the first reading has a pair already
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Give the buffers back, as far as the driver takes them; nothing is read afterwards."""
        while self._buffers:
            with contextlib.suppress(DriverError):
                self._nvml.gpm_free(self._buffers.pop())

    def settle(self, *, delivered: bool) -> None:
        """Learn what became of the previous sample."""
        self.meter.settle(delivered=delivered)
        if delivered:
            if self._fresh:
                self._buffers.reverse()
            self._baseline = self._fresh
        self._fresh = False

    def take(self) -> bool:
        """Freeze the counters now."""
        self._freeze(self._buffers[1])
        self._fresh = True
        return True

    def reading(self, boot_ns: int, sm_clock_khz: int | None, *, hand_over: bool) -> GpmReading:
        """What the pair of samples says. `hand_over`: see GpmMeter.interpret."""
        try:
            answers = self._query.answers(*self._buffers)
        except DriverError as error:
            if error.meaning.scope != "field" or not self._whole:
                raise
            # A driver that does not know the newer ids may refuse the whole call.
            narrow = self._nvml.gpm_query(PERCENTAGE_IDS)
            answers = narrow.answers(*self._buffers)
            if error.meaning.reason in {"invalid_argument", "not_supported", "not_found"}:
                self._query, self._whole = narrow, False
        return self.meter.interpret(
            answers,
            boot_ns=boot_ns,
            sm_clock_khz=sm_clock_khz,
            since_delivered=self._baseline,
            hand_over=hand_over,
        )
