"""`[host]`: safe as it is, and what would meter twice or betray a password is refused."""

from __future__ import annotations

import pytest

from flopledger_agent.clocks import SystemClock
from flopledger_agent.config import parse_config
from flopledger_agent.errors import ConfigError
from flopledger_agent.host.building import energy_meters
from flopledger_agent.host.power import NodePowerMeter
from flopledger_agent.host.rapl import RaplMeter
from flopledger_agent.host.reasons import REMEDIES, remedy

ACCOUNT = 'user = "meter"\npassword_file = "/etc/flopledger/bmc"\n'


def test_the_default_asks_only_the_kernel() -> None:
    """No management controller is asked that nobody named."""
    host = parse_config("", "test").host
    assert (host.enabled, host.interval_seconds, host.ipmi, host.redfish) == (True, 10, False, None)
    assert [type(meter) for meter in energy_meters(host, SystemClock())] == [RaplMeter]


def test_each_meter_is_built_where_it_is_asked_for() -> None:
    """At most one for the node's power."""
    ipmi = parse_config("[host]\nrapl = false\nipmi = true\n", "test").host
    assert [type(meter) for meter in energy_meters(ipmi, SystemClock())] == [NodePowerMeter]
    redfish = parse_config('[host.redfish]\nurl = "https://bmc-17"\n', "test").host
    assert len(energy_meters(redfish, SystemClock())) == 2
    assert energy_meters(parse_config("[host]\nrapl = false\n", "test").host, SystemClock()) == ()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[host]\ninterval_seconds = 0.1\n", "interval_seconds"),
        ('[host]\nipmi = true\n[host.redfish]\nurl = "https://b"\n', "choose one"),
        ('[host.redfish]\nurl = "https://b"\nuser = "x"\n', "password_file"),
        (f'[host.redfish]\nurl = "http://bmc-17"\n{ACCOUNT}', "use https"),
        ('[host.redfish]\nurl = "https://u:p@b"\n', "url"),
        ('[host.redfish]\nurl = "https://b/redfish/v1"\n', "url"),
        ('[host.redfish]\nurl = "file:///etc/shadow"\n', "url"),
        ('[host.redfish]\nurl = "https://b"\nverify_host_name = false\n', "ca_file"),
        ("[host.redfish]\n", "url"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    """The sentence names the file and the key."""
    with pytest.raises(ConfigError, match=named) as caught:
        parse_config(text, "agent.toml")
    assert str(caught.value).startswith("agent.toml:")


def test_a_password_may_go_over_loopback() -> None:
    """Nobody else can read it there."""
    text = f'[host.redfish]\nurl = "http://127.0.0.1:8000"\n{ACCOUNT}'
    assert parse_config(text, "test").host.redfish is not None


def test_every_reason_has_a_remedy() -> None:
    """A person reading a reason word finds what to do."""
    assert all(len(text) > 10 for text in REMEDIES.values())
    assert remedy("no such word") is None
