"""Two agents of one node: the second is refused, whatever state directory it has."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.errors import StateError
from flopledger_agent.node_lock import NodeLock
from tests.agent.test_daemon import config_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AGENT = """
import functools, sys, threading
from pathlib import Path
from flopledger_agent.config import load_config
from flopledger_agent.daemon import Daemon
from flopledger_agent.errors import AgentError
from flopledger_agent.node_lock import NodeLock
config, file, name = sys.argv[1:]
hold = functools.partial(NodeLock, file=Path(file), name=name)
stop = threading.Event()
try:
    daemon = Daemon(load_config(Path(config)), stop, hold_node=hold)
except AgentError as error:
    sys.exit(str(error))
threading.Thread(target=lambda: (print("up", flush=True), sys.stdin.read(), stop.set())).start()
sys.exit(daemon.run())
"""


def unheard(text: str) -> None:
    """A warning that this test does not look at."""
    assert text


class Place:
    """A node's lock handles of its own, so that no real agent is in the way."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "run" / "node.lock"
        self.name = f"flopledger-test/{secrets.token_hex(8)}"

    def hold(self, warn: list[str] | None = None) -> NodeLock:
        """Hold the node in this process."""
        return NodeLock((warn if warn is not None else []).append, file=self.file, name=self.name)

    @contextlib.contextmanager
    def agent(self, name: str, *, real: bool = True) -> Iterator[subprocess.Popen[str]]:
        """A real agent with a state directory of its own, on the real driver or a simulated one."""
        home = self.root / name
        home.mkdir()
        text = config_text(home, speed="1")
        if real:
            text = text.partition("[clock]")[0]
            text = text.replace('driver = "simulated"', 'driver = "nvml"')
            text = "\n".join(line for line in text.splitlines() if "scenario" not in line)
        (home / "agent.toml").write_text(text)
        arguments = (str(home / "agent.toml"), str(self.file), self.name)
        with subprocess.Popen(
            [sys.executable, "-c", AGENT, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as agent:  # fmt: skip
            try:
                yield agent
            finally:
                with contextlib.suppress(ValueError):
                    agent.communicate(timeout=60)


def is_up(agent: subprocess.Popen[str]) -> bool:
    """Whether the agent runs; it says so, or ends."""
    assert agent.stdout is not None
    return agent.stdout.readline() == "up\n"


def test_peers_row_5_a_second_agent_on_the_node_is_refused(tmp_path: Path) -> None:
    """With the remedy in the sentence; when the first one is gone the next may."""
    place = Place(tmp_path)
    with place.agent("one") as one:
        assert is_up(one)
        with place.agent("two") as two:
            _, said = two.communicate(timeout=60)
            assert two.returncode == 1
            assert "this node is metered already" in said
            assert "stop that agent first" in said
    with place.agent("three") as three:
        assert is_up(three)


def test_agents_that_died_hold_nothing(tmp_path: Path) -> None:
    """The kernel lets go of both handles."""
    place = Place(tmp_path)
    with place.agent("one") as one:
        assert is_up(one)
        one.kill()
    place.hold().release()


def test_simulated_agents_may_be_many(tmp_path: Path) -> None:
    """The demo runs several on one machine, beside a real one."""
    place = Place(tmp_path)
    held = place.hold()
    try:
        with place.agent("one", real=False) as one, place.agent("two", real=False) as two:
            assert is_up(one)
            assert is_up(two)
    finally:
        held.release()


def test_either_handle_is_enough(tmp_path: Path) -> None:
    """Another network namespace, or another /run: the one that is shared refuses."""
    place, other = Place(tmp_path), Place(tmp_path / "elsewhere")
    held = place.hold()
    try:
        with pytest.raises(StateError, match=r"node\.lock"):
            NodeLock(unheard, file=place.file, name=other.name)
        with pytest.raises(StateError, match=f"process {os.getpid()} of user"):
            NodeLock(unheard, file=other.file, name=place.name)
    finally:
        held.release()
    NodeLock(unheard, file=other.file, name=place.name).release()


def test_a_refused_agent_keeps_neither_handle(tmp_path: Path) -> None:
    """It got the file, not the socket: the next one finds the file free."""
    place, other = Place(tmp_path), Place(tmp_path / "elsewhere")
    held = place.hold()
    with pytest.raises(StateError):
        NodeLock(unheard, file=other.file, name=place.name)
    held.release()
    other.hold().release()


def test_without_a_file_the_socket_decides_and_it_is_said(tmp_path: Path) -> None:
    """A place that cannot be written is a warning, not a refusal."""
    place = Place(tmp_path)
    (tmp_path / "file").write_text("")
    warned: list[str] = []
    lock = NodeLock(warned.append, file=tmp_path / "file" / "node.lock", name=place.name)
    try:
        assert len(warned) == 1
        assert "would not be noticed" in warned[0]
        with pytest.raises(StateError):
            NodeLock(warned.append, file=tmp_path / "file" / "node.lock", name=place.name)
    finally:
        lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_stranger_cannot_keep_the_nodes_agent_out(tmp_path: Path) -> None:
    """Any user can take an abstract name; who may lock the node's file does not give way."""
    place = Place(tmp_path)
    squatter = (
        "import os, socket, sys\nos.setuid(65534)\n"
        "held = socket.socket(socket.AF_UNIX)\nheld.bind('\\0' + sys.argv[1])\nheld.listen(1)\n"
        "print('up', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", squatter, place.name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as stranger:  # fmt: skip
        assert is_up(stranger)
        warned: list[str] = []
        place.hold(warned).release()
        assert "is ignored; stop it" in warned[0]
        (tmp_path / "file").write_text("")
        with pytest.raises(StateError, match="metered already"):
            NodeLock(warned.append, file=tmp_path / "file" / "x", name=place.name)
        stranger.communicate(timeout=60)


def test_many_refused_starts_fill_no_queue(tmp_path: Path) -> None:
    """The holder lets go of those who asked, so that each is told who holds it."""
    place = Place(tmp_path)
    held = place.hold()
    try:
        for _ in range(300):
            with pytest.raises(StateError, match=f"process {os.getpid()} of user"):
                NodeLock(unheard, file=tmp_path / "other.lock", name=place.name)
            held.drain()
    finally:
        held.release()
    with socket.socket(socket.AF_UNIX) as free:
        free.bind("\0" + place.name)
