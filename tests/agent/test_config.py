"""The configuration is one frozen object; whatever is wrong with it is said by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flopledger_agent.clocks import ScaledClock, ScaledClockConfig, SystemClock
from flopledger_agent.config import listen_address, load_config, parse_config
from flopledger_agent.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_are_safe() -> None:
    """Loopback, the real driver, a spool of a gibibyte, one sample a second."""
    config = parse_config("", "test")

    assert config.web.listen_address == "127.0.0.1:16181"
    assert config.collector.url == "http://127.0.0.1:16180"
    assert config.gpus.driver == "nvml"
    assert config.gpus.dcgm is None
    assert config.sampling.interval_seconds == 1.0
    assert config.node.name != ""
    assert not config.simulated


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[sampling]\ninterval_seconds = 0.01\n", "interval_seconds"),
        ("[spool]\nmax_bytes = 10\n", "max_bytes"),
        ('[collector]\nurl = "ftp://x"\n', "url"),
        ('[web]\nlisten_address = "nowhere"\n', "listen_address"),
        ("[samplign]\n", "samplign"),
        ('[gpus]\ndriver = "magic"\n', "driver"),
        ('[gpus.dcgm]\nurl = "file:///etc/passwd"\n', "url"),
        ('[gpus.dcgm]\nurl = "http://user:secret@host/metrics"\n', "url"),
        ('[gpus.dcgm]\nurl = "http://host/metrics HTTP/1.1"\n', "url"),
        ("[gpus.dcgm]\ninterval_seconds = 0.1\n", "interval_seconds"),
        ('[gpus]\ndriver = "simulated"\n', r"gpus\.scenario"),
        ("[clock]\nspeed = 60\nreal_origin_unix_ns = 0\norigin_unix_ns = 0\n", "clock"),
        ("not toml", "TOML"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(text: str, named: str) -> None:
    """The sentence names the file and the key."""
    with pytest.raises(ConfigError, match=named) as caught:
        parse_config(text, "agent.toml")
    assert str(caught.value).startswith("agent.toml:")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    """No traceback for a typing error in a path."""
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_config(tmp_path / "missing.toml")


def test_listen_addresses() -> None:
    """IPv6 in brackets, and no port beyond the last."""
    assert listen_address("127.0.0.1:16181") == ("127.0.0.1", 16181)
    assert listen_address("[::1]:1") == ("::1", 1)
    with pytest.raises(ConfigError, match="65535"):
        listen_address("x:70000")


def test_scaled_clocks_of_different_processes_agree() -> None:
    """Two clocks made apart from one configuration tell one time, sixty times real."""
    config = ScaledClockConfig(speed=60, real_origin_unix_ns=SystemClock().wall_unix_ns(),
                               origin_unix_ns=1_764_000_000_000_000_000)  # fmt: skip
    one, two = ScaledClock(config), ScaledClock(config)
    first = one.wall_unix_ns()
    second = two.wall_unix_ns()

    assert 0 <= second - first < 60 * 1_000_000_000
    assert one.sleep_seconds(60.0) == 1.0
    assert one.boottime_ns() - (one.wall_unix_ns() - config.origin_unix_ns) < 2_000_000_000
