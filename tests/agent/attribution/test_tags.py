"""The registry forgets nobody who lives, and the socket believes the kernel, not the client."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution import tags as room
from flopledger_agent.attribution.processes import PsutilProcessTable
from flopledger_agent.attribution.tag_client import (
    CommandNotStarted,
    TagNotRegistered,
    register,
    run_tagged,
)
from flopledger_agent.attribution.tag_values import Tags
from flopledger_agent.attribution.tags import (
    REQUEST_BYTES_MAX,
    TagRegistry,
    TagServer,
    answer,
)
from flopledger_agent.errors import StateError
from flopledger_core.errors import InvalidInput
from tests.agent.attribution.people import PATIENT_SECONDS, FakeProcessTable, process, running

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
CLIENT = """
import os, sys
from pathlib import Path
from flopledger_agent.attribution.tag_client import run_tagged
from flopledger_agent.attribution.tag_values import Tags
run_tagged(Path(sys.argv[1]), Tags(project="atlas", run="r1"), sys.argv[2:],
           environ=os.environ, warn=lambda text: print(text, file=sys.stderr))
"""


class Listening:
    """A server in a temporary folder, with its registry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = TagRegistry(PsutilProcessTable())
        self.server = TagServer(path, self.registry)
        self.server.start()

    def ask(self, line: bytes) -> dict[str, object]:
        """One raw line in, one answer out."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENT_SECONDS)
            connection.connect(str(self.path))
            connection.sendall(line)
            reply: dict[str, object] = json.loads(connection.makefile("rb").readline())
            return reply


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    """A running server."""
    it = Listening(tmp_path / "run" / "tags.sock")
    yield it
    it.server.stop()


def client(path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """The client as a program of its own."""
    source = os.pathsep.join([str(ROOT / "agent"), str(ROOT / "core")])
    return subprocess.run(
        [sys.executable, "-c", CLIENT, str(path), *command],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False,
    )  # fmt: skip


# --- registry ---------------------------------------------------------------------------------


def test_tags_of_processes_that_ended_vanish() -> None:
    """Known by create time: a successor with the same pid does not keep the entry alive."""
    table = FakeProcessTable(process(1), process(2), process(3))
    registry = TagRegistry(table)
    for pid in (1, 2, 3):
        registry.register(table.processes[pid], Tags(project=f"p{pid}"))
    del table.processes[1]
    table.processes[2] = process(2, create_time_ms=99)
    assert [entry.tags.project for entry in registry.entries()] == ["p3"]


def test_the_registry_is_bounded_and_makes_room_by_forgetting_the_dead() -> None:
    """A full registry of living processes refuses with a sentence; nobody living is dropped."""
    table = FakeProcessTable(process(1), process(2), process(3))
    registry = TagRegistry(table, tags_max=2)
    registry.register(table.processes[1], Tags(project="a"))
    registry.register(table.processes[2], Tags(project="b"))
    with pytest.raises(InvalidInput, match="FLOPLEDGER_"):
        registry.register(table.processes[3], Tags(project="c"))
    registry.register(table.processes[2], Tags(project="again"))
    del table.processes[1]
    registry.register(table.processes[3], Tags(project="c"))
    assert [entry.tags.project for entry in registry.entries()] == ["again", "c"]


def test_every_change_shows_in_the_version() -> None:
    """Judgements made before it are made again."""
    table = FakeProcessTable(process(1))
    registry = TagRegistry(table)
    versions = [registry.version]
    registry.register(table.processes[1], Tags(project="a"))
    versions.append(registry.version)
    del table.processes[1]
    registry.entries()
    versions.append(registry.version)
    assert versions == sorted(set(versions))


@pytest.mark.parametrize(
    ("tags", "field"),
    [
        (Tags(project="a b"), "project"),
        (Tags(project=""), "project"),
        (Tags(project="idle"), "project"),
        (Tags(project="a", run="\n"), "run"),
        (Tags(project="a", activity="magic"), "activity"),
        (Tags(project="a", precision="fp7"), "precision"),
    ],
)
def test_invalid_tags_are_refused_with_the_field(tags: Tags, field: str) -> None:
    """Here somebody is there to read the sentence."""
    table = FakeProcessTable(process(1))
    with pytest.raises(InvalidInput, match=field):
        TagRegistry(table).register(table.processes[1], tags)


# --- answers ----------------------------------------------------------------------------------


def test_only_own_processes_can_be_tagged() -> None:
    """The user is the kernel's word; root may tag for others."""
    me, mine, other = (process(pid, user=user) for pid, user in ((1, "me"), (2, "me"), (3, "you")))
    registry = TagRegistry(FakeProcessTable(me, mine, other))

    def ask(pid: int, uid: int) -> room.TagAnswer:
        request = room.TagRequest(tags=Tags(project="a"), pid=pid)
        return answer(msgspec.json.encode(request), pid=1, uid=uid, registry=registry)

    stranger = 2**31 - 7  # no user has it
    assert "somebody else" in (ask(3, stranger).error or "")
    assert "somebody else" in (ask(1, stranger).error or "")
    assert ask(3, 0).registered_pid == 3
    assert "not visible" in (ask(99, 0).error or "")


@pytest.mark.parametrize("uid", [0, 1001])
def test_a_reused_pid_is_not_tagged_for_its_former_owner(uid: int) -> None:
    """Between the connection and the look the client may be gone and its pid another user's."""
    now = msgspec.structs.replace(process(1, user="bob"), uid=1002)
    registry = TagRegistry(FakeProcessTable(now))
    for request in (b'{"tags":{"project":"a"}}', b'{"tags":{"project":"a"},"pid":1}'):
        assert "somebody else" in (answer(request, pid=1, uid=uid, registry=registry).error or "")
    assert registry.entries() == ()
    own = answer(b'{"tags":{"project":"a"}}', pid=1, uid=1002, registry=registry)
    assert own.registered_pid == 1


@given(st.one_of(st.binary(max_size=300), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.dictionaries(st.sampled_from(["tags", "pid", "project", "run", "x"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_request_gets_an_answer(line: bytes) -> None:
    """Never an exception; a refusal is a sentence."""
    registry = TagRegistry(FakeProcessTable(process(1)))
    reply = answer(line, pid=1, uid=1, registry=registry)
    assert (reply.registered_pid is None) != (reply.error is None)


# --- socket -----------------------------------------------------------------------------------


def test_a_client_registers_itself(listening: Listening) -> None:
    """The pid comes from the kernel, and the answer says which it was."""
    reply = listening.ask(b'{"tags":{"project":"atlas"}}\n')
    assert reply == {"registered": os.getpid()}
    assert [entry.pid for entry in listening.registry.entries()] == [os.getpid()]


def test_the_socket_is_open_to_every_user(listening: Listening) -> None:
    """Jobs run under other users than the agent."""
    mode = listening.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o666


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"hello\n", "not a tag request"),
        (b'{"tags":{"project":7}}\n', "not a tag request"),
        (b'{"tags":{"project":"a"},"pid":"x"}\n', "not a tag request"),
        (b'{"tags":{"project":"a","root":"yes"}}\n', "not a tag request"),
        (b'{"tags":{"project":"a b"}}\n', "project is 'a b'"),
        (b"x" * (REQUEST_BYTES_MAX + 5), "longer than"),
        (b'{"tags"', "did not end in time"),
    ],
)
def test_a_bad_request_is_answered_with_a_sentence(
    listening: Listening, line: bytes, sentence: str
) -> None:
    """And the server goes on."""
    assert sentence in str(listening.ask(line)["error"])
    assert "registered" in listening.ask(b'{"tags":{"project":"atlas"}}\n')


def test_silent_clients_keep_nobody_out(listening: Listening) -> None:
    """Many connections that say nothing, and one that does."""
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(8)]
    try:
        for connection in silent:
            connection.connect(str(listening.path))
        assert "registered" in listening.ask(b'{"tags":{"project":"atlas"}}\n')
    finally:
        for connection in silent:
            connection.close()


def test_many_clients_at_once_are_all_registered(listening: Listening) -> None:
    """A job with many ranks starts in one instant."""
    with running() as one, running() as two:
        pids = [one.pid, two.pid] * 4
        threads = [
            threading.Thread(
                target=register,
                args=(listening.path, Tags(project="a")),
                kwargs={"pid": pid},
            )
            for pid in pids
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENT_SECONDS)
        assert {entry.pid for entry in listening.registry.entries()} == set(pids)


def test_a_socket_of_a_dead_agent_is_taken_over(tmp_path: Path) -> None:
    """After SIGKILL the file is still there."""
    path = tmp_path / "tags.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    it = Listening(path)
    assert "registered" in it.ask(b'{"tags":{"project":"atlas"}}\n')
    it.server.stop()
    assert not path.exists()
    it.server.stop()


def test_what_cannot_be_listened_on_is_refused_with_a_remedy(
    tmp_path: Path, listening: Listening
) -> None:
    """Another agent, another file, a path too long, a folder that is none."""
    registry = listening.registry
    with pytest.raises(StateError, match="another agent"):
        TagServer(listening.path, registry).start()
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(StateError, match="no socket"):
        TagServer(file, registry).start()
    assert file.read_text() == "precious"
    with pytest.raises(StateError, match="shorter path"):
        TagServer(tmp_path / ("x" * 120), registry).start()
    with pytest.raises(StateError, match=r"tags\.socket"):
        TagServer(file / "tags.sock", registry).start()


# --- client -----------------------------------------------------------------------------------


def test_the_command_runs_tagged_under_the_clients_pid(listening: Listening) -> None:
    """Registered, with the tags in its environment too, and its exit status is its own."""
    code = "import os, sys; print(os.getpid(), os.environ['FLOPLEDGER_RUN']); sys.exit(7)"
    done = client(listening.path, sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (7, "")
    pid, run = done.stdout.split()
    assert run == "r1"
    assert [str(pid) for pid, _create_time_ms in listening.registry._entries] == [pid]


def test_without_an_agent_the_command_runs_all_the_same(tmp_path: Path) -> None:
    """One sentence on standard error; the environment still says it."""
    code = "import os; print(os.environ['FLOPLEDGER_PROJECT'])"
    done = client(tmp_path / "none.sock", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "atlas\n")
    assert done.stderr.count("\n") == 1
    assert "does not answer" in done.stderr


def test_a_server_that_says_nonsense_does_not_stop_the_command(tmp_path: Path) -> None:
    """Or nothing at all."""
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as odd:
        odd.bind(str(path))
        odd.listen()

        def reply() -> None:
            connection, _ = odd.accept()
            connection.recv(1000)
            connection.sendall(b"?\n")
            connection.close()

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(TagNotRegistered, match="no answer"):
            register(path, Tags(project="a"))
        thread.join(PATIENT_SECONDS)


def test_a_socket_path_that_is_none_is_only_a_warning() -> None:
    """Too long for the kernel, or with a zero in it: still the job's start is not at stake."""
    for path in (Path("/" + "x" * 200), Path("/a\0b")):
        with pytest.raises(TagNotRegistered, match="does not answer"):
            register(path, Tags(project="a"))


@pytest.mark.parametrize(
    ("command", "status"), [("no-such-command-anywhere", 127), ("/", 126), ("a\0b", 126)]
)
def test_a_command_that_cannot_start_exits_as_in_a_shell(
    tmp_path: Path, command: str, status: int
) -> None:
    """127 for no such command, 126 for one that is none."""
    with pytest.raises(CommandNotStarted) as caught:
        run_tagged(
            tmp_path / "none.sock", Tags(project="a"), [command], environ={}, warn=lambda _: None
        )
    assert caught.value.status == status


def test_unusable_tags_are_told_before_anything_starts(tmp_path: Path) -> None:
    """A typing mistake is misuse, not a running job."""
    with pytest.raises(InvalidInput, match="activity"):
        run_tagged(
            tmp_path / "none.sock", Tags(project="a", activity="magic"), ["true"], environ={},
            warn=lambda _: None,
        )  # fmt: skip
