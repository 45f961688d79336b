"""Trust: which public keys the collector takes batches from.

A key is trusted because the configuration lists it, because it is the collector's own, or, where
both ends are loopback and the configuration allows it, because it came first. A revoked key stays
revoked until the configuration lists it again.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import msgspec

from flopledger_collector.journal import KeyEntry
from flopledger_core.signing import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flopledger_collector.config import TrustedKey


class KeyPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration changes about the keys known so far."""

    added: tuple[KeyEntry, ...]
    changed: tuple[KeyEntry, ...]


def is_loopback(host: str) -> bool:
    """Whether an address (a name, `host`, `host:port` or `[v6]:port`) is this machine's own."""
    bare = host
    if host.startswith("["):
        bare = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        bare = host.partition(":")[0]
    if bare == "localhost":
        return True
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def plan_keys(
    listed: Iterable[TrustedKey],
    known: Mapping[str, KeyEntry],
    *,
    collector_key: str,
    now_unix_ms: int,
) -> KeyPlan:
    """Bring the known keys to what the configuration lists, and the collector's own in.

    A key that the configuration no longer lists is revoked; keys trusted on first use stay.
    """
    wanted: dict[str, KeyEntry] = {}
    own = fingerprint(collector_key)
    wanted[own] = KeyEntry(
        fingerprint=own,
        public_key=collector_key,
        node=None,
        state="trusted",
        added_unix_ms=now_unix_ms,
        how="collector",
    )
    for key in listed:
        name = fingerprint(key.public_key)
        wanted[name] = KeyEntry(
            fingerprint=name,
            public_key=key.public_key,
            node=key.node,
            state="trusted",
            added_unix_ms=now_unix_ms,
            how="config",
        )
    added = [entry for name, entry in wanted.items() if name not in known]
    changed: list[KeyEntry] = []
    for name, before in known.items():
        entry = wanted.get(name)
        if entry is None:
            if before.how != "config" or before.state == "revoked":
                continue
            after = msgspec.structs.replace(before, state="revoked")
        else:
            after = msgspec.structs.replace(entry, added_unix_ms=before.added_unix_ms)
        if after != before:
            changed.append(after)
    return KeyPlan(added=tuple(added), changed=tuple(changed))
