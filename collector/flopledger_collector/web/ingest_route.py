"""The one place where agents write: receives a body within limits and hands its bytes on.

The body is not looked at here. It is refused before it is read where its headers already say
that it cannot be accepted, and while it is read when it grows too large or comes too slowly. A
browser cannot be made to send the media type across origins without asking first, which keeps a
web page from posting batches through somebody's loopback.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from litestar import Request, Response, post
from litestar.exceptions import HTTPException

from flopledger_collector.errors import RequestRefused, WriterStopped
from flopledger_collector.ingest import REQUEST_BYTES_MAX, IngestRequest
from flopledger_collector.trust import is_loopback
from flopledger_collector.web.surface import BODY_BYTES_IN_FLIGHT_MAX, Surface
from flopledger_collector.writer import SUBMIT_TIMEOUT_SECONDS
from flopledger_core.batch import MEDIA_TYPE

BODY_TIMEOUT_SECONDS: Final = 60.0  # 64 MiB at 10 Mbit/s; agents send a few KiB
# A request that carries one of these came through something; its peer is not the sender.
FORWARDING_HEADERS: Final = (
    "forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip",
)  # fmt: skip

AnyRequest = Request[Any, Any, Any]


class SlowBody(HTTPException):
    """The body did not arrive in time."""

    status_code = 408


@post(
    "/v1/batches",
    status_code=200,
    summary="Post sealed batches",
    description=f"The body is one or more batches of media type `{MEDIA_TYPE}`, concatenated. "
    "Each is answered in order: admitted, duplicate, conflict, out_of_order or refused.",
)
async def post_batches(request: AnyRequest) -> Response[bytes]:
    """One answer per batch, given after the commit that made it durable."""
    surface: Surface = request.app.state.surface
    _require_acceptable(request)
    content = await _body(request, surface)
    surface.body_bytes_in_flight += len(content)
    try:
        answers = await _admit(surface, content, peer_is_loopback=peer_is_loopback(request))
    finally:
        surface.body_bytes_in_flight -= len(content)
    document = {"answers": [msgspec.structs.asdict(answer) for answer in answers]}
    return Response(msgspec.json.encode(document), media_type="application/json")


async def _admit(surface: Surface, content: bytes, *, peer_is_loopback: bool) -> Any:  # noqa: ANN401 (a list of answers)
    incoming = IngestRequest(content=content, peer_is_loopback=peer_is_loopback)
    loop = asyncio.get_running_loop()
    waiting = await loop.run_in_executor(
        surface.ingest_threads, surface.handle.writer.enqueue, [incoming]
    )
    try:
        # Shielded: the writer sets the result whether or not anybody still waits for it.
        decided = await asyncio.wait_for(
            asyncio.shield(asyncio.wrap_future(waiting)), timeout=SUBMIT_TIMEOUT_SECONDS
        )
    except TimeoutError as error:
        raise WriterStopped(
            f"ingest: no commit within {SUBMIT_TIMEOUT_SECONDS} s; send the batches again"
        ) from error
    return decided[0]


def peer_is_loopback(request: AnyRequest) -> bool:
    """Whether the sender is this machine itself, with nothing in between that shows itself.

    A proxy that passes the caller's `Host` on gives itself away, and so does a web page, whose
    browser adds `Origin`. A tunnel that rewrites `Host` does not: behind one, first use is "never".
    """
    headers = request.headers
    if "origin" in headers or any(name in headers for name in FORWARDING_HEADERS):
        return False
    if not is_loopback(headers.get("host", "")):
        return False
    return request.client is not None and is_loopback(request.client.host)


def _require_acceptable(request: AnyRequest) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise RequestRefused(
            "unsupported_encoding", "Content-Encoding", encoding, "send the batches uncompressed"
        )
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise RequestRefused(
            "unsupported_encoding", "Content-Type", media_type, f"send {MEDIA_TYPE}"
        )
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and len(announced) <= len(str(2**63)):
        _require_size(int(announced))
    else:
        raise RequestRefused("malformed", "Content-Length", announced, "give a plain number")


def _require_size(size_bytes: int) -> None:
    if size_bytes > REQUEST_BYTES_MAX:
        raise RequestRefused(
            "too_large", "body", f"{size_bytes} bytes", f"send at most {REQUEST_BYTES_MAX} bytes"
        )


async def _body(request: AnyRequest, surface: Surface) -> bytes:
    """The whole body. Raises before holding more than the limits allow."""
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                surface.body_bytes_in_flight += len(chunk)
                content += chunk
                _require_size(len(content))
                if surface.body_bytes_in_flight > BODY_BYTES_IN_FLIGHT_MAX:
                    raise WriterStopped(
                        "ingest: too many bodies are being received; send the batches again later"
                    )
    except TimeoutError as error:
        raise SlowBody(
            f"body is incomplete after {BODY_TIMEOUT_SECONDS:.0f} s: send it faster or in parts"
        ) from error
    finally:
        surface.body_bytes_in_flight -= len(content)
    return bytes(content)
