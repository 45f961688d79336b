"""Records are sealed with a first estimate, at the precision that was declared or configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import msgspec
import pytest

from flopledger_agent.config import parse_config
from flopledger_agent.disk import MemoryDisk
from flopledger_agent.errors import ConfigError
from flopledger_agent.estimates import with_estimate
from flopledger_agent.windows import Closed
from flopledger_core.flop import estimate
from flopledger_core.records import Cycles, Device, Precision, UsageRecord
from tests.agent.sampling import FixedAttributor, claim
from tests.agent.test_loop import TABLE, Node

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import Claim

UNDECLARED = msgspec.structs.replace(claim("atlas"), precision=None, precision_origin="unknown")


def test_records_carry_their_first_estimate() -> None:
    """What the core function makes of a record's own counters on the day it is sealed."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 70)
    agent.stop()
    records = place.usage()

    assert records
    for record in records:
        assert record.estimate is not None
        bare = msgspec.structs.replace(record, estimate=None)
        assert record.estimate == estimate(bare, TABLE)
        assert record.estimate.assumed_precision == "bf16"
        assert "flop" not in record.absent


@pytest.mark.parametrize(("hmma", "flags"), [(900, ()), (10, ("tensor_cross_check",))])
def test_tensor_counters_that_do_not_add_up_are_flagged(hmma: int, flags: tuple[str, ...]) -> None:
    """HMMA far below what any-tensor activity leaves to it is said, and changes no amount."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 3)
    agent.stop()
    (record,) = place.usage()
    cycles = Cycles(elapsed=2000, sm_active=1500, any_tensor=1000, hmma=hmma, imma=50, dmma=0,
                    dfma=0, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip
    bare = msgspec.structs.replace(record, cycles=cycles, estimate=None, flags=())
    sealed = with_estimate(Closed(record=bare, user=None), TABLE).record

    assert isinstance(sealed, UsageRecord)
    assert sealed.flags == flags
    assert sealed.cycles == cycles


@pytest.mark.parametrize(
    ("capability", "flags", "absent"),
    [
        ("9.0", ("device_not_in_table",), None),
        ("77.7", (), "no_hardware_table_row"),
        (None, (), "no_hardware_table_row"),
    ],
)
def test_peers_row_17_an_unknown_model_is_never_guessed(
    capability: str | None, flags: tuple[str, ...], absent: str | None
) -> None:
    """A known architecture gets wide bounds and a flag, any other no FLOP, with the reason."""
    place = Node(MemoryDisk())
    place.device = Device(
        uuid="GPU-9", name="NVIDIA Unheard Of", compute_capability=capability, sm_count=100
    )
    agent = place.agent()
    place.tick(agent, 3)
    agent.stop()
    (record,) = place.usage()

    assert record.flags == flags
    assert (record.estimate is None) == (absent is not None)
    assert record.absent.get("flop") == absent
    assert record.cycles.elapsed is not None  # the raw counters stay


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ((claim("atlas"),), [("bf16", "declared")]),
        ((UNDECLARED,), [("fp8", "configured")]),
        ((claim(),), [(None, "unknown")]),  # idle: no work that an operator could have meant
    ],
)
def test_the_configured_precision_is_for_work_that_declares_none(
    claims: tuple[Claim, ...], expected: list[tuple[str | None, str]]
) -> None:
    """And the record says that it was configured, not declared."""
    place = Node(MemoryDisk())
    place.attributor = FixedAttributor(*claims)
    place.default_precision = "fp8"
    agent = place.agent()
    place.tick(agent, 3)
    agent.stop()
    assert [(r.precision, r.precision_origin) for r in place.usage()] == expected


def test_unknown_precisions_are_refused_in_the_configuration() -> None:
    """With the key; the known ones are the records' own."""
    for precision in get_args(Precision):
        text = f'[gpus]\ndefault_precision = "{precision}"\n'
        assert parse_config(text, "test").gpus.default_precision == precision
    with pytest.raises(ConfigError, match="default_precision"):
        parse_config('[gpus]\ndefault_precision = "fp7"\n', "test")
