"""What every NVML error means to us: a stable reason word, a remedy, and how far it reaches.

A table, so that no error of the driver is ever guessed at; a test enumerates the binding's
constants and fails when one is missing here. Reasons end up in records and metrics: never rename
one. Codes are plain integers, because only `nvml.py` may import the binding.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from flopledger_core.errors import FlopLedgerError

Scope = Literal["field", "device", "node"]

NOT_SUPPORTED: Final = 3
INVALID_ARGUMENT: Final = 2
NOT_FOUND: Final = 6
TIMED_OUT: Final = 10
LIBRARY_NOT_FOUND: Final = 12
FUNCTION_NOT_FOUND: Final = 13


class Meaning(msgspec.Struct, frozen=True, kw_only=True):
    """What an error code says; `lasting` ones are not asked again until a reopening."""

    reason: str
    remedy: str
    scope: Scope
    lasting: bool = False


def _field(reason: str, remedy: str, *, lasting: bool = False) -> Meaning:
    return Meaning(reason=reason, remedy=remedy, scope="field", lasting=lasting)


def _device(reason: str, remedy: str) -> Meaning:
    return Meaning(reason=reason, remedy=remedy, scope="device")


def _node(reason: str, remedy: str) -> Meaning:
    return Meaning(reason=reason, remedy=remedy, scope="node")


_REPORT: Final = (
    "restart the agent; if it stays, report it with the output of flopledger-agent check"
)

ERRORS: Final[dict[int, Meaning]] = {
    1: _node("driver_uninitialized", "nothing to do: the agent opens the driver again by itself"),
    INVALID_ARGUMENT: _field("invalid_argument", _REPORT),
    NOT_SUPPORTED: _field(
        "not_supported", "nothing to do: this device does not offer the quantity", lasting=True
    ),
    4: _field(
        "no_permission", "run the agent as a user the driver admits, or grant it the capability"
    ),
    5: _field("already_initialized", _REPORT),
    NOT_FOUND: _field("not_found", "nothing to do: the driver had nothing to report"),
    7: _field("insufficient_size", "nothing to do: the list grew while it was read"),
    8: _device("insufficient_power", "connect the GPU's power cables"),
    9: _node("driver_not_loaded", "load the NVIDIA driver (modprobe nvidia)"),
    TIMED_OUT: _field("driver_timeout", "nothing to do: the driver was too slow this time"),
    11: _device("interrupt_issue", "reboot the node; the kernel could not set up the interrupt"),
    LIBRARY_NOT_FOUND: _node(
        "nvml_not_found", "install the NVIDIA driver so that libnvidia-ml.so.1 can be loaded"
    ),
    FUNCTION_NOT_FOUND: _field(
        "function_not_found", "update the NVIDIA driver: it lacks this function", lasting=True
    ),
    14: _field("corrupted_inforom", "flash the GPU's infoROM or replace the GPU"),
    15: _device("gpu_is_lost", "drain the node and reset or reseat the GPU (see dmesg for Xid 79)"),
    16: _device("reset_required", "drain the node and run nvidia-smi --gpu-reset"),
    17: _node("blocked_by_system", "let the agent reach /dev/nvidia* (cgroup or container limits)"),
    18: _node(
        "driver_version_mismatch",
        "nothing to do after an upgrade: the agent loads the new library by itself; if it stays, "
        "library and kernel module differ: reload the module or reboot",
    ),
    19: _field("in_use", "nothing to do: another program held the quantity this time"),
    20: _field("out_of_memory", "free memory on the node"),
    21: _field("no_data", "nothing to do: the driver had no reading yet"),
    22: _field("vgpu_ecc_not_supported", "enable ECC as the vGPU requires", lasting=True),
    23: _field("insufficient_resources", "free GPU resources"),
    24: _field("frequency_not_supported", "nothing to do: it is not offered", lasting=True),
    25: _field("argument_version_mismatch", "update the NVIDIA driver", lasting=True),
    26: _field("deprecated", "update the agent: the driver retired this function", lasting=True),
    27: _field("not_ready", "nothing to do: the device was not ready this time"),
    28: _device("gpu_not_found", "check that the GPU is seated and visible (lspci)"),
    29: _field("invalid_state", "nothing to do: the device was changing its state"),
    30: _field("reset_type_not_supported", _REPORT, lasting=True),
    999: _field("unknown_error", "see dmesg for NVRM messages; reset the GPU if it stays"),
}
"""NVML return code -> meaning."""

UNLISTED: Final = _field("unlisted_error", "update the agent: the driver answered a newer code")

OWN_REASONS: Final[dict[str, str]] = {
    "timeout": "see dmesg for NVRM messages; the agent resumes when the driver answers",
    "device_missing": "check that the GPU is seated and visible (lspci), or declare it removed",
    "unexpected_error": _REPORT,
    "worker_cannot_start": "give the agent's unit room for more processes or memory",
    "worker_died": "nothing to do: another one was started; if it stays, report the agent's log",
    "worker_starting": "nothing to do: the process that reads the driver is being started",
    "paused": "nothing to do: the agent was paused on request and resumes by itself",
    "closed": "nothing to do: the agent is shutting down",
    "backing_off": "nothing to do: the driver is tried again shortly",
    "no_devices": "check that the GPU is seated and visible (lspci)",
    "replay_ended": "nothing to do: the recording has no more samples",
    "warming_up": "nothing to do: counting begins once the counters' scale is certain",
    "first_reading": "nothing to do: means and cycles begin with the second sample",
    "scale_undetermined": "nothing to do: the counters are used once their scale is certain",
    "scale_contradicted": "nothing to do: the counters are used again once their scale is certain",
    "sm_count_unknown": "update the hardware table: it has no row for this device",
    "driver_lacks_cycle_counters": "update to an R595 or newer driver",
    "gpm_not_supported": "nothing to do: this device has no GPM (Hopper and newer have it)",
    "mig_layout_unclear": "nothing to do: the GPU was being partitioned; if it stays, "
    "compare nvidia-smi mig -lgi with what was intended",
    "mig_slices_unknown": "update the hardware table, or let the agent see the GPU's MIG profiles "
    "(nvidia-smi mig -lgip); until then the GPU is metered as one device",
    "no_compute_instance": "create a compute instance (nvidia-smi mig -cci), or switch MIG off",
    "slices_not_configured": "nothing to do: no GPU instance uses these slices",
    "layout_changed": "nothing to do: the GPU was partitioned anew",
    "not_a_number": "nothing to do: the driver had no value this time",
    "not_available": "nothing to do: the driver marks the quantity as not available",
    "out_of_range": _REPORT,
    "not_requested": _REPORT,
    "no_sm_clock_or_count": "nothing to do: shares of time are used once clock and SMs are known",
    "dcgm_not_asked_yet": "nothing to do: the first page comes within seconds",
    "dcgm_unreachable": "start dcgm-exporter, or correct gpus.dcgm.url",
    "dcgm_timeout": "see why dcgm-exporter is slow, or raise gpus.dcgm.timeout_seconds",
    "dcgm_http_error": "correct gpus.dcgm.url: it must be the metrics page of dcgm-exporter",
    "dcgm_not_an_exporter": "correct gpus.dcgm.url: it must be the metrics page of dcgm-exporter",
    "dcgm_page_too_large": "correct gpus.dcgm.url: it must be the page of this node's exporter",
    "dcgm_stale": "restart dcgm-exporter: its figures of this device stand still",
    "dcgm_device_not_on_page": "let dcgm-exporter see this GPU, or correct gpus.dcgm.url",
    "dcgm_other_hosts_only": "set gpus.dcgm.hostname to the host name on the page",
    "dcgm_not_exported": "enable DCGM_FI_PROF_PIPE_TENSOR_ACTIVE in the counters of dcgm-exporter",
    "dcgm_series_disagree": "see why dcgm-exporter tells two values of one device",
    "dcgm_contradicts_gpu_util": "restart dcgm-exporter (DCGM): its profiling fields stay zero",
}
"""Reasons that no driver code stands for -> remedy."""


class DriverError(FlopLedgerError):
    """A call of the driver did not succeed; `code` is what NVML returned."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.meaning = meaning_of(code)
        super().__init__(f"{self.meaning.reason} (NVML {code}): {self.meaning.remedy}")


def meaning_of(code: int) -> Meaning:
    """What an NVML return code means; a code newer than the table is a field's own trouble."""
    return ERRORS.get(code, UNLISTED)


def remedy_for(reason: str) -> str | None:
    """What to do about a reason word; None for a word that is not ours."""
    if reason in OWN_REASONS:
        return OWN_REASONS[reason]
    for meaning in (*ERRORS.values(), UNLISTED):
        if meaning.reason == reason:
            return meaning.remedy
    return None
