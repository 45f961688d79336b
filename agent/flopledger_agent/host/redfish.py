"""Node power through Redfish: the standard HTTP interface of a node's management controller.

Of each chassis `EnvironmentMetrics` is asked first (an energy counter in joules is best, then
power), then the older `Power`, and an energy counter in kWh last, because it is coarse. The
password comes from a file, is read anew for each question so that it can be rotated, and is never
logged. Redirects and proxies are refused: they would carry it elsewhere.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import threading
import urllib.error
import urllib.request
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, cast
from urllib.parse import quote

import msgspec

from flopledger_agent.host.interface import HostReadError, PowerReading

if TYPE_CHECKING:
    from flopledger_agent.config import RedfishSection

ANSWER_BYTES_MAX: Final = 1024 * 1024  # a chassis with every sensor is some ten kilobytes
PIECE_BYTES: Final = 64 * 1024
UNAUTHORIZED: Final = frozenset({401, 403})
NOT_FOUND: Final = 404
REDIRECTS: Final = range(300, 400)
UJ_PER_JOULE: Final = 1_000_000
UJ_PER_KWH: Final = 3_600_000_000_000
MW_PER_WATT: Final = 1_000
NUMBER_MAX: Final = Decimal(10) ** 15  # beyond every node's lifetime in joules
DIGITS_MAX: Final = 40  # in a number's text; more are no reading


class ChassisReading(msgspec.Struct, frozen=True, kw_only=True):
    """What one chassis says; the better of both is taken."""

    power_mw: int | None = None
    energy_uj: int | None = None
    coarse_energy_uj: int | None = None  # counted in kWh


class RedfishReader:
    """Asks one management controller; implements `PowerReader`."""

    def __init__(self, section: RedfishSection) -> None:
        self._section = section
        self._root = section.url.rstrip("/")

    def read(self) -> PowerReading:
        """One reading, summed over the configured chassis; raises `HostReadError`."""
        with _Deadline(self._section.timeout_seconds) as deadline:
            chassis = self._section.chassis or self._discover(deadline)
            parts = [self._chassis(name, deadline) for name in chassis]
        return total(parts)

    def _discover(self, deadline: _Deadline) -> tuple[str, ...]:
        """A controller's one chassis; of several only a person can say which are the node."""
        answer = self._get("/redfish/v1/Chassis", deadline)
        if answer is None:
            raise HostReadError("not_redfish", self._root)
        members = _list(answer.get("Members"))
        names = [str(_dict(one).get("@odata.id", "")).rstrip("/") for one in members]
        found = tuple(name.rpartition("/")[2] for name in names if name)
        if not found:
            raise HostReadError("no_power_reading", "no chassis")
        if len(found) > 1:
            raise HostReadError("several_chassis", ", ".join(found))
        return found

    def _chassis(self, name: str, deadline: _Deadline) -> ChassisReading:
        place = f"/redfish/v1/Chassis/{quote(name, safe='')}"
        metrics = from_environment_metrics(self._get(f"{place}/EnvironmentMetrics", deadline) or {})
        if metrics.energy_uj is not None or metrics.power_mw is not None:
            return metrics
        power = self._get(f"{place}/Power", deadline) or {}
        return msgspec.structs.replace(metrics, power_mw=from_power(power))

    def _get(self, path: str, deadline: _Deadline) -> dict[str, Any] | None:
        """A JSON object; None where the controller has no such resource."""
        request = urllib.request.Request(  # noqa: S310 (the configuration allows http and https)
            self._root + path, headers={"Accept": "application/json", **self._credentials()}
        )
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.ProxyHandler({}),
            _NoRedirects(),
        ]
        if self._root.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=self._context()))
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(request, timeout=deadline.limit_seconds) as response:
                body = _body(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                code = error.code
            if code == NOT_FOUND:
                return None
            raise HostReadError(_refusal(code), str(code)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise HostReadError(_reason(error, deadline)) from None
        return parse(body)

    def _credentials(self) -> dict[str, str]:
        if self._section.user is None or self._section.password_file is None:
            return {}
        try:
            password = Path(self._section.password_file).read_text(encoding="utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError):
            raise HostReadError("password_not_readable") from None
        pair = f"{self._section.user}:{password}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode('ascii')}"}

    def _context(self) -> ssl.SSLContext:
        """Always verified; a controller's own certificate is trusted by naming it."""
        try:
            context = ssl.create_default_context(cafile=self._section.ca_file)
        except OSError:
            raise HostReadError("certificate_not_trusted", "host.redfish.ca_file") from None
        context.check_hostname = self._section.verify_host_name
        return context


def total(parts: list[ChassisReading]) -> PowerReading:
    """All chassis together, by what every one of them offers; raises `HostReadError`."""
    energies = [part.energy_uj for part in parts]
    powers = [part.power_mw for part in parts]
    coarse = [part.coarse_energy_uj for part in parts]
    if None not in energies:
        return PowerReading(energy_uj=sum(filter(None, energies)))
    if None not in powers:
        return PowerReading(power_mw=sum(filter(None, powers)))
    if None not in coarse:
        return PowerReading(energy_uj=sum(filter(None, coarse)))
    raise HostReadError("no_power_reading")


def from_environment_metrics(answer: dict[str, Any]) -> ChassisReading:
    """`EnvironmentMetrics` of a chassis (schema since Redfish 2020.4)."""
    return ChassisReading(
        power_mw=_scaled(_reading(answer.get("PowerWatts")), MW_PER_WATT),
        energy_uj=_scaled(_reading(answer.get("EnergyJoules")), UJ_PER_JOULE),
        coarse_energy_uj=_scaled(_reading(answer.get("EnergykWh")), UJ_PER_KWH),
    )


def from_power(answer: dict[str, Any]) -> int | None:
    """`Power` of a chassis: the first control is the whole chassis, as the schema says."""
    for control in _list(answer.get("PowerControl")):
        return _scaled(_dict(control).get("PowerConsumedWatts"), MW_PER_WATT)
    return None


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object with exact decimal numbers; raises `HostReadError`."""
    try:
        answer: object = json.loads(
            body, parse_float=_decimal, parse_int=_decimal, parse_constant=_refuse
        )
    except (ValueError, RecursionError):
        raise HostReadError("not_redfish") from None
    if not isinstance(answer, dict):
        raise HostReadError("not_redfish")
    return cast("dict[str, Any]", answer)


def _decimal(text: str) -> Decimal | None:
    """The number, or None for one that is absurdly long."""
    return Decimal(text) if len(text) <= DIGITS_MAX else None


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _reading(sensor: object) -> object:
    """A sensor's excerpt carries its value as `Reading`."""
    return _dict(sensor).get("Reading")


def _scaled(value: object, factor: int) -> int | None:
    """A number in the smaller unit, rounded half to even; None for what cannot be one."""
    if not isinstance(value, Decimal) or not 0 <= value <= NUMBER_MAX:
        return None
    return round(value * factor)


def _dict(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]


def _reason(error: Exception, deadline: _Deadline) -> str:
    cause = getattr(error, "reason", error)
    if deadline.passed or isinstance(cause, TimeoutError):
        return "timeout"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "certificate_not_trusted"
    return "unreachable" if isinstance(error, OSError) else "not_redfish"


def _body(response: http.client.HTTPResponse, deadline: _Deadline) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := response.read1(PIECE_BYTES):
        if deadline.passed:
            raise TimeoutError
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            raise ValueError("the answer is too long")
    return b"".join(pieces)


def _refusal(code: int) -> str:
    if code in UNAUTHORIZED:
        return "unauthorized"
    return "redirected" if code in REDIRECTS else "http_error"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the password elsewhere."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        """Refuse: the answer's own status is then the error."""
        return


class _Deadline:
    """One limit for a whole reading: a socket's timeout alone is one of each single step.

    An answer that drips is given up between two pieces; until then only this thread waits.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.passed = False
        self._timer = threading.Timer(limit_seconds, self._end)
        self._timer.daemon = True

    def _end(self) -> None:
        self.passed = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._timer.cancel()
