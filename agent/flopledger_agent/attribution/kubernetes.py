"""Which pod holds which device: kubelet's grants, joined with what the API server knows of pods.

kubelet decides: a pod holds what kubelet granted it, whether or not it runs anything, and also
while the API server is away. The API server adds identity, owner and tags. A pod that it has not
told of yet is called by namespace and name, and the view says that its tags are unknown.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.allocations import Allocation, AllocationView
from flopledger_agent.attribution.api_server import ApiServer
from flopledger_agent.attribution.kubelet_resources import KubeletPoller
from flopledger_agent.attribution.kubernetes_devices import find_claimed, find_granted
from flopledger_agent.attribution.kubernetes_section import require_node_name
from flopledger_agent.attribution.pod_watch import Watch
from flopledger_agent.attribution.pods import claimed_uuids, pods_of, slices_of
from flopledger_core.identity import ID_LENGTH_MAX
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flopledger_agent.attribution.allocations import DeviceDirectory
    from flopledger_agent.attribution.kubelet_messages import PodGrants
    from flopledger_agent.attribution.kubelet_resources import Kubelet, KubeletView
    from flopledger_agent.attribution.kubernetes_section import KubernetesSection
    from flopledger_agent.attribution.pod_watch import Watched, WatchView
    from flopledger_agent.attribution.pods import DeviceSlice, Pod
    from flopledger_agent.clocks import Clock

TROUBLES_MAX: Final = 20  # sentences; a node with more troubles has one
_DIGEST_LENGTH: Final = 16


class _Holding(msgspec.Struct, frozen=True, kw_only=True):
    """A pod holds a device through some of its containers."""

    containers: tuple[str, ...]
    shared: bool
    how: str  # the grant, for people


class KubernetesReaders(msgspec.Struct, frozen=True, kw_only=True):
    """Who tells what of Kubernetes; without `pods` nobody asks the API server."""

    kubelet: Kubelet
    pods: Watched[Pod] | None = None
    slices: Watched[DeviceSlice] | None = None


class KubernetesSource:
    """kubelet and the API server together; implements `AllocationSource`."""

    def __init__(
        self,
        section: KubernetesSection,
        clock: Clock,
        directory: Callable[[], DeviceDirectory],
        readers: KubernetesReaders,
    ) -> None:
        self._section = section
        self._clock = clock
        self._directory = directory
        self._kubelet = readers.kubelet
        self._pods = readers.pods
        self._slices = readers.slices
        self._outdated: set[str] = set()  # pods that may be others by now; see `_known_pods`
        self._sequence = 0  # of kubelet's list that was looked at last
        self._unidentified = False  # a pod without a known uid holds a device

    def allocations(self) -> AllocationView:
        """What is known now, from memory; the first call begins to ask."""
        kubelet = self._kubelet.latest()
        pods = None if self._pods is None else self._pods.latest()
        slices = None if self._slices is None else self._slices.latest()
        troubles = [*_api_troubles(pods, slices)]
        if kubelet.failure is not None:
            troubles.append(kubelet.failure)
        if kubelet.as_of_boot_ns is None or self._is_stale(kubelet):
            if kubelet.as_of_boot_ns is not None:
                troubles.append(
                    "kubelet's last list is too old to go by: no pod is known to hold a device"
                )
            return AllocationView(
                troubles=tuple(troubles[:TROUBLES_MAX]), as_of_boot_ns=kubelet.as_of_boot_ns
            )
        uuids = None if slices is None else claimed_uuids(slices.objects)
        known = self._known_pods(kubelet, pods)
        self._unidentified = False
        found: list[Allocation] = []
        ghosts: list[str] = []
        directory = self._directory()
        for pod in kubelet.pods:
            held = self._held(pod, directory, uuids, troubles)
            told = known.get(pod.key)
            if held and told is not None and told.ended:
                ghosts.append(
                    f"kubelet still lists pod {pod.key}, which has ended ({told.phase}); it holds "
                    "nothing"
                )
            elif held:
                self._unidentified = self._unidentified or told is None
                found += self._allocations(pod, held, told)
                troubles += _tag_troubles(pod, told, synced=pods is not None and pods.synced)
        return AllocationView(
            allocations=_marked_shared(found),
            troubles=tuple(troubles[:TROUBLES_MAX]),
            ghosts=tuple(ghosts[:TROUBLES_MAX]),
            as_of_boot_ns=kubelet.as_of_boot_ns,
        )

    def pod_with_uid(self, uid: str) -> Pod | None:
        """The pod of a control group, granted a device or not; None while it is not known."""
        if self._pods is None:
            return None
        pods = self._pods.latest().objects.values()
        return next((pod for pod in pods if uid in {pod.uid, pod.static_uid}), None)

    def job_of_pod(self, uid: str) -> str | None:
        """The job id of the pod of a control group; None where it cannot be told.

        While a pod that holds a device is known by its name only, a uid that nobody knows may be
        its or another's.
        """
        pod = self.pod_with_uid(uid)
        if pod is not None and pod.key not in self._outdated:
            return pod.uid
        return None if self._unidentified else uid

    def has_answered(self) -> bool:
        """Whether everybody who is asked has answered, or failed, at least once."""
        kubelet = self._kubelet.latest()
        told = [kubelet.as_of_boot_ns is not None or kubelet.failure is not None]
        for watch in (self._pods, self._slices):
            if watch is not None:
                view = watch.latest()
                told.append(view.synced or view.failure is not None)
        return all(told)

    def close(self) -> None:
        """Ask nothing more; requests under way are cut and not waited for."""
        self._kubelet.close()
        for watch in (self._pods, self._slices):
            if watch is not None:
                watch.close()

    def _is_stale(self, kubelet: KubeletView) -> bool:
        if kubelet.as_of_boot_ns is None:
            return True
        keep_seconds = self._section.keep_seconds
        if kubelet.failure is None:  # the next list is on its way
            keep_seconds += 2 * (self._section.interval_seconds + self._section.timeout_seconds)
        age_ns = self._clock.boottime_ns() - kubelet.as_of_boot_ns
        return age_ns > keep_seconds * NS_PER_SECOND

    def _known_pods(self, kubelet: KubeletView, pods: WatchView[Pod] | None) -> Mapping[str, Pod]:
        """What is known of the pods on kubelet's list.

        While the API server is away, a pod that kubelet no longer lists is forgotten: the next one
        of the same name is another one, with another uid and other tags.
        """
        if pods is None:
            return {}
        if pods.failure is None:
            self._outdated.clear()
        elif kubelet.sequence != self._sequence:
            self._outdated |= pods.objects.keys() - {pod.key for pod in kubelet.pods}
        self._sequence = kubelet.sequence
        return {key: pod for key, pod in pods.objects.items() if key not in self._outdated}

    def _held(
        self,
        pod: PodGrants,
        directory: DeviceDirectory,
        uuids: Mapping[tuple[str, str, str], str] | None,
        troubles: list[str],
    ) -> dict[str, _Holding]:
        """The devices a pod holds, by key."""
        held: dict[str, _Holding] = {}
        for container in pod.containers:
            answers = [
                (find_granted(one, directory, self._section.resources), one.resource)
                for one in container.devices
            ]
            answers += [
                (find_claimed(one, directory, uuids), f"claim {one.claim}")
                for one in container.claims
            ]
            for found, how in answers:
                if found.trouble is not None:
                    troubles.append(f"pod {pod.key}: {found.trouble}")
                for key in found.keys:
                    before = held.get(key)
                    names = () if before is None else before.containers
                    held[key] = _Holding(
                        containers=tuple(sorted({*names, container.name})),
                        shared=found.shared or (before is not None and before.shared),
                        how=how,
                    )
        return held

    def _allocations(
        self, pod: PodGrants, held: Mapping[str, _Holding], told: Pod | None
    ) -> list[Allocation]:
        found: list[Allocation] = []
        for key, holding in sorted(held.items()):
            names = {
                "namespace": pod.namespace,
                "pod": pod.name,
                "container": ",".join(holding.containers),
            }
            attempt: str | None = None
            if told is not None:
                names |= _names(told, holding.containers)
                restarts = [told.restarts.get(one, 0) for one in holding.containers]
                attempt = str(max(restarts)) if told.restarts else None
            found.append(
                Allocation(
                    scheduler="kubernetes",
                    device=key,
                    job=told.uid if told is not None else _job_of(pod.key),
                    attempt=attempt,
                    names=names,
                    tags={} if told is None else told.tags(),
                    shared=holding.shared,
                    since_unix_ms=None if told is None else told.start_unix_ms,
                    evidence=f"kubelet granted {holding.how} to pod {pod.key}"
                    + ("" if told is not None else "; the API server has not told its uid"),
                )
            )
        return found


def open_kubernetes(
    section: KubernetesSection,
    environ: Mapping[str, str],
    clock: Clock,
    directory: Callable[[], DeviceDirectory],
    changed: Callable[[], None] | None = None,
) -> KubernetesSource:
    """The source that the configuration describes; threads start with the first question.

    `environ` is the agent's own environment, `directory` tells the devices of now, `changed` is
    called from a thread when kubelet's grants are others than before. Errors:
    InvalidInput when the node's name, or the API server's address, is not told by anybody.
    """
    kubelet = KubeletPoller(section, clock, changed=changed)
    if not section.api:
        return KubernetesSource(section, clock, directory, KubernetesReaders(kubelet=kubelet))
    node_name = require_node_name(section, environ.get("NODE_NAME"))
    server = ApiServer(
        url=section.server_url(environ),
        token_file=section.token_file,
        ca_file=section.ca_file,
        timeout_seconds=section.api_timeout_seconds,
    )
    readers = KubernetesReaders(
        kubelet=kubelet,
        pods=Watch(server, pods_of(node_name, section.labels), clock),
        slices=Watch(server, slices_of(node_name), clock) if section.resource_slices else None,
    )
    return KubernetesSource(section, clock, directory, readers)


def _api_troubles(pods: WatchView[Pod] | None, slices: WatchView[DeviceSlice] | None) -> list[str]:
    troubles: list[str] = []
    if pods is not None:
        if pods.failure is not None:
            since = "are those of before" if pods.synced else "are unknown"
            troubles.append(f"{pods.failure} (meanwhile the tags of pods {since})")
        if pods.overfull:
            troubles.append(
                "there are more pods on this node than are kept: the tags of some are unknown; is "
                "kubernetes.node_name one node's name?"
            )
    if slices is not None and slices.failure is not None:
        troubles.append(f"{slices.failure} (meanwhile claimed devices may be unknown)")
    return troubles


def _tag_troubles(pod: PodGrants, told: Pod | None, *, synced: bool) -> list[str]:
    if told is None:
        # Before the first list everything is unknown, which is said once, by its failure.
        return [f"pod {pod.key} is not known to the API server: its tags are unknown"] * synced
    return [
        f"pod {pod.key}: label and annotation {key} differ; the label counts, remove one"
        for key in told.contradictions()
    ]


def _names(told: Pod, containers: tuple[str, ...]) -> dict[str, str]:
    """What the API server adds to an allocation's names."""
    names = {f"label:{key}": value for key, value in told.labels.items()}
    names |= {f"annotation:{key}": value for key, value in told.annotations.items()}
    if told.owner_kind and told.owner_name:
        names |= {"owner_kind": told.owner_kind, "owner": told.owner_name}
        if told.owner_kind == "Job":
            names["job_name"] = told.owner_name
    images = [told.images[one] for one in containers if one in told.images]
    if images:
        names["image"] = ",".join(images)
    return names


def _job_of(key: str) -> str:
    """A pod's namespace and name as a job id; one that is too long ends in its digest."""
    if len(key) <= ID_LENGTH_MAX:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{key[: ID_LENGTH_MAX - _DIGEST_LENGTH - 1]}-{digest}"


def _marked_shared(found: list[Allocation]) -> tuple[Allocation, ...]:
    """The allocations in a fixed order; what several pods hold is shared, whoever said so."""
    holders: dict[str, set[str]] = {}
    for one in found:
        holders.setdefault(one.device, set()).add(one.job)
    return tuple(
        msgspec.structs.replace(one, shared=True)
        if not one.shared and len(holders[one.device]) > 1
        else one
        for one in sorted(found, key=lambda one: (one.device, one.job))
    )
