"""Redfish over a real HTTP server: the best quantity is taken, the password goes nowhere else."""

from __future__ import annotations

import base64
import datetime as dt
import json
import logging
import ssl
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flopledger_agent.config import RedfishSection
from flopledger_agent.host.interface import HostReadError, PowerReading
from flopledger_agent.host.redfish import RedfishReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECRET = "not-for-the-log"
CHASSIS = "/redfish/v1/Chassis"


class Controller:
    """A management controller: path -> JSON, or something that answers by itself."""

    def __init__(self) -> None:
        self.resources: dict[str, Any] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""

    def chassis(self, *names: str) -> None:
        """The members."""
        self.resources[CHASSIS] = {"Members": [{"@odata.id": f"{CHASSIS}/{n}"} for n in names]}

    def metrics(self, name: str, **sensors: object) -> None:
        """`EnvironmentMetrics` of a chassis."""
        self.resources[f"{CHASSIS}/{name}/EnvironmentMetrics"] = {
            sensor: {"Reading": value} for sensor, value in sensors.items()
        }

    def power(self, name: str, *watts: object) -> None:
        """`Power` of a chassis, one control each."""
        self.resources[f"{CHASSIS}/{name}/Power"] = {
            "PowerControl": [{"PowerConsumedWatts": value} for value in watts]
        }


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Controller]:
    """A controller at home on a loopback port; with a context it speaks TLS."""
    controller = Controller()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer as the test says."""
            controller.asked.append((self.path, self.headers["Authorization"]))
            found = controller.resources.get(self.path)
            if callable(found):
                found(self)
                return
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (base class)
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    scheme = "http" if context is None else "https"
    controller.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    try:
        yield controller
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def controller() -> Iterator[Controller]:
    """A controller with one chassis."""
    with serving() as one:
        one.chassis("Self")
        yield one


def read(controller: Controller, **changes: object) -> PowerReading:
    """One reading with a section that differs from the default as told."""
    section = RedfishSection(url=controller.url, timeout_seconds=5)
    return RedfishReader(msgspec.structs.replace(section, **changes)).read()


def reason(act: Callable[[], object]) -> str:
    """Why it failed."""
    with pytest.raises(HostReadError) as caught:
        act()
    return caught.value.reason


def test_the_older_power_resource_is_read(controller: Controller) -> None:
    """The first control is the whole chassis; later ones are parts of it."""
    controller.power("Self", 590, 200)
    assert read(controller) == PowerReading(power_mw=590_000)


def test_a_joule_counter_is_better_than_power_and_power_than_kilowatt_hours(
    controller: Controller,
) -> None:
    """Whatever else is offered, the finest quantity counts."""
    controller.power("Self", 590)
    controller.metrics("Self", PowerWatts=612.4999, EnergykWh=3.25, EnergyJoules=11_700_000.5)
    assert read(controller) == PowerReading(energy_uj=11_700_000_500_000)
    controller.metrics("Self", PowerWatts=612.4999, EnergykWh=3.25)
    assert read(controller) == PowerReading(power_mw=612_500)
    controller.metrics("Self", EnergykWh=3.25)
    assert read(controller) == PowerReading(power_mw=590_000)
    del controller.resources[f"{CHASSIS}/Self/Power"]
    assert read(controller) == PowerReading(energy_uj=11_700_000_000_000)


def test_configured_chassis_are_summed(controller: Controller) -> None:
    """Several are one node only where a person said so."""
    controller.chassis("1", "HGX Baseboard")
    controller.power("1", 1_000)
    controller.metrics("HGX%20Baseboard", PowerWatts=5_000)
    assert reason(lambda: read(controller)) == "several_chassis"
    assert read(controller, chassis=("1", "HGX Baseboard")).power_mw == 6_000_000
    del controller.resources[f"{CHASSIS}/1/Power"]  # half a node's power is not the node's
    both = ("1", "HGX Baseboard")
    assert reason(lambda: read(controller, chassis=both)) == "no_power_reading"


@pytest.mark.parametrize("value", [None, "590", -1, True, [590], 1e300, {"a": 1}])
def test_what_is_no_number_is_no_power(controller: Controller, value: object) -> None:
    """Null, text, a negative: absent, never zero."""
    controller.power("Self", value)
    assert reason(lambda: read(controller)) == "no_power_reading"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"Members": NaN}', b"[" * 5000])
def test_what_is_no_redfish_says_so(controller: Controller, body: bytes) -> None:
    """A login page, a broken answer, an endless one."""
    controller.resources[CHASSIS] = body
    assert reason(lambda: read(controller)) == "not_redfish"


def test_an_endless_answer_is_cut(controller: Controller) -> None:
    """A megabyte is enough."""
    controller.resources[CHASSIS] = b" " * (2 * 1024 * 1024)
    assert reason(lambda: read(controller)) == "not_redfish"


def test_the_password_comes_from_its_file_and_is_never_logged(
    controller: Controller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read for each question, so that it can be rotated."""
    caplog.set_level(logging.DEBUG)
    controller.power("Self", 590)
    path = tmp_path / "password"
    path.write_text("old\n")
    reader = RedfishReader(
        RedfishSection(url=controller.url, user="meter", password_file=str(path))
    )
    reader.read()
    path.write_text(f"{SECRET}\n")
    reader.read()

    given = [base64.b64decode(said.split()[1]).decode() for _, said in controller.asked if said]
    assert given[0] == "meter:old"
    assert given[-1] == f"meter:{SECRET}"
    path.unlink()
    assert reason(reader.read) == "password_not_readable"
    assert SECRET not in caplog.text


def test_a_redirect_is_never_followed(controller: Controller, tmp_path: Path) -> None:
    """It would carry the password to another host."""
    password = tmp_path / "password"
    password.write_text(SECRET)
    with serving() as thief:

        def redirect(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{thief.url}{CHASSIS}")
            handler.end_headers()

        controller.resources[CHASSIS] = redirect
        account = {"user": "meter", "password_file": str(password)}
        assert reason(lambda: read(controller, **account)) == "redirected"
        assert thief.asked == []


@pytest.mark.parametrize(
    ("code", "expected"), [(401, "unauthorized"), (403, "unauthorized"), (500, "http_error")]
)
def test_a_refusal_says_why(controller: Controller, code: int, expected: str) -> None:
    """The account and the controller have remedies of their own."""
    controller.resources[CHASSIS] = lambda handler: handler.send_error(code)
    assert reason(lambda: read(controller)) == expected


def test_a_dripping_answer_ends_with_the_deadline(controller: Controller) -> None:
    """A byte now and then keeps a socket's timeout quiet, but not the reading's."""
    stop = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not stop.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    controller.resources[CHASSIS] = drip
    began = time.monotonic()
    assert reason(lambda: read(controller, timeout_seconds=0.5)) == "timeout"
    stop.set()
    assert time.monotonic() - began < 5


def own_certificate(folder: Path) -> Path:
    """A certificate as controllers make them: signed by itself, for a name of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bmc")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "bmc.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


def test_a_controllers_own_certificate_is_trusted_only_by_name(tmp_path: Path) -> None:
    """Without it nothing is read; with it, its host name need not fit."""
    path = own_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with serving(context) as controller:
        controller.chassis("Self")
        controller.power("Self", 590)
        assert reason(lambda: read(controller)) == "certificate_not_trusted"
        assert reason(lambda: read(controller, ca_file=str(path))) == "certificate_not_trusted"
        trusted = {"ca_file": str(path), "verify_host_name": False}
        assert read(controller, **trusted).power_mw == 590_000
        missing = {"ca_file": str(tmp_path / "none.pem")}
        assert reason(lambda: read(controller, **missing)) == "certificate_not_trusted"


def test_nobody_at_home_says_so() -> None:
    """A closed port is unreachable, at once."""
    section = RedfishSection(url="http://127.0.0.1:9", timeout_seconds=2)
    assert reason(RedfishReader(section).read) == "unreachable"
