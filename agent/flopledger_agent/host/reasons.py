"""Why a quantity of the host can be absent: every reason word with its remedy.

Reasons end up in records and metrics: never rename one.
"""

from __future__ import annotations

from typing import Final

REMEDIES: Final[dict[str, str]] = {
    "cpu_flop_not_counted": "nothing to do: no counter of a CPU tells its executed FLOP",
    "no_permission": "energy_uj is readable by root only since CVE-2020-8694: let the agent's "
    "group read it, or give the agent CAP_DAC_READ_SEARCH (docs/operating/host-energy.md)",
    "no_powercap": "load the kernel's RAPL driver (modprobe intel_rapl_msr); virtual machines and "
    "most other architectures have none",
    "no_such_zone": "nothing to do: this processor has no such energy counter",
    "not_configured": "set host.redfish.url or host.ipmi, if the node has a management controller",
    "disabled": "set host.rapl = true",
    "several_platform_zones": "nothing to do: it is not known whether these counters overlap",
    "zones_changed": "nothing to do: counters came or went inside the window",
    "first_reading": "nothing to do: measuring begins with the second reading",
    "not_readable_at_both_ends": "nothing to do: it was not readable at one end of the window",
    "counter_restarted": "nothing to do: the counter went back, so its part before is lost",
    "wraps_unknown": "shorten host.interval_seconds: the counter may have wrapped more than once",
    "not_a_number": "see the file or the controller's answer: it holds no usable number",
    "out_of_range": "update the controller's firmware: its answer is more than a node can draw",
    "not_readable": "see dmesg: the kernel could not read the counter",
    "node_restarted": "nothing to do: the time between two boots is not metered",
    "proc_not_readable": "mount /proc where the agent runs, with all processes visible",
    "timeout": "check that the management controller answers (docs/operating/host-energy.md)",
    "unreachable": "check host.redfish.url and the way to the management controller",
    "not_redfish": "check host.redfish.url: what answers there does not speak Redfish",
    "redirected": "set host.redfish.url to where the controller really is: redirects are refused",
    "unauthorized": "check host.redfish.user and the file named by host.redfish.password_file",
    "http_error": "see the controller's log: it refused the request",
    "password_not_readable": "let the agent read the file named by host.redfish.password_file",
    "certificate_not_trusted": "name the controller's certificate in host.redfish.ca_file",
    "several_chassis": "set host.redfish.chassis to the ones that together are this node",
    "no_power_reading": "nothing to do: the controller does not offer power of this chassis",
    "power_reading_off": "activate power readings: ipmitool dcmi power activate",
    "program_not_found": "install ipmitool",
    "program_failed": "run `ipmitool dcmi power reading` as the agent's user: it needs /dev/ipmi0",
}
"""Reason word -> what to do."""


def remedy(reason: str) -> str | None:
    """What to do about a reason word of the host; None for a word that is not ours."""
    return REMEDIES.get(reason)
