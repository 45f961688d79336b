"""The manifests are what the documents promise: complete, least privileged, and in agreement."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import pytest
import yaml

from flopledger_agent.attribution.kubernetes_section import KubernetesSection
from flopledger_agent.attribution.pods import PODS_PATH, SLICES_PATH
from flopledger_agent.config import AgentConfig
from tests.test_house import ROOT

FOLDER: Final = ROOT / "deploy" / "kubernetes"
API_VERSIONS: Final = {
    "Namespace": "v1",
    "ServiceAccount": "v1",
    "ConfigMap": "v1",
    "ClusterRole": "rbac.authorization.k8s.io/v1",
    "ClusterRoleBinding": "rbac.authorization.k8s.io/v1",
    "DaemonSet": "apps/v1",
}
HOST_PATHS: Final = {
    "/var/lib/kubelet/pod-resources",
    "/var/lib/flopledger-agent",
    "/run/flopledger-agent",
}
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def objects() -> dict[str, Any]:
    """Every object of the manifests by its kind."""
    found: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if one is not None:
                assert one["kind"] not in found, f"{path}: a second {one['kind']}"
                found[one["kind"]] = one
    return found


def pod() -> dict[str, Any]:
    """The DaemonSet's pod."""
    spec: dict[str, Any] = objects()["DaemonSet"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    """Its only container."""
    (only,) = pod()["containers"]
    assert isinstance(only, dict)
    return only


def test_every_object_has_what_the_api_requires() -> None:
    """Kind, version, a valid name, and a namespace where it belongs into one."""
    found = objects()
    assert found.keys() == API_VERSIONS.keys()
    for kind, one in found.items():
        assert one["apiVersion"] == API_VERSIONS[kind]
        assert _NAME.fullmatch(one["metadata"]["name"])
        cluster_wide = kind in {"Namespace", "ClusterRole", "ClusterRoleBinding"}
        assert ("namespace" in one["metadata"]) is not cluster_wide
    names = {
        one["metadata"]["namespace"] for one in found.values() if "namespace" in one["metadata"]
    }
    assert names == {found["Namespace"]["metadata"]["name"]}


def test_the_daemonset_selects_its_own_pods() -> None:
    """A selector that does not match is refused by the server."""
    spec = objects()["DaemonSet"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert pod()["serviceAccountName"] == objects()["ServiceAccount"]["metadata"]["name"]


def rules() -> Iterator[tuple[str, str, str]]:
    """(group, resource, verb) for everything the account may do."""
    for rule in objects()["ClusterRole"]["rules"]:
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    yield group, resource, verb


def test_the_account_may_do_what_the_agent_does_and_no_more() -> None:
    """List and watch on what is watched; nothing is written, no secret is read."""
    watched = set()
    for path in (PODS_PATH, SLICES_PATH):
        parts = path.strip("/").split("/")
        watched.add(("" if parts[0] == "api" else parts[1], parts[-1]))
    assert set(rules()) == {(*one, verb) for one in watched for verb in ("list", "watch")}
    binding = objects()["ClusterRoleBinding"]
    assert binding["roleRef"]["name"] == objects()["ClusterRole"]["metadata"]["name"]
    (subject,) = binding["subjects"]
    account = objects()["ServiceAccount"]["metadata"]
    assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])


def test_the_container_is_not_privileged() -> None:
    """No capability, no way to gain one, a root it cannot write; root only because kubelet's is."""
    context = container()["securityContext"]
    assert context == {
        "runAsUser": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert not pod().get("hostNetwork")
    assert not pod().get("hostIPC")


def test_each_volume_is_mounted_and_each_host_folder_is_known() -> None:
    """Kubelet's folder read-only and not its socket, which is replaced when kubelet restarts."""
    volumes = {one["name"]: one for one in pod()["volumes"]}
    mounts = {one["name"]: one for one in container()["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    host = {name: one["hostPath"] for name, one in volumes.items() if "hostPath" in one}
    assert {one["path"] for one in host.values()} == HOST_PATHS
    for name, one in host.items():
        assert mounts[name]["mountPath"] == one["path"]
        assert one["type"] in {"Directory", "DirectoryOrCreate"}
    assert mounts["pod-resources"]["readOnly"]
    socket = KubernetesSection().kubelet_socket
    assert socket.rpartition("/")[0] == mounts["pod-resources"]["mountPath"]


def test_every_host_privilege_is_explained() -> None:
    """A line that opens something of the host has a comment right above it."""
    lines = (FOLDER / "daemonset.yaml").read_text(encoding="utf-8").splitlines()
    for word in ("hostPID:", "runtimeClassName:", "runAsUser:"):
        (place,) = [number for number, line in enumerate(lines) if line.strip().startswith(word)]
        assert lines[place - 1].strip().startswith("#"), word
    for path in HOST_PATHS:
        place = next(n for n, line in enumerate(lines) if line.strip() == f"path: {path}")
        assert lines[place - 3].strip().startswith("#"), path


def test_the_node_is_told_its_name_and_sees_all_gpus() -> None:
    """From the downward API; and no GPU is requested, which would take it from somebody."""
    environ = {one["name"]: one for one in container()["env"]}
    assert environ["NODE_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
    assert environ["NVIDIA_VISIBLE_DEVICES"]["value"] == "all"
    resources = container()["resources"]
    assert not [key for kind in resources.values() for key in kind if "nvidia" in key]
    assert {"cpu", "memory"} <= resources["limits"].keys()
    assert pod()["hostPID"] is True


def test_the_configuration_is_one() -> None:
    """Every key is known, and the page listens where the probe asks."""
    told = tomllib.loads(objects()["ConfigMap"]["data"]["agent.toml"])
    section = msgspec.convert(told["kubernetes"], KubernetesSection)
    assert section.api
    known = {field.name for field in msgspec.structs.fields(AgentConfig)}
    rest = {key: value for key, value in told.items() if key != "kubernetes" or key in known}
    config = msgspec.convert(rest, AgentConfig)
    (port,) = container()["ports"]
    assert config.web.listen_address == f"0.0.0.0:{port['containerPort']}"
    assert container()["livenessProbe"]["httpGet"]["port"] == port["name"]
    assert config.state.directory in HOST_PATHS


@pytest.mark.parametrize("page", ["docs/operating/kubernetes.md", "deploy/kubernetes/README.md"])
def test_the_documents_name_what_is_needed(page: str) -> None:
    """The account's rights, in words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for word in ("pods", "watch"):
        assert word in text


def test_the_table_of_privileges_covers_every_one() -> None:
    """Each host folder, namespace and capability of the manifest is in the operator's table."""
    text = (ROOT / "docs/operating/kubernetes.md").read_text(encoding="utf-8")
    table = text.partition("## Least privilege")[2].partition("## Limits")[0]
    for word in (*HOST_PATHS, "hostPID", "SYS_PTRACE", "DAC_READ_SEARCH", "resourceslices"):
        assert word in table, word


def test_every_key_of_the_section_is_documented() -> None:
    """With its default where that is short."""
    text = (ROOT / "docs/reference/kubernetes.md").read_text(encoding="utf-8")
    assert "`[kubernetes]`" in text
    for field in msgspec.structs.fields(KubernetesSection):
        assert f"`{field.encode_name}`" in text, field.encode_name
