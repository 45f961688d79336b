"""How a device that several use is split: in integer weights, so that the parts sum to it. Pure.

Where the driver tells each process's use of the SMs, owners are charged by it; where it tells
nothing, or nothing was used, holders are charged equally: each job that a scheduler gave the device
to, or without a scheduler each process. Whatever the rule, each owner is one claim.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd, lcm
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.attribution.owners import OWNERS_MAX
from flopledger_agent.attribution.tag_values import evidence
from flopledger_core.identity import UNATTRIBUTED_OWNER

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHTS_MAX: Final = 1_000_000  # records.Attribution.weights


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One process's or one job's claim on a device; parts of one group share one holder's share."""

    claim: Claim
    group: str
    used_percent: int | None  # of the SMs; None: the driver tells none


class _Merged:
    """The parts of one owner."""

    def __init__(self, first: Part) -> None:
        self.claim = first.claim
        self.parts: list[Part] = [first]

    def add(self, part: Part) -> None:
        self.parts.append(part)

    def units(self, sizes: dict[str, int] | None) -> Fraction:
        """What of the equal split is this owner's: of each group its part, or one a process."""
        if sizes is None:
            return Fraction(len(self.parts))
        return sum((Fraction(1, sizes[part.group]) for part in self.parts), Fraction(0))

    def whole(self, weight: int) -> Claim:
        used = [part.used_percent for part in self.parts]
        known = [amount for amount in used if amount is not None]
        claim = self.claim
        count = len(self.parts)
        return msgspec.structs.replace(
            claim,
            weight=weight,
            used_percent=sum(known) if len(known) == len(used) else None,
            evidence=claim.evidence
            if count == 1
            else evidence(f"{count} processes; {claim.evidence or ''}"),
        )


def split(parts: Sequence[Part], *, by_group: bool) -> tuple[Claim, ...]:
    """One claim for each owner, in an order that never changes, with its weight in the equal split.

    `by_group`: groups are charged equally, whatever number of processes each has.
    """
    merged: dict[str, _Merged] = {}
    for part in parts:
        key = _key(part.claim)
        if key in merged:
            merged[key].add(part)
        else:
            merged[key] = _Merged(part)
    owners = _bounded([merged[key] for key in sorted(merged)])
    sizes: dict[str, int] = {}
    for part in parts:
        sizes[part.group] = sizes.get(part.group, 0) + 1
    weights = integer_weights([owner.units(sizes if by_group else None) for owner in owners])
    return tuple(owner.whole(weight) for owner, weight in zip(owners, weights, strict=True))


def integer_weights(units: Sequence[Fraction | int]) -> list[int]:
    """Positive integers in proportion to `units`, exactly unless their sum exceeds the limit.

    Nobody's weight is nothing: a record of an owner has a part of the device, however small.
    """
    exact = [Fraction(amount) for amount in units]
    total = sum(exact)
    if len(exact) == 1 or total == 0:
        return [1] * len(exact)
    if all(exact):
        scale = lcm(*(amount.denominator for amount in exact))
        whole = [int(amount * scale) for amount in exact]
        divisor = gcd(*whole)
        whole = [amount // divisor for amount in whole]
        if sum(whole) <= WEIGHTS_MAX:
            return whole
    room = WEIGHTS_MAX - len(exact)  # one for each, the rest in proportion
    return [1 + int(room * amount / total) for amount in exact]


def record_weights(weights: Sequence[int], used: Sequence[int]) -> tuple[list[int], bool]:
    """The weights of a window's records, and whether they are by use rather than equal.

    `weights` are those of the equal split, `used` what each owner used over the window, empty
    where the driver did not tell it throughout.
    """
    if len(weights) > 1 and sum(used) > 0:
        return integer_weights(used), True
    return list(weights), False


def claim_weights(claims: Sequence[Claim]) -> list[int]:
    """The weights of claims for the interval they were made for, by use where it was told."""
    used = [claim.used_percent for claim in claims]
    told = [amount for amount in used if amount is not None]
    weights = [claim.weight for claim in claims]
    return record_weights(weights, told if len(told) == len(used) else ())[0]


def with_rule(text: str | None, *, by_use: bool) -> str:
    """Evidence of a shared device's owner with the rule of the split."""
    rule = "split by use of the SMs" if by_use else "split equally"
    return evidence(f"{rule}; {text}" if text else rule)


def _bounded(owners: list[_Merged]) -> list[_Merged]:
    """At most so many owners: of those beyond, nobody is told apart, and their work is nobody's."""
    if len(owners) <= OWNERS_MAX:
        return owners
    kept = sorted(owners, key=lambda owner: -len(owner.parts))  # stable: the order is fixed
    rest = kept[OWNERS_MAX - 1 :]
    jobs = {(owner.claim.owner.job, owner.claim.owner.attempt) for owner in rest}
    job, attempt = jobs.pop() if len(jobs) == 1 else (None, None)
    crowd = _Merged(rest[0].parts[0])
    crowd.parts = [part for owner in rest for part in owner.parts]
    crowd.claim = Claim(
        owner=msgspec.structs.replace(UNATTRIBUTED_OWNER, job=job, attempt=attempt),
        weight=1,
        source="none",
        evidence=f"{len(rest)} owners beyond the {OWNERS_MAX - 1} that are told apart on a device",
        precision=None,
        precision_origin="unknown",
        user=None,
        flags=(),
        allocated=all(owner.claim.allocated for owner in rest),
    )
    return [*kept[: OWNERS_MAX - 1], crowd]


def _key(claim: Claim) -> str:
    """What must be equal for two parts to be one owner's: what a record keeps of them."""
    return repr(
        (
            claim.owner,
            claim.source,
            claim.precision,
            claim.precision_origin,
            claim.user,
            claim.flags,
            claim.allocated,
        )
    )
