"""The daemon and its shipping thread: whatever goes wrong, reporting goes on and stopping ends."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from flopledger_agent import shipping as shipping_module
from flopledger_agent.clocks import SystemClock
from flopledger_agent.config import parse_config
from flopledger_agent.daemon import Daemon, lock_state
from flopledger_agent.disk import MemoryDisk
from flopledger_agent.errors import AgentError, CollectorUnreachable, SpoolFull, StateError
from flopledger_agent.shipper import Answer, Answers, Shipper
from flopledger_agent.shipping import Shipping
from flopledger_agent.spool import Spool, file_name
from flopledger_core.batch import decode, split_batches
from tests.agent.sealing import sealed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flopledger_agent.loop import AgentLoop

OLD, NEW = "11" * 16, "22" * 16
DEADLINE_SECONDS = 20.0
SCENARIO = """driver_version = "595.71.05"
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus.phases]]
seconds = 86400
sm_clock_mhz = 1755
power_watts = 600
sm_active = 0.9
pipes = { hmma = 0.5 }
processes = ["train"]
[processes.train]
pid = 10000001
environ = { FLOPLEDGER_PROJECT = "atlas" }
"""


class FakeCollector:
    """Admits everything, unless told to do something else first."""

    def __init__(self, *instead: Callable[[], None]) -> None:
        self.instead = list(instead)
        self.received: list[tuple[str, int]] = []
        self.ledgers = 0

    def ledger_id(self, *, limit_seconds: float | None = None) -> str:
        """The ledger."""
        self.ledgers += 1
        return "ab" * 16

    def send(self, content: bytes, *, limit_seconds: float | None = None) -> Answers:
        """Admit."""
        if self.instead:
            self.instead.pop(0)()
        names = [
            (header.stream_id, header.sequence)
            for header in (decode(batch).header for batch in split_batches(content))
        ]
        self.received += names
        return Answers(
            answers=tuple(
                Answer(stream_id=stream, sequence=sequence, outcome="admitted", message="")
                for stream, sequence in names
            )
        )


class World:
    """A spool with batches 0 to 2 of two streams, and a shipping thread beside it."""

    def __init__(self, collector: FakeCollector) -> None:
        self.disk = MemoryDisk()
        self.spool = Spool(self.disk, 2**20)
        for stream in (OLD, NEW):
            for sequence in range(3):
                self.spool.put(stream, sequence, sealed(stream, sequence))
        self.learned: list[str] = []
        self.shipper = Shipper(self.spool, lambda: 0.0)
        loop = SimpleNamespace(
            view=SimpleNamespace(stream_id=NEW, ledger_id=None),
            spool_lock=threading.Lock(),
            learn_ledger=self.learned.append,
        )
        self.shipping = Shipping(
            loop=cast("AgentLoop", loop),
            spool=self.spool,
            shipper=self.shipper,
            collector=collector,
            clock=SystemClock(),
            jitter_ns=0,
        )


def wait_until(true: Callable[[], object]) -> None:
    """Poll with a deadline."""
    pause, deadline = threading.Event(), time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        pause.wait(0.02)


def raising(error: Exception) -> Callable[[], None]:
    """Something that raises."""

    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("x"), "unexpected_error"),
        (OSError("x"), "unexpected_error"),
        (RecursionError("x"), "unexpected_error"),
        (StateError("x"), "state_directory"),
        (CollectorUnreachable("timeout", "x"), "timeout"),
    ],
)
def test_no_error_ends_the_shipping_thread(
    error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted, said once, waited out, and everything is delivered afterwards."""
    collector = FakeCollector(*[raising(error)] * 2)
    world = World(collector)
    world.shipping.start()
    wait_until(lambda: not len(world.spool))
    world.shipping.finish()

    assert world.shipper.failures == {reason: 2}
    assert collector.received == [(stream, n) for stream in (OLD, NEW) for n in range(3)]
    [said] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (said.exc_info is not None) == (reason == "unexpected_error")


def test_a_damaged_batch_stops_its_stream_and_no_other() -> None:
    """What comes before it is sent, what follows waits, the other stream goes on."""
    collector = FakeCollector()
    world = World(collector)
    world.disk.write(file_name(OLD, 1), sealed(OLD, 1)[:100], durable=True)
    while world.shipping.ship_once():
        pass

    assert collector.received == [(OLD, 0), (NEW, 0), (NEW, 1), (NEW, 2)]
    assert world.spool.quarantined == 1
    assert [batch.sequence for batch in world.spool.batches()] == [2]
    assert world.shipper.blocked[OLD].outcome == "damaged"


def test_the_ledger_is_asked_at_first_and_after_a_refusal() -> None:
    """A collector with a new ledger refuses: then the loop must learn which one it is."""
    collector = FakeCollector()
    world = World(collector)
    admit, refusals = collector.send, 1

    def refuse_once(content: bytes, *, limit_seconds: float | None = None) -> Answers:
        nonlocal refusals
        refusals -= 1
        if refusals < 0:
            return admit(content)
        return Answers(answers=(Answer(stream_id=OLD, sequence=0, outcome="refused"),))

    collector.send = refuse_once  # type: ignore[method-assign]
    while world.shipping.ship_once():
        pass

    assert len(world.learned) == 2


def test_stopping_waits_only_so_long_for_a_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that hangs is left behind."""
    monkeypatch.setattr(shipping_module, "STOP_DELIVERY_SECONDS", 0.3)
    hang = threading.Event()
    world = World(FakeCollector(lambda: cast("None", hang.wait(DEADLINE_SECONDS))))
    world.shipping.start()
    began = time.monotonic()
    world.shipping.finish()
    took = time.monotonic() - began
    hang.set()

    assert took < 5


def config_text(root: Path, **changes: str) -> str:
    """An agent's configuration in a directory, simulated, whose collector is not at home."""
    values = {
        "state": f"{root}/state",
        "socket": f"{root}/tags.sock",
        "web": "127.0.0.1:0",
        "speed": "60",
    } | changes
    (root / "scenario.toml").write_text(SCENARIO)
    return (
        f'[collector]\nurl = "http://127.0.0.1:9"\njitter_seconds = 0\n[node]\nname = "n1"\n'
        f'[state]\ndirectory = "{values["state"]}"\n[tags]\nsocket = "{values["socket"]}"\n'
        f'[web]\nlisten_address = "{values["web"]}"\n[gpus]\ndriver = "simulated"\n'
        f'scenario = "{root}/scenario.toml"\n[clock]\nspeed = {values["speed"]}\n'
        f"real_origin_unix_ns = {time.time_ns()}\norigin_unix_ns = 1764000000000000000\n"
    )


def make(root: Path, **changes: str) -> tuple[Daemon, threading.Event]:
    """A daemon in a directory."""
    stop = threading.Event()
    return Daemon(parse_config(config_text(root, **changes), "test"), stop), stop


def healthz(built: Daemon) -> tuple[int, str]:
    """What the page answers."""
    port = built._server.server_address[1]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def run_beside(built: Daemon, act: Callable[[], None], stop: threading.Event) -> int:
    """Run the daemon here and `act` in a thread once it ticks; its exit status."""
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            wait_until(lambda: built._ticks > 1)
            act()
        except BaseException as error:  # noqa: BLE001 (told below)
            failed.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=beside)
    thread.start()
    status = built.run()
    thread.join(DEADLINE_SECONDS)
    assert not failed, failed
    return status


def test_health_tells_of_a_standstill_and_of_a_dead_thread(tmp_path: Path) -> None:
    """200 while it works, 503 and a sentence when it does not."""
    built, stop = make(tmp_path)
    told: list[tuple[int, str]] = []

    def act() -> None:
        told.append(healthz(built))
        alive = built._shipping._thread
        built._shipping._thread = threading.Thread()
        told.append(healthz(built))
        built._shipping._thread = alive

    assert run_beside(built, act, stop) == 0
    built._last_tick_at = time.monotonic() - 31

    assert told == [(200, "ok\n"), (503, "the shipping thread has ended: restart the agent\n")]
    assert "nothing was sampled for 31 seconds" in (built.trouble() or "")


def test_windows_that_cannot_be_sealed_are_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is said once, shown on the page, and the exit status is 1."""
    built, stop = make(tmp_path)
    page: list[str] = []

    def full(*_: object, **__: object) -> None:
        raise SpoolFull("no space left")

    def act() -> None:
        monkeypatch.setattr(built._disk, "write", full)
        ticks = built._ticks
        wait_until(lambda: built._ticks > ticks + 3)
        port = built._server.server_address[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            page.append(response.read().decode())

    assert run_beside(built, act, stop) == 1
    assert "flopledger_agent_sealing_blocked 1.0" in page[0]
    assert [record.message for record in caplog.records].count("no space left") == 1


def test_every_step_of_stopping_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails keeps none of the next ones from happening; the status tells."""
    built, stop = make(tmp_path)
    monkeypatch.setattr(built._loop, "stop", raising(RuntimeError("defect")))
    finish = built._shipping.finish
    monkeypatch.setattr(built._shipping, "finish", raising(RuntimeError("defect")))

    assert run_beside(built, lambda: None, stop) == 1
    finish()  # no thread of this test may outlive it
    assert not (tmp_path / "tags.sock").exists()
    os.close(lock_state(tmp_path / "state"))  # the state directory is free again


def test_only_the_page_blames_its_address(tmp_path: Path) -> None:
    """Errors name the setting they come from."""
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(AgentError, match=r"web\.listen_address is .* in use"),
    ):
        make(tmp_path, web=f"127.0.0.1:{taken.getsockname()[1]}")


def test_an_unusable_state_directory_is_named(tmp_path: Path) -> None:
    """It is the state directory's fault, not the page's."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match=r"state\.directory is .*file"):
        make(tmp_path, state=f"{tmp_path}/file/below")
    with pytest.raises(StateError, match=r"state\.directory is .*remove or rename"):
        make(tmp_path, state=f"{tmp_path}/file")
