"""What people tell a running agent through its local socket: pause, resume, and what is paused.

Whoever pauses makes a gap in everybody's ledger, so only root and the agent's own user may; the
kernel says who is asking. Anybody may ask what is in force.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from flopledger_agent.attribution.tag_client import CLIENT_TIMEOUT_SECONDS, ask
from flopledger_agent.attribution.tags import user_name
from flopledger_agent.errors import AgentError, StateError
from flopledger_core.errors import InvalidInput
from flopledger_core.units import MS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flopledger_agent.pauses import PauseDesk

# The loop carries a pause out at its next tick; a driver that hangs is let go within its deadline.
EFFECT_SECONDS: Final = 5.0
ROOT_UID: Final = 0


class ControlRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line from a client; `duration_ms` belongs to `pause` alone."""

    command: Literal["pause", "resume", "status"]
    duration_ms: int | None = None


class ControlAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One line back: what is in force now, or a sentence why nothing was done."""

    paused: bool = False
    in_effect: bool = False  # the loop has carried out what was asked for
    by: str | None = None
    until_unix_ms: int | None = None
    left_ms: int = 0
    error: str | None = None


class Control:
    """Answers control requests; usable from several threads."""

    def __init__(
        self,
        desk: PauseDesk,
        agent_uid: int,
        ring: Callable[[], None],
        effect_seconds: float = EFFECT_SECONDS,
    ) -> None:
        self._desk = desk
        self._agent_uid = agent_uid
        self._ring = ring
        self._effect_seconds = effect_seconds

    def answer(self, line: bytes, uid: int) -> bytes | None:
        """What a line from user `uid` leads to; None when it is no control request."""
        try:
            request = msgspec.json.decode(line, type=dict[str, object])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if "command" not in request:
            return None
        return msgspec.json.encode(self._answer(line, uid))

    def _answer(self, line: bytes, uid: int) -> ControlAnswer:
        try:
            request = msgspec.json.decode(line, type=ControlRequest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return ControlAnswer(error=f"the request cannot be read ({error}); update the client")
        if request.command == "status":
            return self._state(in_effect=True)
        if uid not in {ROOT_UID, self._agent_uid}:
            return ControlAnswer(
                error=f"user {user_name(uid)} may not {request.command} metering: it concerns "
                f"everybody's ledger; ask root or {user_name(self._agent_uid)} to do it"
            )
        paused = request.command == "pause"
        try:
            if paused:
                self._desk.begin(request.duration_ms or 0, user_name(uid))
            else:
                self._desk.end()
        except (InvalidInput, StateError) as error:
            return ControlAnswer(error=str(error))
        self._ring()
        return self._state(
            in_effect=self._desk.await_effect(paused=paused, seconds=self._effect_seconds)
        )

    def _state(self, *, in_effect: bool) -> ControlAnswer:
        pause = self._desk.current()
        if pause is None:
            return ControlAnswer(in_effect=in_effect)
        return ControlAnswer(
            paused=True,
            in_effect=in_effect,
            by=pause.by,
            until_unix_ms=pause.until_unix_ms,
            left_ms=self._desk.left_ms(pause),
        )


class NotCarriedOut(AgentError):
    """The agent did not do what was asked for, or there is no agent."""


def tell(path: Path, request: ControlRequest) -> ControlAnswer:
    """Ask the agent that listens at `path`. Errors: NotCarriedOut says why in a sentence."""
    patience_seconds = EFFECT_SECONDS + CLIENT_TIMEOUT_SECONDS
    try:
        line = ask(path, msgspec.json.encode(request), patience_seconds)
        answer = msgspec.json.decode(line, type=ControlAnswer)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotCarriedOut(
            f"the agent does not answer at {path} ({reason}); start it, or name its --socket"
        ) from error
    except msgspec.DecodeError as error:
        raise NotCarriedOut(f"the agent at {path} gave no answer; update it") from error
    if answer.error is not None:
        raise NotCarriedOut(answer.error)
    return answer


def sentence(answer: ControlAnswer) -> str:
    """What is in force, for people."""
    if not answer.paused or answer.until_unix_ms is None:
        return "metering goes on"
    until = datetime.fromtimestamp(answer.until_unix_ms // MS_PER_SECOND, UTC)
    return (
        f"metering is paused by {answer.by} until {until:%Y-%m-%d %H:%M:%S} UTC, for "
        f"{answer.left_ms // MS_PER_SECOND} seconds more; flopledger-agent resume ends it"
    )
