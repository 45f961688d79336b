"""The configuration: frozen, strict, and wrong in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flopledger_collector.clocks import ScaledClock
from flopledger_collector.config import CollectorConfig, load_config, parse_config
from flopledger_collector.errors import ConfigInvalid
from flopledger_collector.handle import clock_of
from flopledger_collector.trust import is_loopback
from tests.collector.opened import opened

if TYPE_CHECKING:
    from pathlib import Path


def test_an_empty_file_is_a_working_configuration() -> None:
    """Every key has a default."""
    config = parse_config("")
    assert config == CollectorConfig()
    assert config.web.listen_address == "127.0.0.1:16180"
    assert config.database_url == "sqlite:////var/lib/flopledger-collector/ledger.sqlite3"
    assert config.trust.first_use == "loopback"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[web]\nport = 1", "port"),
        ("[wbe]", "wbe"),
        ("[web]\nlisten_address = 'localhost'", "listen_address"),
        ("[fold]\ninterval_seconds = 0", "interval_seconds"),
        ("[trust]\nfirst_use = 'always'", "first_use"),
        ("[[trust.keys]]\npublic_key = 'abc'", "public_key"),
        ("[database]\nurl = 'postgresql://x'", "database.url"),
        ("[ledger]\nsimulated = 1", "simulated"),
        ("[state", "TOML"),
    ],
)
def test_a_wrong_configuration_names_the_key(text: str, names: str) -> None:
    """Unknown keys are errors too."""
    with pytest.raises(ConfigInvalid, match=names):
        parse_config(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """One sentence with the path."""
    with pytest.raises(ConfigInvalid, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


def test_a_scaled_clock_runs_from_its_origin() -> None:
    """The same table gives every process the same time."""
    text = "[clock]\nspeed = 60\nreal_origin_unix_ns = 1\norigin_unix_ns = 2"
    clock = clock_of(parse_config(text))
    assert isinstance(clock, ScaledClock)
    first, boot, second = clock.wall_unix_ns(), clock.boottime_ns(), clock.wall_unix_ns()
    assert first <= boot - 1_000_000_000 + 2 <= second
    assert clock.sleep_seconds(60.0) == 1.0


def test_a_ledger_keeps_the_kind_it_was_founded_with(tmp_path: Path) -> None:
    """A demonstration never becomes a real ledger."""
    opened(tmp_path, "[ledger]\nsimulated = true").close()
    with pytest.raises(ConfigInvalid, match=r"ledger\.simulated"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:16180", True), ("127.8.8.8", True), ("[::1]:16180", True), ("::1", True),
        ("::ffff:127.0.0.1", True), ("localhost:1", True), ("0.0.0.0:16180", False),
        ("[::]:1", False), ("10.0.0.1", False), ("example", False), ("", False),
    ],
)  # fmt: skip
def test_loopback_is_recognised(host: str, expected: bool) -> None:
    """Addresses as servers and peers write them."""
    assert is_loopback(host) is expected
