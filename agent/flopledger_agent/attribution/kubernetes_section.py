"""`[kubernetes]` of the configuration: where kubelet and the API server are, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from flopledger_core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

# GPUs by the names of NVIDIA's device plugin; sites that rename resources add theirs.
RESOURCES_DEFAULT: Final = ("nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-*")
# Who started a pod, by the labels of the usual controllers; what mapping rules can look at.
LABELS_DEFAULT: Final = (
    "app.kubernetes.io/instance",
    "app.kubernetes.io/name",
    "batch.kubernetes.io/job-name",
    "jobset.sigs.k8s.io/jobset-name",
    "kueue.x-k8s.io/queue-name",
    "ray.io/cluster",
    "training.kubeflow.org/job-name",
    "volcano.sh/job-name",
)
_Name = Annotated[str, Meta(min_length=1, max_length=253)]
_Url = Annotated[str, Meta(pattern=r"^https?://[^/@\s?#]+/?$")]


class KubernetesSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[kubernetes]`: without this table neither kubelet nor an API server is asked."""

    kubelet_socket: Annotated[str, Meta(pattern="^/")] = (
        "/var/lib/kubelet/pod-resources/kubelet.sock"
    )
    # kubelet serves 100 questions a second; devices change when pods begin and end.
    interval_seconds: Annotated[float, Meta(ge=1, le=300)] = 5.0
    timeout_seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    # kubelet may be restarted under running pods; what it said last counts for so long.
    keep_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 900.0
    resources: tuple[_Name, ...] = RESOURCES_DEFAULT
    # False: pods keep their namespace and name, and nobody asks an API server for tags.
    api: bool = True
    api_url: _Url | None = None  # none: KUBERNETES_SERVICE_HOST and its port
    token_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 (a path)
    ca_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    api_timeout_seconds: Annotated[float, Meta(gt=0, le=60)] = 10.0
    node_name: _Name | None = None  # as the API server calls it; none: NODE_NAME
    # One more watch, which tells the UUIDs behind the names of resource claims (DRA).
    resource_slices: bool = False
    labels: tuple[_Name, ...] = LABELS_DEFAULT  # kept besides flopledger.io/...

    def server_url(self, environ: Mapping[str, str]) -> str:
        """Where the API server is. Errors: InvalidInput when nobody tells."""
        if self.api_url is not None:
            return self.api_url.rstrip("/")
        host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port or not port.isdigit():
            raise InvalidInput(
                "kubernetes.api_url",
                None,
                "set it where the agent is no pod itself, or set kubernetes.api = false",
            )
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def require_node_name(section: KubernetesSection, environ_name: str | None) -> str:
    """The node's name for the API server. Errors: InvalidInput when nobody gave it."""
    name = section.node_name or environ_name
    if not name:
        raise InvalidInput(
            "kubernetes.node_name",
            name,
            "set it, or NODE_NAME from spec.nodeName as deploy/kubernetes/daemonset.yaml does",
        )
    return name
