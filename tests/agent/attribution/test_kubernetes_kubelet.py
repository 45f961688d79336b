"""kubelet is asked over its own protocol; it is read exactly, and nothing waits for it."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.kubelet_messages import (
    ClaimedDevice,
    GrantedDevice,
    NotAPodList,
    decode_pod_list,
)
from flopledger_agent.attribution.kubelet_resources import (
    BACKOFF_SECONDS_MAX,
    KubeletClient,
    KubeletPoller,
    KubeletUnreachable,
)
from flopledger_agent.attribution.kubernetes_section import KubernetesSection
from flopledger_agent.clocks import SystemClock
from tests.agent.attribution.kubernetes_servers import encoded, golden, kubelet_serving
from tests.agent.attribution.people import until

LISTS = ("whole-gpus", "mig", "time-sliced", "gke", "dra", "cpu-only")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where kubelet listens."""
    return tmp_path / "kubelet.sock"


def poller(path: Path, **given: Any) -> KubeletPoller:
    """A poller whose chances are fixed."""
    section = KubernetesSection(kubelet_socket=str(path), **given)
    return KubeletPoller(section, SystemClock(), chance=random.Random(1))


# --- the message ----------------------------------------------------------------------------------


def understood(content: dict[str, Any]) -> list[Any]:
    """What a JSON list says, read from the JSON itself: (pod, container, devices, claims)."""
    found = []
    for pod in content.get("pod_resources", ()):
        for one in pod.get("containers", ()):
            devices = [
                (group.get("resource_name", ""), device)
                for group in one.get("devices", ())
                for device in group.get("device_ids", ())
            ]
            claims = [
                (
                    f"{claim.get('claim_namespace', '')}/{claim.get('claim_name', '')}",
                    resource.get("driver_name", ""),
                    resource.get("pool_name", ""),
                    resource.get("device_name", ""),
                )
                for claim in one.get("dynamic_resources", ())
                for resource in claim.get("claim_resources", ())
            ]
            if devices or claims:
                key = f"{pod.get('namespace', '')}/{pod.get('name', '')}"
                found.append((key, one.get("name", ""), devices, claims))
    return found


def decoded(message: bytes) -> list[Any]:
    """The same of our own decoder."""
    return [
        (
            pod.key,
            one.name,
            [(d.resource, d.device_id) for d in one.devices],
            [(c.claim, c.driver, c.pool, c.device) for c in one.claims],
        )
        for pod in decode_pod_list(message)
        for one in pod.containers
    ]


@pytest.mark.parametrize("name", LISTS)
def test_recorded_lists_are_read_as_protobuf_wrote_them(name: str) -> None:
    """Encoded by the protobuf library, decoded by us: the same pods, devices and claims."""
    content = golden(name)
    assert decoded(encoded(content)) == understood(content)


NAME = st.text(max_size=12)
DEVICES = st.fixed_dictionaries({"resource_name": NAME, "device_ids": st.lists(NAME, max_size=3)})
NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)
CLAIM = st.fixed_dictionaries(
    {
        "claim_name": NAME,
        "claim_namespace": NAME,
        "claim_resources": st.lists(
            st.fixed_dictionaries({"driver_name": NAME, "pool_name": NAME, "device_name": NAME}),
            max_size=2,
        ),
    }
)
CONTAINER = st.fixed_dictionaries(
    {
        "name": NAME,
        "devices": st.lists(DEVICES, max_size=2),
        "cpu_ids": NUMBERS,
        "memory": st.lists(
            st.fixed_dictionaries({"memory_type": NAME, "size": st.integers(0, 2**64 - 1)}),
            max_size=2,
        ),
        "dynamic_resources": st.lists(CLAIM, max_size=2),
    }
)
POD = st.fixed_dictionaries(
    {"name": NAME, "namespace": NAME, "containers": st.lists(CONTAINER, max_size=2)}
)


@given(st.lists(POD, max_size=3))
def test_any_list_is_read_as_protobuf_wrote_it(pods: list[Any]) -> None:
    """Whatever the values, in the library's own encoding."""
    content = {"pod_resources": pods}
    assert decoded(encoded(content)) == understood(content)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_list_are_refused_or_read(message: bytes) -> None:
    """One kind of error and no other; never a hang."""
    with contextlib.suppress(NotAPodList):
        decode_pod_list(message)


@given(st.sampled_from(LISTS), st.integers(0, 4000))
def test_a_list_that_was_cut_is_never_another_list(name: str, place: int) -> None:
    """A cut answer is refused, unless it was cut between two pods."""
    whole = encoded(golden(name))
    try:
        cut = decode_pod_list(whole[:place])
    except NotAPodList:
        return
    assert decode_pod_list(whole)[: len(cut)] == cut


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x00\x00",
        b"\x0b",
        b"\xff" * 11,
        b"\x0a\x03\x0a\x01\xff",
        b"\x09a",
    ],
)
def test_damaged_messages_are_refused(message: bytes) -> None:
    """Missing bytes, field zero, unknown wire types, endless numbers, names that are no UTF-8."""
    with pytest.raises(NotAPodList):
        decode_pod_list(message)


def test_fields_of_later_versions_are_skipped() -> None:
    """Every wire type, with a number nobody knows yet."""
    unknown = b"\xf8\x07\x96\x01" + b"\xf9\x07" + b"8bytes!!" + b"\xfa\x07\x02hi" + b"\xfd\x074byt"
    assert decode_pod_list(unknown + encoded(golden("mig")) + unknown) == decode_pod_list(
        encoded(golden("mig"))
    )


# --- the server -----------------------------------------------------------------------------------


def test_a_kubelet_is_asked(path: Path) -> None:
    """Over a real unix socket and real gRPC; CPU-only pods are listed without devices."""
    with kubelet_serving(path, encoded(golden("whole-gpus"))) as server:
        client = KubeletClient(str(path))
        pods = client.list_pods(5)
        client.close()
    assert server.authorities == ["localhost"]  # a socket's path is no host name
    assert [(pod.key, len(pod.containers)) for pod in pods] == [
        ("research/train-0", 1),
        ("research/train-1", 1),
        ("kube-system/coredns-7c65d6cfc9-x2x4k", 0),
    ]
    assert pods[0].containers[0].devices[0] == GrantedDevice(
        resource="nvidia.com/gpu", device_id="GPU-11111111-1111-4111-8111-111111111111"
    )


def test_claims_are_read(path: Path) -> None:
    """DRA: driver, pool and device of each claim."""
    with kubelet_serving(path, encoded(golden("dra"))):
        client = KubeletClient(str(path))
        pods = client.list_pods(5)
        client.close()
    assert pods[0].containers[0].claims == (
        ClaimedDevice(
            claim="gpu-test3/single-gpu", driver="gpu.nvidia.com", pool="node-1", device="gpu-0"
        ),
    )


def test_a_slow_kubelet_ends_at_the_deadline(path: Path) -> None:
    """Nobody waits longer than he was told to."""
    with kubelet_serving(path) as server:
        server.hold.clear()
        with pytest.raises(KubeletUnreachable, match="DEADLINE_EXCEEDED"):
            KubeletClient(str(path)).list_pods(0.2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "before 1.20"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "interval_seconds"),
        (grpc.StatusCode.PERMISSION_DENIED, "does not let"),
        (grpc.StatusCode.INTERNAL, "INTERNAL"),
        (b"\x0a\xff\xff\xff\xff\x0f", "no list of pod resources"),
    ],
)
def test_refusals_and_lies_are_said_with_a_remedy(path: Path, answer: Any, words: str) -> None:
    """Each failure has its own sentence."""
    with kubelet_serving(path, answer), pytest.raises(KubeletUnreachable, match=words):
        KubeletClient(str(path)).list_pods(5)


def test_a_socket_that_is_not_there_is_said(path: Path) -> None:
    """Before gRPC says something general."""
    with pytest.raises(KubeletUnreachable, match="mount its directory"):
        KubeletClient(str(path)).list_pods(1)
    path.write_text("")
    with pytest.raises(KubeletUnreachable, match="is no socket"):
        KubeletClient(str(path)).list_pods(1)


def test_a_kubelet_that_restarts_is_found_again(path: Path) -> None:
    """It replaces its socket; the last list and the failure stand until it answers."""
    with kubelet_serving(path, encoded(golden("mig"))):
        asking = poller(path, timeout_seconds=2.0)
        asking.poll_once()
    first = asking._view
    asking.poll_once()
    assert asking._view.pods == first.pods
    assert asking._view.as_of_boot_ns == first.as_of_boot_ns
    assert asking._view.failure is not None
    with kubelet_serving(path, encoded(golden("time-sliced"))):
        asking.poll_once()
    assert asking._view.failure is None
    assert len(asking._view.pods) == 3
    assert asking._view.sequence == 2
    asking.close()


def test_a_dying_kubelet_costs_one_question(path: Path) -> None:
    """It ends in the middle of an answer: a failure, and the thread goes on."""
    with kubelet_serving(path) as server:
        server.hold.clear()
        asking = poller(path, timeout_seconds=30.0, interval_seconds=1.0)
        asking.latest()
        until(lambda: server.calls, "a question")
        server.stop()
        until(lambda: asking.latest().failure, "a failure")
        asking.close()


def test_closing_does_not_wait(path: Path) -> None:
    """A question under way fails at once, and the thread ends."""
    with kubelet_serving(path) as server:
        server.hold.clear()
        asking = poller(path, timeout_seconds=60.0)
        asking.latest()
        until(lambda: server.calls, "a question")
        asking.close()
        thread = asking._thread
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()


def test_failures_are_asked_about_less_often(path: Path) -> None:
    """The pause grows up to a minute, with jitter, and falls back when it is over."""
    asking = poller(path, interval_seconds=5.0)
    assert asking.wait_seconds() == 5.0
    waits = []
    for _ in range(8):
        asking.poll_once()
        waits.append(asking.wait_seconds())
    assert waits[0] >= 5.0
    assert BACKOFF_SECONDS_MAX / 2 <= waits[-1] <= BACKOFF_SECONDS_MAX
    with kubelet_serving(path):
        asking.poll_once()
    assert asking.wait_seconds() == 5.0


def test_the_agent_needs_grpcio_only_when_it_asks() -> None:
    """Without the extra every module imports, and the remedy is said."""
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "from flopledger_agent.attribution import kubernetes, kubelet_resources as k\n"
        "import socket, tempfile, os\n"
        "path = os.path.join(tempfile.mkdtemp(), 's'); s = socket.socket(socket.AF_UNIX)\n"
        "s.bind(path)\n"
        "try: k.KubeletClient(path).list_pods(1)\n"
        "except k.KubeletUnreachable as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert "install flopledger[kubernetes]" in done.stdout, done.stderr


def test_the_section_refuses_unknown_keys() -> None:
    """A misspelt key is an error that names it."""
    with pytest.raises(msgspec.ValidationError, match="kubelet_sock"):
        msgspec.convert({"kubelet_sock": "/x"}, KubernetesSection)
