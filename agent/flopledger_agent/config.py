"""The agent's configuration: one frozen object read from one TOML file; unknown keys are errors."""

from __future__ import annotations

import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from flopledger_agent.attribution.building import site_of
from flopledger_agent.attribution.kubernetes_section import KubernetesSection
from flopledger_agent.attribution.mapping import AttributionSection
from flopledger_agent.attribution.slurm_section import SlurmSection
from flopledger_agent.clocks import ScaledClockConfig
from flopledger_agent.errors import ConfigError
from flopledger_core.errors import InvalidInput
from flopledger_core.records import Precision

SPOOL_BYTES_DEFAULT: Final = 1024**3  # about 50 days of 8 GPUs with one owner each: 14 kB a minute
SAMPLING_SECONDS_DEFAULT: Final = 1.0
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
SHIP_JITTER_SECONDS_DEFAULT: Final = 45.0  # spreads a fleet over the minute, leaves time to retry


class CollectorSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[collector]`: where sealed batches go."""

    url: Annotated[str, Meta(pattern="^https?://[^/]+.*$")] = "http://127.0.0.1:16180"
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 20.0
    jitter_seconds: Annotated[float, Meta(ge=0, le=55)] = SHIP_JITTER_SECONDS_DEFAULT


class NodeSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[node]`: how this node is called in the ledger."""

    # Empty: NODE_NAME of the environment, else the host name.
    name: Annotated[str, Meta(min_length=1, max_length=255)] = ""
    cluster: Annotated[str, Meta(min_length=1, max_length=255)] | None = None


class StateSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[state]`: where the key, the open windows and the spool live."""

    directory: str = "/var/lib/flopledger-agent"


class WebSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[web]`: the Prometheus page."""

    listen_address: Annotated[str, Meta(pattern=r"^.*:\d{1,5}$")] = "127.0.0.1:16181"


class TagsSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tags]`: the local socket at which jobs register their tags."""

    socket: str = "/run/flopledger-agent/tags.sock"


class SamplingSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sampling]`: how often counters are read."""

    # GPM needs 100 ms between samples; above 30 s short jobs are missed.
    interval_seconds: Annotated[float, Meta(ge=0.2, le=30)] = SAMPLING_SECONDS_DEFAULT
    # One device's reading may take this long (real time) before it is reported as stuck; the first
    # tick of a hang waits it out, the later ones do not.
    deadline_seconds: Annotated[float, Meta(gt=0, le=60)] = 1.0


class SpoolSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[spool]`: sealed batches that the collector has not confirmed yet."""

    max_bytes: Annotated[int, Meta(ge=1024**2)] = SPOOL_BYTES_DEFAULT


class DcgmSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[gpus.dcgm]`: the page of a running dcgm-exporter; without this table none is asked."""

    # The exporter's own default address; another host only because somebody wrote it here.
    url: Annotated[str, Meta(pattern=r"^https?://[^/@\s?#]+(/[^\s#]*)?$")] = (
        "http://127.0.0.1:9400/metrics"
    )
    interval_seconds: Annotated[float, Meta(ge=1, le=300)] = 10.0
    timeout_seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    # How often the exporter itself looks (its option -c, in milliseconds); its default is 30 s.
    exporter_interval_seconds: Annotated[float, Meta(ge=0.1, le=600)] = 30.0
    # Whose series to take from a page of several hosts; absent: those of `node.name`.
    hostname: Annotated[str, Meta(min_length=1, max_length=255)] | None = None


class GpusSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[gpus]`: the real driver, or a simulated one behind the same library."""

    driver: Literal["nvml", "simulated"] = "nvml"
    scenario: str | None = None
    default_precision: Precision | None = None  # of jobs that declare none
    dcgm: DcgmSection | None = None


class RedfishSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[host.redfish]`: the node's management controller; without this table none is asked."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/@\s?#]+/?$")]  # scheme and host only
    user: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    password_file: str | None = None
    chassis: tuple[Annotated[str, Meta(min_length=1, max_length=255)], ...] = ()
    timeout_seconds: Annotated[float, Meta(gt=0, le=60)] = 10.0  # of a whole reading
    ca_file: str | None = None  # certificates to trust instead of the system's
    # False only beside a `ca_file` that holds the controller's own certificate.
    verify_host_name: bool = True


class HostSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[host]`: the node itself: CPU time by owner, and energy outside the GPUs."""

    enabled: bool = True
    # RAPL counters wrap within minutes at load: the longer, the more likely unseen.
    interval_seconds: Annotated[float, Meta(ge=1, le=60)] = 10.0
    rapl: bool = True
    redfish: RedfishSection | None = None
    ipmi: bool = False


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the agent can be told."""

    collector: CollectorSection = CollectorSection()
    node: NodeSection = NodeSection()
    state: StateSection = StateSection()
    web: WebSection = WebSection()
    tags: TagsSection = TagsSection()
    attribution: AttributionSection = AttributionSection()
    slurm: SlurmSection | None = None  # absent: nothing of Slurm is looked for
    kubernetes: KubernetesSection | None = None  # absent: neither kubelet nor a server is asked
    sampling: SamplingSection = SamplingSection()
    spool: SpoolSection = SpoolSection()
    gpus: GpusSection = GpusSection()
    host: HostSection = HostSection()
    clock: ScaledClockConfig | None = None

    @property
    def simulated(self) -> bool:
        """True when anything measured here is not of the real world."""
        return self.gpus.driver == "simulated" or self.clock is not None


def parse_config(text: str, source: str) -> AgentConfig:
    """The configuration in TOML text; `source` names the file in errors."""
    try:
        config = msgspec.convert(tomllib.loads(text), AgentConfig)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {error}; correct the TOML syntax") from error
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{source}: {error}; docs/reference/configuration.md lists every key"
        ) from error
    if config.gpus.driver == "simulated" and config.gpus.scenario is None:
        raise ConfigError(f"{source}: gpus.scenario is missing; a simulated driver needs one")
    if config.clock is not None and config.gpus.driver != "simulated":
        raise ConfigError(f"{source}: clock is set; only a simulated driver may run on scaled time")
    _require_host(config.host, source)
    try:
        site_of(config.attribution)
    except InvalidInput as error:
        raise ConfigError(f"{source}: {error}") from error
    if not config.node.name:
        node = msgspec.structs.replace(
            config.node, name=os.environ.get("NODE_NAME") or socket.gethostname()
        )
        config = msgspec.structs.replace(config, node=node)
    return config


def _require_host(host: HostSection, source: str) -> None:
    """Refuse what would meter twice, or send a password where anybody can read it."""
    redfish = host.redfish
    if redfish is None:
        return
    if host.ipmi:
        raise ConfigError(
            f"{source}: host.ipmi is set; host.redfish meters the node's power, too: choose one"
        )
    if (redfish.user is None) != (redfish.password_file is None):
        raise ConfigError(
            f"{source}: host.redfish.user and password_file: give both or neither of them"
        )
    address = urlsplit(redfish.url)
    if redfish.user and address.scheme == "http" and address.hostname not in LOOPBACK:
        raise ConfigError(
            f"{source}: host.redfish.url is {redfish.url!r}; use https, "
            "or anybody can read the password"
        )
    if not redfish.verify_host_name and redfish.ca_file is None:
        raise ConfigError(
            f"{source}: host.redfish.verify_host_name is false; name the controller's own "
            "certificate in ca_file"
        )


def load_config(path: Path) -> AgentConfig:
    """Read and check the configuration file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; give --config a readable TOML file") from error
    return parse_config(text, str(path))


def listen_address(text: str) -> tuple[str, int]:
    """`host:port` as a pair; an empty host means every interface."""
    host, _, port = text.rpartition(":")
    number = int(port)
    if number > 65535:
        raise ConfigError(f"web.listen_address is {text!r}: a port is at most 65535")
    return host.strip("[]"), number
