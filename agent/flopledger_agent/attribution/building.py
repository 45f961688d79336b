"""Builds the attributor from the configuration: tags, environments, rules, and schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_agent.attribution.mapping import RuleBook, require_default_project
from flopledger_agent.attribution.owners import EnvironmentAttributor
from flopledger_agent.attribution.precedence import Site
from flopledger_agent.attribution.scheduled import JoinedMemberships, SchedulerAttributor
from flopledger_agent.attribution.services import Services

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flopledger_agent.attribution.allocations import AllocationSource
    from flopledger_agent.attribution.interface import Process, ProcessTable
    from flopledger_agent.attribution.mapping import AttributionSection
    from flopledger_agent.attribution.precedence import Membership
    from flopledger_agent.attribution.scheduled import Witness
    from flopledger_agent.attribution.tags import TagRegistry


def site_of(section: AttributionSection) -> Site:
    """What the site says of untagged work. Errors: InvalidInput names the key and the remedy."""
    return Site(
        rules=RuleBook(section.rules),
        default_project=require_default_project(section.default_project),
    )


def make_attributor(  # noqa: PLR0913 (what is joined, named at the call)
    section: AttributionSection,
    processes: ProcessTable,
    registry: TagRegistry,
    *,
    sources: Sequence[AllocationSource] = (),
    memberships: Sequence[Callable[[Process], Membership | None]] = (),
    witness: Witness | None = None,
) -> SchedulerAttributor:
    """The one attributor of a node; used by one thread, the sources by several."""
    return SchedulerAttributor(
        EnvironmentAttributor(processes, registry),
        processes,
        sources,
        memberships=JoinedMemberships(*memberships, Services().membership),
        witness=witness,
        site=site_of(section),
    )
