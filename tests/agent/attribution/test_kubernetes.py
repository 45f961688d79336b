"""A pod holds what kubelet granted it, under the identity and tags that the API server tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from flopledger_agent.attribution.allocations import (
    Allocation,
    AllocationView,
    DeviceDirectory,
)
from flopledger_agent.attribution.kubelet_messages import decode_pod_list
from flopledger_agent.attribution.kubelet_resources import KubeletView
from flopledger_agent.attribution.kubernetes import (
    KubernetesReaders,
    KubernetesSource,
    open_kubernetes,
)
from flopledger_agent.attribution.kubernetes_section import KubernetesSection
from flopledger_agent.attribution.pod_watch import WatchView
from flopledger_agent.attribution.pods import DeviceSlice, Pod
from flopledger_agent.clocks import SystemClock
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import require_id
from tests.agent.attribution.kubernetes_nodes import MIG_B, PARTS, WHOLE, A, B
from tests.agent.attribution.kubernetes_servers import (
    NODE,
    ApiServerPlay,
    api_serving,
    encoded,
    golden,
    kubelet_serving,
    pod_object,
)
from tests.agent.attribution.people import until


class Clock(SystemClock):
    """A clock that stands where it is put."""

    now_ns = 1_000_000_000

    def boottime_ns(self) -> int:
        """The time that a test set."""
        return self.now_ns


class FakeKubelet:
    """A kubelet that has said something."""

    def __init__(self, name: str) -> None:
        self.view = KubeletView(
            pods=decode_pod_list(encoded(golden(name))), as_of_boot_ns=1, sequence=1
        )
        self.closed = False

    def latest(self) -> KubeletView:
        """What it said."""
        return self.view

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    def says(self, **given: Any) -> None:
        """Another list, or a failure."""
        self.view = msgspec.structs.replace(self.view, sequence=self.view.sequence + 1, **given)


class FakeWatch:
    """An API server that has told some objects."""

    def __init__(self, *objects: Pod) -> None:
        self.view: WatchView[Any] = WatchView(
            objects={one.key: one for one in objects}, synced=True, as_of_boot_ns=1
        )
        self.closed = False

    def latest(self) -> WatchView[Any]:
        """What it told."""
        return self.view

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    def says(self, **given: Any) -> None:
        """Something else."""
        self.view = msgspec.structs.replace(self.view, **given)


def pod(namespace: str, name: str, **given: Any) -> Pod:
    """A running pod."""
    fields: dict[str, Any] = {"phase": "Running", **given}
    return Pod(uid=f"uid-{name}", namespace=namespace, name=name, **fields)


def view(
    kubelet: FakeKubelet, watch: FakeWatch | None, directory: DeviceDirectory = WHOLE
) -> AllocationView:
    """One answer of a fresh source."""
    return source(kubelet, watch, directory).allocations()


def source(
    kubelet: FakeKubelet, watch: FakeWatch | None, directory: DeviceDirectory = WHOLE
) -> KubernetesSource:
    """A source of fakes."""
    readers = KubernetesReaders(kubelet=kubelet, pods=watch)
    return KubernetesSource(KubernetesSection(), Clock(), lambda: directory, readers)


def held(found: tuple[Allocation, ...]) -> list[tuple[str, str, bool]]:
    """Device, job and sharing of each allocation."""
    return [(one.device, one.job, one.shared) for one in found]


# --- the join -------------------------------------------------------------------------------------


def test_a_pod_holds_what_it_was_granted() -> None:
    """With uid, owner, labels, tags, image, restarts and start; a CPU-only pod holds nothing."""
    told = pod(
        "research",
        "train-0",
        owner_kind="Job",
        owner_name="train",
        labels={"flopledger.io/project": "atlas"},
        annotations={"flopledger.io/run": "r/1"},
        images={"trainer": "registry.example/train:1", "sidecar": "x"},
        restarts={"trainer": 2, "sidecar": 9},
        start_unix_ms=5,
    )
    answer = view(FakeKubelet("whole-gpus"), FakeWatch(told, pod("research", "train-1")))
    assert held(answer.allocations) == [(A, "uid-train-0", False), (B, "uid-train-1", False)]
    first = answer.allocations[0]
    assert first == Allocation(
        scheduler="kubernetes",
        device=A,
        job="uid-train-0",
        attempt="2",
        names={
            "namespace": "research",
            "pod": "train-0",
            "container": "trainer",
            "label:flopledger.io/project": "atlas",
            "annotation:flopledger.io/run": "r/1",
            "owner_kind": "Job",
            "owner": "train",
            "job_name": "train",
            "image": "registry.example/train:1",
        },
        tags={"project": "atlas", "run": "r/1"},
        since_unix_ms=5,
        evidence="kubelet granted nvidia.com/gpu to pod research/train-0",
    )
    assert answer.troubles == answer.ghosts == ()


def test_instances_are_held_apart() -> None:
    """Each pod its own part of the GPU."""
    answer = view(FakeKubelet("mig"), None, PARTS)
    assert held(answer.allocations) == [
        (f"{B}/3", "serving/small-0", False),
        (f"{B}/5", "serving/small-1", False),
    ]


def test_replicas_are_shared_even_alone() -> None:
    """The scheduler may give the others away at any time."""
    answer = view(FakeKubelet("time-sliced"), None)
    assert held(answer.allocations) == [
        (A, "dev/notebook-a", True),
        (A, "dev/notebook-b", True),
        (B, "dev/notebook-c", True),
    ]


def test_gke_names_are_understood() -> None:
    """Minors and instances; two pods on one device share it."""
    answer = view(FakeKubelet("gke"), None, PARTS)
    assert held(answer.allocations) == [
        (A, "gke/vgpu", True),
        (A, "gke/whole", True),
        (f"{B}/3", "gke/instance", False),
        (f"{B}/5", "gke/sliced", True),
    ]


def test_two_containers_of_a_pod_are_one_job() -> None:
    """A claim shared inside a pod is held once, by both containers."""
    answer = view(FakeKubelet("dra"), None)
    (only,) = answer.allocations
    assert (only.device, only.shared) == (A, False)
    assert only.names["container"] == "ctr0,ctr1"
    assert any("resource_slices" in trouble for trouble in answer.troubles)


def test_slices_resolve_claims_of_instances() -> None:
    """With the watch of slices the second pod's MIG device is known, too."""
    slices = FakeWatch()
    one = DeviceSlice(
        driver="gpu.nvidia.com",
        pool=NODE,
        generation=1,
        uuids={"gpu-0": A, "gpu-1-mig-3g47gb-9-0": MIG_B},
    )
    slices.says(objects={"slice": one})
    readers = KubernetesReaders(kubelet=FakeKubelet("dra"), slices=slices)
    whole = KubernetesSource(KubernetesSection(), Clock(), lambda: PARTS, readers)
    answer = whole.allocations()
    assert held(answer.allocations) == [
        (A, "gpu-test3/pod1", False),
        (f"{B}/5", "gpu-test3/pod2", False),
    ]
    assert answer.troubles == ()


def test_cpu_only_pods_hold_nothing() -> None:
    """And are no trouble."""
    answer = view(FakeKubelet("cpu-only"), FakeWatch())
    assert (answer.allocations, answer.troubles) == ((), ())


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ended_holds_nothing_although_kubelet_lists_it(phase: str) -> None:
    """It is a ghost, and said to be one."""
    watch = FakeWatch(pod("research", "train-0", phase=phase), pod("research", "train-1"))
    answer = view(FakeKubelet("whole-gpus"), watch)
    assert held(answer.allocations) == [(B, "uid-train-1", False)]
    assert "research/train-0" in answer.ghosts[0]


# --- who is away ----------------------------------------------------------------------------------


def test_without_the_api_server_pods_are_called_by_name() -> None:
    """The allocation stays; that uid and tags are unknown is said."""
    watch = FakeWatch()
    watch.says(synced=False, failure="the API server is away", objects={})
    answer = view(FakeKubelet("whole-gpus"), watch)
    assert held(answer.allocations) == [
        (A, "research/train-0", False),
        (B, "research/train-1", False),
    ]
    assert "tags of pods are unknown" in answer.troubles[0]
    assert "has not told its uid" in answer.allocations[0].evidence


def test_a_pod_that_the_api_server_does_not_know_is_said() -> None:
    """A watch that works and does not know the pod: a wrong node name, or a moment too early."""
    answer = view(FakeKubelet("whole-gpus"), FakeWatch(pod("research", "train-0")))
    assert [one for one in answer.troubles if "train-1" in one]
    assert len(answer.allocations) == 2


def test_what_was_known_stays_while_the_api_server_is_away() -> None:
    """Uids and tags of before, and no new job for a pod that goes on."""
    kubelet = FakeKubelet("whole-gpus")
    watch = FakeWatch(pod("research", "train-0"), pod("research", "train-1"))
    asked = source(kubelet, watch)
    before = asked.allocations()
    watch.says(failure="the API server is away")
    kubelet.says()
    after = asked.allocations()
    assert after.allocations == before.allocations
    assert "are those of before" in after.troubles[0]


def test_a_namesake_does_not_inherit_while_the_api_server_is_away() -> None:
    """A StatefulSet's next pod has the same name and another uid: nobody knows it yet."""
    kubelet = FakeKubelet("whole-gpus")
    watch = FakeWatch(pod("research", "train-0"), pod("research", "train-1"))
    asked = source(kubelet, watch)
    both = asked.allocations()
    pods = kubelet.view.pods
    watch.says(failure="the API server is away")
    kubelet.says(pods=pods[1:])
    assert held(asked.allocations().allocations) == [(B, "uid-train-1", False)]
    kubelet.says(pods=pods)
    assert held(asked.allocations().allocations)[0] == (A, "research/train-0", False)
    watch.says(failure=None)
    assert asked.allocations().allocations == both.allocations


def test_kubelets_last_list_counts_for_a_while() -> None:
    """It is restarted under running pods; after a quarter of an hour nothing is known."""
    kubelet = FakeKubelet("whole-gpus")
    clock = Clock()
    section = KubernetesSection(keep_seconds=900.0)
    readers = KubernetesReaders(kubelet=kubelet)
    asked = KubernetesSource(section, clock, lambda: WHOLE, readers)
    kubelet.says(failure="kubelet is away", as_of_boot_ns=0)
    clock.now_ns = 900 * 10**9
    answer = asked.allocations()
    assert len(answer.allocations) == 2
    assert answer.troubles == ("kubelet is away",)
    clock.now_ns += 1
    answer = asked.allocations()
    assert answer.allocations == ()
    assert answer.as_of_boot_ns == 0
    assert "too old" in answer.troubles[1]


def test_a_list_that_nobody_renews_is_not_believed_for_ever() -> None:
    """Also where no failure is told: a reader that stopped is no proof of anything."""
    kubelet, clock = FakeKubelet("whole-gpus"), Clock()
    section = KubernetesSection(keep_seconds=0.0, interval_seconds=5.0, timeout_seconds=5.0)
    readers = KubernetesReaders(kubelet=kubelet)
    asked = KubernetesSource(section, clock, lambda: WHOLE, readers)
    clock.now_ns = 20 * 10**9
    assert asked.allocations().allocations
    clock.now_ns += 2
    assert not asked.allocations().allocations


def test_before_the_first_list_nothing_is_claimed() -> None:
    """No answer is not the answer that nobody holds anything."""
    kubelet = FakeKubelet("cpu-only")
    kubelet.view = KubeletView(failure="kubelet is away")
    answer = view(kubelet, None)
    assert answer == AllocationView(troubles=("kubelet is away",))


def test_contradicting_tags_are_named() -> None:
    """The label counts, and people are told."""
    key = "flopledger.io/project"
    told = pod("research", "train-0", labels={key: "one"}, annotations={key: "two"})
    answer = view(FakeKubelet("whole-gpus"), FakeWatch(told, pod("research", "train-1")))
    assert answer.allocations[0].tags == {"project": "one"}
    assert key in answer.troubles[0]


def test_a_very_long_name_is_still_a_job_id() -> None:
    """Two that differ only at their ends stay two."""
    long = [{"namespace": "n" * 63, "name": "p" * 252 + end} for end in "ab"]
    device = {"resource_name": "nvidia.com/gpu", "device_ids": [f"{A}::0"]}
    for one in long:
        one["containers"] = [{"name": "c", "devices": [device]}]  # type: ignore[assignment]
    kubelet = FakeKubelet("cpu-only")
    kubelet.says(pods=decode_pod_list(encoded({"pod_resources": long})))
    jobs = [one.job for one in view(kubelet, None).allocations]
    assert len(set(jobs)) == 2
    for job in jobs:
        require_id("job", job)


def test_troubles_are_bounded() -> None:
    """A node on which everything is wrong does not fill the page."""
    devices = {"resource_name": "nvidia.com/gpu", "device_ids": [f"GPU-{n}" for n in range(99)]}
    pods = [{"namespace": "n", "name": "p", "containers": [{"name": "c", "devices": [devices]}]}]
    kubelet = FakeKubelet("cpu-only")
    kubelet.says(pods=decode_pod_list(encoded({"pod_resources": pods})))
    assert len(view(kubelet, None).troubles) == 20


def test_closing_closes_everybody() -> None:
    """Each reader is told."""
    kubelet, watch = FakeKubelet("mig"), FakeWatch()
    source(kubelet, watch).close()
    assert kubelet.closed
    assert watch.closed


def test_a_cgroups_pod_is_found_by_uid() -> None:
    """A privileged pod uses GPUs that nobody granted: its processes still have a pod."""
    asked = source(FakeKubelet("cpu-only"), FakeWatch(pod("n", "p")))
    found = asked.pod_with_uid("uid-p")
    assert found is not None
    assert found.key == "n/p"
    assert asked.pod_with_uid("uid-q") is None


def test_a_control_groups_pod_is_its_allocations_job() -> None:
    """By uid, static pods by their files' digest; while one is nameless nothing is concluded."""
    kubelet = FakeKubelet("whole-gpus")
    watch = FakeWatch(pod("research", "train-0", static_uid="1" * 32), pod("research", "train-1"))
    asked = source(kubelet, watch)
    asked.allocations()
    assert asked.job_of_pod("uid-train-1") == "uid-train-1"
    assert asked.job_of_pod("1" * 32) == "uid-train-0"
    assert asked.job_of_pod("uid-of-nobody") == "uid-of-nobody"
    watch.says(objects={"research/train-1": pod("research", "train-1")})
    asked.allocations()
    assert asked.job_of_pod("uid-of-nobody") is None


# --- as configured --------------------------------------------------------------------------------


def test_both_servers_together(tmp_path: Path) -> None:
    """Real gRPC, real HTTP: a pod appears with its tags, is relabelled, ends, and is gone."""
    play = ApiServerPlay()
    labels = {"flopledger.io/project": "atlas"}
    play.items = [pod_object("train-0", labels=labels), pod_object("train-1")]
    token = tmp_path / "token"
    token.write_text("t")
    path = tmp_path / "kubelet.sock"
    lists = golden("whole-gpus")
    with kubelet_serving(path, encoded(lists)) as kubelet, api_serving(play) as url:
        section = KubernetesSection(
            kubelet_socket=str(path), interval_seconds=1.0, api_url=url, token_file=str(token)
        )
        asked = open_kubernetes(section, {"NODE_NAME": NODE}, SystemClock(), lambda: WHOLE)
        until(lambda: asked.allocations().allocations and play.watching, "the first answer")
        first = asked.allocations()
        assert held(first.allocations) == [
            (A, "uid-of-train-0", False),
            (B, "uid-of-train-1", False),
        ]
        assert first.allocations[0].tags == {"project": "atlas"}
        assert first.troubles == ()
        labels = {"flopledger.io/project": "other"}
        play.tell("MODIFIED", pod_object("train-0", labels=labels, version=101))
        until(lambda: asked.allocations().allocations[0].tags["project"] == "other", "the label")
        play.tell("MODIFIED", pod_object("train-1", phase="Succeeded", version=102))
        until(lambda: asked.allocations().ghosts, "the end")
        kubelet.answer = encoded({"pod_resources": lists["pod_resources"][:1]})
        until(lambda: not asked.allocations().ghosts, "the next list")
        assert held(asked.allocations().allocations) == [(A, "uid-of-train-0", False)]
        asked.close()


def test_a_node_without_a_name_is_refused() -> None:
    """A watch without it would be one of the whole cluster."""
    section = KubernetesSection(api_url="https://127.0.0.1:1")
    with pytest.raises(InvalidInput, match="node_name"):
        open_kubernetes(section, {}, SystemClock(), lambda: WHOLE)


def test_an_api_server_without_an_address_is_refused() -> None:
    """Outside of a pod nobody tells it; in one, the environment does."""
    section = KubernetesSection(node_name=NODE)
    with pytest.raises(InvalidInput, match="api_url"):
        open_kubernetes(section, {}, SystemClock(), lambda: WHOLE)
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    assert section.server_url(environ) == "https://[fd00::1]:443"
    environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    assert section.server_url(environ) == "https://10.0.0.1:443"


def test_kubelet_alone_needs_neither() -> None:
    """`api = false` asks nobody but kubelet."""
    asked = open_kubernetes(KubernetesSection(api=False), {}, SystemClock(), lambda: WHOLE)
    assert asked.pod_with_uid("x") is None
    asked.close()
