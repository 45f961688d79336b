"""The agent's configuration: one frozen object read from one TOML file; unknown keys are errors."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from flopledger_agent.clocks import ScaledClockConfig
from flopledger_agent.errors import ConfigError

SPOOL_BYTES_DEFAULT: Final = 1024**3  # about 80 days of 8 GPUs with one owner each: 9.3 kB a minute
SAMPLING_SECONDS_DEFAULT: Final = 1.0
SHIP_JITTER_SECONDS_DEFAULT: Final = 45.0  # spreads a fleet over the minute, leaves time to retry


class CollectorSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[collector]`: where sealed batches go."""

    url: Annotated[str, Meta(pattern="^https?://[^/]+.*$")] = "http://127.0.0.1:16180"
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 20.0
    jitter_seconds: Annotated[float, Meta(ge=0, le=55)] = SHIP_JITTER_SECONDS_DEFAULT


class NodeSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[node]`: how this node is called in the ledger."""

    name: Annotated[str, Meta(min_length=1, max_length=255)] = ""  # empty: the host name
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


class GpusSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[gpus]`: the real driver, or a simulated one behind the same library."""

    driver: Literal["nvml", "simulated"] = "nvml"
    scenario: str | None = None


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the agent can be told."""

    collector: CollectorSection = CollectorSection()
    node: NodeSection = NodeSection()
    state: StateSection = StateSection()
    web: WebSection = WebSection()
    tags: TagsSection = TagsSection()
    sampling: SamplingSection = SamplingSection()
    spool: SpoolSection = SpoolSection()
    gpus: GpusSection = GpusSection()
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
    if not config.node.name:
        node = msgspec.structs.replace(config.node, name=socket.gethostname())
        config = msgspec.structs.replace(config, node=node)
    return config


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
