"""The agent's own key: made at first start, readable by the agent's user alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flopledger_core.signing import SigningKey

if TYPE_CHECKING:
    from flopledger_agent.disk import Disk

KEY_FILE: Final = "agent-key.pem"


def load_or_create_key(disk: Disk) -> SigningKey:
    """The key in the state directory; a new one, made durable first, when there is none."""
    pem = disk.read(KEY_FILE)
    if pem is not None:
        return SigningKey.from_pem(pem)
    key = SigningKey.generate()
    disk.write(KEY_FILE, key.to_pem(), durable=True)
    return key
