"""A recording is replayed exactly, and its end is not mistaken for idleness."""

from __future__ import annotations

import io
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.replay import (
    RecordingSource,
    ReplaySource,
    decode_sample,
    encode_sample,
)
from flopledger_core.errors import InvalidInput
from tests.agent.gpus.nodes import node, scenario
from tests.agent.sampling import cycles, sample
from tests.agent.sampling import node as tick_of


def test_what_was_recorded_is_what_is_replayed() -> None:
    """Through the real source, with percentages, cycles and failures in it."""
    for text in (scenario("", ""), scenario(head='driver_version = "580.65.06"')):
        file = io.BytesIO()
        with node(text) as it:
            recording = RecordingSource(it.source, file.write)
            ticks = []
            for _ in range(4):
                it.clock.now_ns += 10**9
                ticks.append(recording.sample())
            recording.close()
        file.seek(0)
        replay = ReplaySource.from_lines(file)
        assert [replay.sample() for _ in ticks] == ticks
        assert replay.sample().failure == "replay_ended"


@given(st.fractions(min_value=0, max_value=1), st.integers(min_value=0, max_value=2**63 - 1))
def test_every_ratio_and_counter_survives_exactly(ratio: Fraction, counter: int) -> None:
    """No float is ever written."""
    reading = msgspec.structs.replace(
        sample(5, cycles(counter), energy_mj=counter), utilization={"hmma": ratio}
    )
    tick = tick_of(5, reading)
    assert decode_sample(encode_sample(tick)) == tick


def test_after_the_end_every_device_is_reported() -> None:
    """What is no longer sampled is not idle."""
    tick = tick_of(5, sample(5, cycles(1)))
    replay = ReplaySource([tick])
    replay.sample()
    after = replay.sample()
    assert [failure.device for failure in after.failures] == [tick.samples[0].device]
    assert after.failure == "replay_ended"
    replay.close()
    assert replay.sample().failure == "closed"


@pytest.mark.parametrize("ratio", ['"1/0"', '"-1/2"', '"half"', "0.5", '"1/"', '"1"', '"/"'])
def test_a_ratio_that_is_none_is_refused(ratio: str) -> None:
    """With a sentence that names the line."""
    tick = tick_of(5, msgspec.structs.replace(sample(5), utilization={"hmma": Fraction(1, 2)}))
    line = encode_sample(tick).replace(b'"1/2"', ratio.encode())
    with pytest.raises(InvalidInput, match="line 1"):
        ReplaySource.from_lines([line]).sample()


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_never_crashes(line: bytes) -> None:
    """Any bytes: InvalidInput or a sample."""
    with pytest.raises(InvalidInput):
        decode_sample(line)
