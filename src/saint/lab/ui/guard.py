"""What a request has to be before anything reads it: for this host, from this page, small."""

import json
from collections.abc import Collection, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 10_000_000  # bytes of an image
_BODY = LARGEST * 4 // 3 + 60_000  # base64 of it, and the settings
_PATIENCE = 4 * _BODY  # bytes of a body that is too large, read so that its sender sees the answer
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware.

    A foreign page that reaches this server by a name of its own (DNS rebinding) sends that name as Host and is
    refused; one that posts here from its own address sends that as Origin and is refused.

    Args:
        app: what answers the rest.
        hosts: accepted values of Host, e.g. "127.0.0.1:8000".
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets here
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *given]}
            await send(message)

        host = headers.get("host", [])
        if len(host) != 1 or host[0].lower() not in self.hosts:
            await _refuse(
                guarded, 421, f"this server answers to {_either(self.hosts)}; the request was for {_shown(host)}"
            )
            return
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin", [])
            if len(origin) != 1 or origin[0].lower() not in {f"http://{known}" for known in self.hosts}:
                where = f"a request that changes something comes from this server's own page (Origin http://{host[0]})"
                await _refuse(guarded, 403, f"{where}; this one came from {_shown(origin)}")
                return
        body = await _body(receive, headers.get("content-length", []))
        if body is None:
            await _refuse(
                guarded, 413, f"at most {LARGEST // 1_000_000} MB of an image are taken; this is larger: scale it down"
            )
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, guarded)


async def _body(receive: Receive, length: list[str]) -> bytes | None:
    """The body; None where it is too large, whatever its length says of itself."""
    announced = int(length[0]) if length and length[0].isdigit() else 0
    if announced > _PATIENCE:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)  # the sender has gone
        size += len(message.get("body", b""))
        if size <= _BODY:
            parts.append(message.get("body", b""))
        else:
            parts.clear()
        if size > _PATIENCE or not message.get("more_body", False):
            break
    return None if size > _BODY else b"".join(parts)


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"error": why}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _either(values: Iterable[str]) -> str:
    return " or ".join(sorted(values))


def _shown(values: list[str]) -> str:
    return ", ".join(f"{value!r:.80}" for value in values) or "nowhere it names"


def hosts_of(address: str, port: int) -> set[str]:
    """Return what browsers send as Host for a server bound to ``address``.

    Raises:
        ValueError: a wildcard, for which no list of names exists.
    """
    if address in ("0.0.0.0", "::", "", "*"):
        raise ValueError(
            f"--host needs the one address to listen at, got {address!r}: anybody's name for it would have to be accepted"
        )
    own = f"[{address}]" if ":" in address else address
    names = {own} if address not in ("127.0.0.1", "::1", "localhost") else {own, "localhost", "127.0.0.1"}
    return {f"{name}:{port}" for name in names} | ({own, *names} if port == 80 else set())


def plain(value: Any) -> str:
    """An error's message in one line."""
    return " ".join(str(value).split())
