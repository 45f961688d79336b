"""The shipping thread: carries out what the shipper decides, and outlives whatever goes wrong.

Nothing that the collector, the network or the spool does ends this thread: an error becomes a
counted failure, is said once, and the batches wait. When the agent stops, the thread tries to
deliver once more; the agent waits for it `STOP_DELIVERY_SECONDS` and no longer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Final

from flopledger_agent.errors import CollectorUnreachable, StateError
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flopledger_agent.clocks import Clock
    from flopledger_agent.delivery import Collector
    from flopledger_agent.loop import AgentLoop
    from flopledger_agent.shipper import Shipper
    from flopledger_agent.spool import Spool, SpooledBatch

SHIP_IDLE_SECONDS: Final = 0.5  # how often the shipper looks at the spool, in the clock's time
STOP_DELIVERY_SECONDS: Final = 5.0  # a stopping agent tries to deliver for this long, in all
COLLECTOR: Final = "collector"  # the topic of troubles that are of no stream

log = logging.getLogger("flopledger.agent")


class Shipping:
    """One thread between the spool and the collector."""

    def __init__(  # noqa: PLR0913 (one part an argument, named at the call)
        self,
        *,
        loop: AgentLoop,
        spool: Spool,
        shipper: Shipper,
        collector: Collector,
        clock: Clock,
        jitter_ns: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._spool = spool
        self._shipper = shipper
        self._collector = collector
        self._clock = clock
        self._jitter_ns = jitter_ns  # this node's moment within the minute
        self._monotonic = monotonic
        self._finish = threading.Event()
        self._give_up_at = math.inf
        self._ask_ledger = True  # which ledger it is: asked at first and after every refusal
        self._said: dict[str, str] = {}  # the last trouble logged, of each stream and the collector
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Deliver once more and end; returns when that is done or the time for it is up.

        A request that still hangs then is left behind: its batches stay in the spool.
        """
        self._give_up_at = self._monotonic() + STOP_DELIVERY_SECONDS
        self._finish.set()
        if self.alive:
            self._thread.join(timeout=STOP_DELIVERY_SECONDS)

    def ship_once(self) -> bool:
        """One request, if there is something to send now; True when anything came of it."""
        now_ns = self._clock.boottime_ns()
        try:
            return self._attempt(now_ns)
        except CollectorUnreachable as error:
            self._fail(now_ns, error.reason, str(error))
        except StateError as error:
            self._fail(now_ns, "state_directory", str(error))
        except Exception as error:  # noqa: BLE001 (whatever it is, the thread must live)
            self._fail(now_ns, "unexpected_error", f"{type(error).__name__}: {error}", error)
        finally:
            current = self._loop.view.stream_id
            if self._shipper.is_broken(current):
                self._loop.leave_stream(current)
        return False

    def _attempt(self, now_ns: int) -> bool:
        with self._loop.spool_lock:
            if not self._shipper.may_try(now_ns):
                return False
            batches = self._shipper.next_batches(now_ns, self._loop.view.stream_id)
        if self._ask_ledger:
            self._loop.learn_ledger(self._collector.ledger_id(limit_seconds=self._left_seconds()))
            self._ask_ledger = False
        if not batches:
            return False
        whole = self._read(now_ns, batches)
        if not whole:
            return True  # the damage is noted, and others go on
        sent = batches[: len(whole)]
        answers = self._collector.send(b"".join(whole), limit_seconds=self._left_seconds())
        with self._loop.spool_lock:
            progress = self._shipper.on_answers(now_ns, sent, answers)
            trouble = self._shipper.last_error
        if trouble is None:
            self._said.pop(COLLECTOR, None)
            self._said.pop(sent[0].stream_id, None)
        elif progress:
            self._ask_ledger = True
            self._said.pop(COLLECTOR, None)
            self._say(sent[0].stream_id, trouble, "batch_refused")
        else:
            self._say(COLLECTOR, trouble, "ship_failed")
        return progress

    def _read(self, now_ns: int, batches: Sequence[SpooledBatch]) -> list[bytes]:
        """The contents up to the first damaged batch: what follows that one cannot link."""
        whole: list[bytes] = []
        for batch in batches:
            with self._loop.spool_lock:
                content = self._spool.read(batch)
                if content is None:
                    self._shipper.on_damage(
                        now_ns,
                        batch,
                        f"{batch.name} is not the batch that was sealed and was moved to "
                        "quarantine/; restore it from a backup: later batches of its stream wait",
                    )
            if content is None:
                self._say(batch.stream_id, self._shipper.last_error or "", "batch_damaged")
                break
            whole.append(content)
        return whole

    def _run(self) -> None:
        while not self._finish.is_set():
            sent = False
            if self._clock.wall_unix_ns() % (60 * NS_PER_SECOND) >= self._jitter_ns:
                sent = self.ship_once()
            if not sent:
                self._finish.wait(self._clock.sleep_seconds(SHIP_IDLE_SECONDS))
        with self._loop.spool_lock:
            self._shipper.hurry()
        while len(self._spool) and self._left_seconds() > 0 and self.ship_once():
            pass

    def _left_seconds(self) -> float:
        return self._give_up_at - self._monotonic()

    def _fail(self, now_ns: int, reason: str, message: str, error: Exception | None = None) -> None:
        with self._loop.spool_lock:
            self._shipper.on_failure(now_ns, reason, message)
        self._say(COLLECTOR, message, "ship_failed" if error is None else "unexpected_error", error)

    def _say(self, topic: str, message: str, action: str, error: Exception | None = None) -> None:
        """Log a trouble when it is another one than the last of its topic."""
        if self._said.get(topic) != message:
            self._said[topic] = message
            level = logging.WARNING if action == "ship_failed" else logging.ERROR
            log.log(level, "%s", message, exc_info=error, extra={"action": action})
