"""The collector's configuration: one frozen object read from TOML; an unknown key is an error.

Read once at start. Nothing here touches the directories it names.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from flopledger_collector.clocks import ScaledClockConfig
from flopledger_collector.errors import ConfigInvalid
from flopledger_core.errors import InvalidInput
from flopledger_core.signing import fingerprint

SQLITE_FILE_NAME: Final = "ledger.sqlite3"
KEY_FILE_NAME: Final = "collector.key"
POLICIES: Final = ("casper-2025", "ec-cumulative", "final-run-only")


class WebConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[web]` table: where agents, people and Prometheus reach the collector."""

    listen_address: str = "127.0.0.1:16180"
    """Host and port of the HTTP server. Loopback unless you put a proxy with TLS in front."""


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[database]` table: where the ledger is kept."""

    url: str | None = None
    """SQLAlchemy URL, `sqlite:////absolute/path`; absent: a SQLite file in the state directory."""


class StateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[state]` table: the collector's own directory."""

    directory: Annotated[str, Meta(min_length=1)] = "/var/lib/flopledger-collector"
    """Holds the signing key and, by default, the SQLite file. Made at first start, mode 0700."""


class LedgerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[ledger]` table: what kind of ledger this is; fixed when it is founded."""

    simulated: bool = False
    """True only for demonstrations: simulated batches count. Elsewhere they are disputed."""
    provenance: tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...] = ()
    """Sentences that every statement prints: where this ledger's inputs come from."""


class TrustedKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `[trust] keys`."""

    public_key: str
    """Base64 Ed25519 public key, as `flopledger-agent check` prints it."""
    node: str | None = None
    """Whose key it is, for people; batches say their node themselves."""


class TrustConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[trust]` table: which agents may write."""

    first_use: Literal["loopback", "never"] = "loopback"
    """`loopback`: an unknown key from this machine is trusted if the server is only there."""
    keys: tuple[TrustedKey, ...] = ()
    """Trusted keys. One that is removed from here is revoked at the next start."""


class FoldConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[fold]` table: how soon admitted batches show in totals."""

    interval_seconds: Annotated[int, Meta(ge=1, le=3600)] = 1
    """Pause between folds, in seconds of real time."""


class PoliciesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[policies]` table: which accounting policies are evaluated."""

    adopted: tuple[str, ...] = POLICIES
    """Ids as `flopledger policies list` prints them."""
    directory: Annotated[str, Meta(min_length=1)] | None = None
    """A directory of policy files of one's own, beside the packaged ones."""

    @property
    def path(self) -> Path | None:
        """The directory, if there is one."""
        return None if self.directory is None else Path(self.directory)


class InstrumentsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[instruments]` table: legal thresholds beside the packaged ones."""

    directory: Annotated[str, Meta(min_length=1)] | None = None
    """A directory of instrument files of one's own, beside the packaged ones."""

    @property
    def path(self) -> Path | None:
        """The directory, if there is one."""
        return None if self.directory is None else Path(self.directory)


class CollectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the collector is told."""

    web: WebConfig = WebConfig()
    database: DatabaseConfig = DatabaseConfig()
    state: StateConfig = StateConfig()
    ledger: LedgerConfig = LedgerConfig()
    trust: TrustConfig = TrustConfig()
    fold: FoldConfig = FoldConfig()
    policies: PoliciesConfig = PoliciesConfig()
    instruments: InstrumentsConfig = InstrumentsConfig()
    clock: ScaledClockConfig | None = None
    """Only in demonstrations and tests: time that runs faster than real."""

    @property
    def state_directory(self) -> Path:
        """Where the collector keeps its own files."""
        return Path(self.state.directory)

    @property
    def key_file(self) -> Path:
        """The collector's signing key."""
        return self.state_directory / KEY_FILE_NAME

    @property
    def database_url(self) -> str:
        """The database, by default a file in the state directory."""
        if self.database.url is not None:
            return self.database.url
        return f"sqlite:///{self.state_directory / SQLITE_FILE_NAME}"


def parse_config(text: str) -> CollectorConfig:
    """The configuration of a TOML text; raises `ConfigInvalid` naming the key."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
        config = msgspec.convert(document, CollectorConfig)
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid("configuration", str(error), "correct the TOML") from error
    except msgspec.ValidationError as error:
        raise ConfigInvalid("configuration", str(error), "correct or remove this key") from error
    _require_address(config.web.listen_address)
    if not config.database_url.startswith("sqlite:///"):
        raise ConfigInvalid(
            "database.url", config.database_url, "this version keeps ledgers in sqlite:/// only"
        )
    for key in config.trust.keys:
        try:
            fingerprint(key.public_key)
        except InvalidInput as error:
            raise ConfigInvalid("trust.keys.public_key", key.public_key, error.remedy) from error
    return config


def load_config(path: Path) -> CollectorConfig:
    """The configuration of a TOML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            "configuration file", str(path), f"name a readable TOML file ({error})"
        ) from error
    return parse_config(text)


def _require_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigInvalid("web.listen_address", address, "write it as host:port")
