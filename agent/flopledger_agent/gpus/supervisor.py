"""The node's GPUs through worker processes: a driver call that never returns costs nobody else.

`SupervisedSource` asks every worker at once, under one deadline, and merges their answers to one
sample. All GPUs are read by one worker until one of them hangs or is lost: then the others go on in
a worker that does not touch it, and it gets workers of its own, started with growing pauses. Once
it has been read for long it goes back to the others' worker. Counters are cumulative, so what
happens to workers loses no energy and no cycle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.interface import DeviceFailure, NodeSample
from flopledger_agent.gpus.lanes import Lane, LaneTick, Patience
from flopledger_agent.gpus.selection import Selection
from flopledger_agent.gpus.worker_messages import Hello
from flopledger_agent.gpus.worker_process import wait_for_any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.gpm import Scale
    from flopledger_agent.gpus.interface import GpuSample
    from flopledger_agent.gpus.lanes import Conversation
    from flopledger_agent.gpus.worker_messages import Answer, SimulatedNode
    from flopledger_agent.gpus.worker_process import WorkerProcess
    from flopledger_core.records import Device

# A worker gives its devices this part of the deadline, so that it answers within the whole.
WORKER_SHARE: Final = 0.75
# A GPU with these reasons for as long as `Patience.hang_seconds` is set apart from the others. A
# lost one is, too, so that nobody holds it open while somebody resets it.
LOST: Final = frozenset({"gpu_is_lost", "reset_required"})
TROUBLE: Final = LOST | {"timeout"}
# After these the driver's list may be in another order.
DRIVER_GONE: Final = frozenset(
    {"driver_uninitialized", "driver_not_loaded", "driver_version_mismatch", "nvml_not_found"}
)
NAMELESS: Final = "unidentified-"  # of a device that hung before it said who it is
# How often leaving workers are looked at, and how long a killed one may take to be gone.
LEAVING_CHECK_SECONDS: Final = 0.01
KILL_SECONDS: Final = 0.5


class WorkerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The workers as the page shows them."""

    running_workers: int = 0
    abandoned_workers: int = 0  # ended, and still sleeping in the driver
    restarts: dict[str, int] = {}  # by reason


class _Apart:
    """A GPU with a lane of its own."""

    def __init__(self, lane: Lane, selection: Selection) -> None:
        self.lane = lane
        self.selection = selection
        self.since_seconds: float | None = None  # in trouble in its own lane, too
        self.read_since_seconds: float | None = None  # without trouble
        self.rejoining_since_seconds: float | None = None  # the others' worker reads it, too


class SupervisedSource:
    """Every GPU of the node through workers; see GpuSource."""

    def __init__(  # noqa: PLR0913  (one collaborator an argument, named at the call)
        self,
        clock: Clock,
        launch: Callable[[], WorkerProcess],
        seconds: Callable[[], float],
        *,
        known: Iterable[Device] = (),
        deadline_seconds: float,
        simulated: SimulatedNode | None = None,
        patience: Patience = Patience(),  # noqa: B008  (frozen)
        wait: Callable[[Iterable[WorkerProcess], float], None] = wait_for_any,
    ) -> None:
        self._clock = clock
        self._launch = launch
        self._seconds = seconds  # real time, for deadlines
        self._deadline_seconds = deadline_seconds
        self._simulated = simulated
        self._patience = patience
        self._wait = wait
        self._devices: dict[str, Device] = {device.key: device for device in known}
        self._lane = Lane(launch, patience)
        self._apart: dict[str, _Apart] = {}  # by UUID
        self._troubled: dict[str, float] = {}  # since when, by UUID or nameless place
        self._reasons: dict[str, str] = {}  # last one by UUID
        self._scales: dict[str, Scale] = {}
        self._places: dict[str, int] = {}
        self._device_count: int | None = None
        self._driver: str | None = None
        self._xids: dict[str, tuple[int, ...]] = {}  # told too late for their tick, by key
        self._retired: list[str] = []
        self._left: list[WorkerProcess] = []  # of lanes that are no more
        self._past_restarts: dict[str, int] = {}
        self._rejoin_seconds: dict[str, float] = {}  # by UUID, where it is not the shortest
        self._closed = False
        self._paused = False
        self.counts = WorkerCounts()  # replaced whole at every tick

    def sample(self) -> NodeSample:
        """One reading of every device, at the latest after the deadline; never raises."""
        boot_ns, unix_ns = self._clock.boottime_ns(), self._clock.wall_unix_ns()
        if self._closed or self._paused:
            return self._dark(boot_ns, unix_ns, "closed" if self._closed else "paused")
        began = self._seconds()
        asked = self._lane.begin(self._hello, began)
        for apart in self._apart.values():
            asked += apart.lane.begin(self._greeting_of(apart), began)
        self._await(asked, began + self._deadline_seconds)
        now = self._seconds()
        main = self._lane.conclude(now)
        others = {uuid: apart.lane.conclude(now) for uuid, apart in self._apart.items()}
        for uuid in self._rejoined(main):
            others.pop(uuid)
        node = self._merged(boot_ns, unix_ns, main, others)
        self._learn(main, others)
        self._set_apart(main, node, now)
        self._look_after_apart(others, now)
        self._count()
        return node

    def pause(self) -> None:
        """End every worker, so that nobody of ours holds the driver; waits a deadline at most."""
        if not self._closed and not self._paused:
            self._paused = True
            self._let_go()

    def resume(self) -> None:
        """Start workers again at the next sample; what they knew of the driver is asked anew."""
        self._paused = False

    def close(self) -> None:
        """End every worker; one that cannot end is left behind and delays nothing."""
        if not self._closed:
            self._closed = True
            if not self._paused:
                self._let_go()

    # --- asking -------------------------------------------------------------------------------

    def _await(self, asked: list[Conversation], deadline_at_seconds: float) -> None:
        waiting = [item for item in asked if item.waiting]
        while waiting and (left := deadline_at_seconds - self._seconds()) > 0:
            self._wait([item.process for item in waiting], left)
            for item in waiting:
                item.listen()
            waiting = [item for item in waiting if item.waiting]

    def _hello(self) -> Hello:
        """For a worker that reads every GPU that is not set apart."""
        left_out = frozenset(
            uuid for uuid, apart in self._apart.items() if apart.rejoining_since_seconds is None
        )
        nameless = [uuid for uuid in left_out if uuid.startswith(NAMELESS)]
        selection = Selection(
            excluded=left_out,
            places={uuid: self._places[uuid] for uuid in left_out if uuid in self._places},
            nameless=frozenset(int(uuid.removeprefix(NAMELESS)) for uuid in nameless),
            device_count=self._device_count,
        )
        return self._greeting(
            selection, (item for item in self._devices.values() if item.uuid not in left_out)
        )

    def _greeting_of(self, apart: _Apart) -> Callable[[], Hello]:
        uuid = apart.selection.only_uuid
        return lambda: self._greeting(
            apart.selection, (item for item in self._devices.values() if item.uuid == uuid)
        )

    def _greeting(self, selection: Selection, known: Iterable[Device]) -> Hello:
        return Hello(
            known=tuple(known),
            selection=selection,
            scales=self._scales,
            scales_of_driver=self._driver,
            deadline_seconds=WORKER_SHARE * self._deadline_seconds,
            simulated=self._simulated,
        )

    # --- merging ------------------------------------------------------------------------------

    def _merged(
        self, boot_ns: int, unix_ns: int, main: LaneTick, others: dict[str, LaneTick]
    ) -> NodeSample:
        samples: dict[str, GpuSample] = {}
        failures: dict[str, DeviceFailure] = {}
        drivers: list[str | None] = []
        for uuid, tick in ((None, main), *others.items()):
            for late in tick.late:
                self._keep_events(late)
            if tick.answer is None:
                continue
            told = tick.answer.sample
            drivers.append(told.driver)
            self._retired += told.retired
            if uuid is None:
                samples |= {s.device.key: s for s in told.samples if s.device.uuid not in others}
                failures |= {f.device.key: f for f in told.failures if f.device.uuid not in others}
            else:
                samples |= {item.device.key: item for item in told.samples}
                failures |= {item.device.key: item for item in told.failures}
        for key in samples:
            failures.pop(key, None)  # a nameless device's lane found out who it is
        retired, self._retired = tuple(self._retired), []
        for key in retired:
            self._devices.pop(key, None)
        self._devices |= {key: item.device for key, item in samples.items()}
        self._devices |= {
            key: item.device
            for key, item in failures.items()
            if key not in self._devices and not key.startswith(NAMELESS)
        }
        for key, device in self._devices.items():
            if key not in samples and key not in failures:
                tick = others.get(device.uuid, main)
                reason = self._reasons.get(device.uuid) or tick.reason
                failures[key] = DeviceFailure(
                    device=device, reason=reason if device.uuid in others else tick.reason
                )
        node_failure = main.reason if main.answer is None else main.answer.sample.failure
        return self._with_kept_xids(
            NodeSample(
                boot_ns=boot_ns,
                unix_ns=unix_ns,
                samples=tuple(samples.values()),
                failures=tuple(failures.values()),
                driver=next((driver for driver in drivers if driver is not None), None),
                failure=None
                if samples or (others and node_failure == "no_devices")
                else node_failure,
                retired=retired,
            )
        )

    def _keep_events(self, late: Answer) -> None:
        """Of an answer that came after its tick, keep what is told only once."""
        told = [(item.device.key, item.xids) for item in late.sample.samples]
        told += [(item.device.key, item.xids) for item in late.sample.failures]
        for key, xids in told:
            if xids:
                self._xids[key] = (*self._xids.get(key, ()), *xids)
        self._retired += late.sample.retired

    def _with_kept_xids(self, node: NodeSample) -> NodeSample:
        if not self._xids:
            return node
        kept, self._xids = self._xids, {}
        return msgspec.structs.replace(
            node,
            samples=tuple(
                msgspec.structs.replace(item, xids=(*kept.pop(item.device.key, ()), *item.xids))
                for item in node.samples
            ),
            failures=tuple(
                msgspec.structs.replace(item, xids=(*kept.pop(item.device.key, ()), *item.xids))
                for item in node.failures
            ),
        )

    def _dark(self, boot_ns: int, unix_ns: int, reason: str) -> NodeSample:
        return NodeSample(
            boot_ns=boot_ns,
            unix_ns=unix_ns,
            samples=(),
            failures=tuple(
                DeviceFailure(device=device, reason=reason) for device in self._devices.values()
            ),
            driver=None,
            failure=reason,
        )

    # --- learning and setting apart -----------------------------------------------------------

    def _learn(self, main: LaneTick, others: dict[str, LaneTick]) -> None:
        """Remember what a successor needs: scales, and where each GPU is."""
        for tick in (main, *others.values()):
            answer = tick.answer
            if answer is None:
                continue
            if answer.sample.driver not in (None, self._driver):
                self._driver = answer.sample.driver
                self._scales = {}  # another driver may count otherwise
            if answer.sample.failure is None:
                for sample in answer.sample.samples:
                    # One that is not believed any more is not passed on, either.
                    self._scales.pop(sample.device.key, None)
                self._scales |= answer.scales
            elif answer.sample.failure in DRIVER_GONE:
                self._places, self._device_count = {}, None
        if main.answer is not None and main.answer.device_count is not None:
            if main.answer.device_count != self._device_count:
                self._places = {}
            self._device_count = main.answer.device_count
            self._places |= main.answer.places

    def _set_apart(self, main: LaneTick, node: NodeSample, now_seconds: float) -> None:
        """Give a GPU that has been in trouble for long a lane of its own."""
        if main.answer is None:
            return
        told = main.answer.sample
        well = {item.device.uuid for item in told.samples}
        troubled = {
            item.device.uuid: item.reason
            for item in told.failures
            if told.failure is None and item.reason in TROUBLE and item.device.uuid not in well
        }
        stuck_index = main.answer.stuck_index
        if told.failure == "timeout" and stuck_index is not None:
            names = [uuid for uuid, index in self._places.items() if index == stuck_index]
            troubled[names[0] if names else f"{NAMELESS}{stuck_index}"] = "timeout"
        self._troubled = {
            uuid: self._troubled.get(uuid, now_seconds)
            for uuid in troubled
            if uuid not in self._apart
        }
        for item in node.failures:
            self._reasons[item.device.uuid] = item.reason
        for uuid, since_seconds in list(self._troubled.items()):
            if now_seconds - since_seconds >= self._patience.hang_seconds:
                del self._troubled[uuid]
                self._apart[uuid] = _Apart(Lane(self._launch, self._patience), self._only(uuid))
                self._lane.succeed()

    def _only(self, uuid: str) -> Selection:
        if uuid.startswith(NAMELESS):
            return Selection(only_index=int(uuid.removeprefix(NAMELESS)))
        places = {other: self._places[other] for other in self._apart if other in self._places}
        return Selection(only_uuid=uuid, places=places, device_count=self._device_count)

    def _look_after_apart(self, others: dict[str, LaneTick], now_seconds: float) -> None:
        """End a worker whose one GPU is still in trouble; learn the name of a nameless one."""
        for uuid, tick in others.items():
            apart = self._apart[uuid]
            if tick.answer is None:
                continue
            told = tick.answer.sample
            reasons = {item.reason for item in told.failures}
            self._bring_back(uuid, apart, now_seconds, reads=bool(told.samples))
            if told.samples or not reasons & TROUBLE:
                apart.since_seconds = None
            elif apart.since_seconds is None:
                apart.since_seconds = now_seconds
            if told.samples and uuid.startswith(NAMELESS):
                found = told.samples[0].device.uuid
                self._places[found] = int(uuid.removeprefix(NAMELESS))
                self._apart[found] = self._apart.pop(uuid)
            elif not told.samples and reasons & LOST:
                # It was asked, and is let go at once: whoever resets it needs it free.
                apart.lane.give_up("gpu_lost", next(iter(reasons & LOST)))
            elif (
                apart.since_seconds is not None
                and now_seconds - apart.since_seconds >= self._patience.hang_seconds
            ):
                apart.since_seconds = None
                apart.lane.give_up("hung", "timeout")

    # --- going back to the others -------------------------------------------------------------

    def _bring_back(self, uuid: str, apart: _Apart, now_seconds: float, *, reads: bool) -> None:
        """Have the others' worker read a GPU, too, that has been read for long; or give that up."""
        since = apart.rejoining_since_seconds
        if reads and apart.read_since_seconds is None:
            apart.read_since_seconds = now_seconds
        began = apart.read_since_seconds
        if since is not None:
            if not reads or now_seconds - since >= self._patience.start_seconds:
                apart.rejoining_since_seconds = None
                self._be_slower(uuid)
                self._lane.succeed()
                began = now_seconds
        elif reads and began is not None and now_seconds - began >= self._rejoin_after(uuid):
            apart.rejoining_since_seconds = now_seconds
            self._lane.succeed()
        apart.read_since_seconds = began if reads else None

    def _rejoined(self, main: LaneTick) -> list[str]:
        """GPUs that the others' worker reads from this tick on; their own workers end."""
        if main.answer is None:
            return []
        read = {item.device.uuid for item in main.answer.sample.samples}
        back = [
            uuid
            for uuid, apart in self._apart.items()
            if apart.rejoining_since_seconds is not None and uuid in read
        ]
        for uuid in back:
            lane = self._apart.pop(uuid).lane
            self._remember_restarts(lane)
            self._left += lane.end(kill=True)
            self._be_slower(uuid)
        return back

    def _rejoin_after(self, uuid: str) -> float:
        return self._rejoin_seconds.get(uuid, self._patience.rejoin_seconds)

    def _be_slower(self, uuid: str) -> None:
        longest = self._patience.rejoin_seconds_max
        self._rejoin_seconds[uuid] = min(2 * self._rejoin_after(uuid), longest)

    def _remember_restarts(self, lane: Lane) -> None:
        for why, number in lane.restarts.items():
            self._past_restarts[why] = self._past_restarts.get(why, 0) + number

    # --- ending -------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Ask every worker to leave, then kill what did not within the deadline."""
        lanes = [self._lane, *(apart.lane for apart in self._apart.values())]
        leaving: list[WorkerProcess] = []
        for lane in lanes:
            self._remember_restarts(lane)
            leaving += lane.end(kill=False)
        self._lane = Lane(self._launch, self._patience)
        self._apart, self._troubled, self._scales = {}, {}, {}
        until = self._seconds() + self._deadline_seconds
        for kill in (False, True):
            leaving = [process for process in leaving if not process.ended()]
            for process in leaving if kill else ():
                process.end(kill=True)
            while leaving and self._seconds() < until:
                self._wait((), min(LEAVING_CHECK_SECONDS, self._deadline_seconds))
                leaving = [process for process in leaving if not process.ended()]
            until = self._seconds() + KILL_SECONDS
        self._left = [process for process in (*self._left, *leaving) if not process.ended()]
        self._count()

    def _count(self) -> None:
        lanes = [self._lane, *(apart.lane for apart in self._apart.values())]
        restarts = dict(self._past_restarts)
        for lane in lanes:
            for why, number in lane.restarts.items():
                restarts[why] = restarts.get(why, 0) + number
        self._left = [process for process in self._left if not process.ended()]
        self.counts = WorkerCounts(
            running_workers=sum(lane.running for lane in lanes),
            abandoned_workers=len(self._left) + sum(lane.abandoned for lane in lanes),
            restarts=restarts,
        )
