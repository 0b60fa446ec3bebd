"""Who may speak to the labelling server, and with how much.

Owns the token, its cookie, the checks of Host, Origin and size, and the headers that every reply carries. Knows nothing of
what is asked. An ASGI application around another one, in the terms of that specification.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 64 * 1024
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
READING = ("GET", "HEAD")

_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Not no-referrer: that would make browsers send "Origin: null" with a form.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Refusal(Exception):
    """A request that goes no further, with the status and the one sentence that tells why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


class Gate:
    """Lets a request through to `inner` if it comes with the token and from the server's own pages.

    Args:
        inner: the application behind it.
        token: what the printed address holds; later requests hold it in a cookie.
        host_names: the names that the Host header may give, without ports (a tunnel has another one); None allows any.
            On loopback they keep a web site from reaching the server under a name of its own (DNS rebinding).
    """

    def __init__(self, inner: Application, token: str, host_names: Iterable[str] | None) -> None:
        self._inner = inner
        self._token = token.encode()
        self._host_names = None if host_names is None else frozenset(host_names)
        # Cookies do not tell ports apart: two servers on one machine need two names.
        self._cookie = f"draftsmith-{hashlib.sha256(self._token).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope)
        cookies: list[tuple[bytes, bytes]] = []

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own, *cookies]
            await send(message)

        try:
            self._check_host(headers)
            if self._check_token(scope, headers):
                cookies.append((b"set-cookie", self._set_cookie()))
            if scope["method"] not in READING:
                _check_origin(headers)
                receive = await _whole_body(headers, receive)
        except Refusal as refusal:
            await _refuse(refusal, scope, send_guarded)
            return
        await self._inner(scope, receive, send_guarded)

    def _check_host(self, headers: _Headers) -> None:
        host = headers.one("host")
        name = None if host is None else _host_name(host)
        if name is None or (self._host_names is not None and name not in self._host_names):
            raise Refusal(403, "this server answers only to its own address; open the one that it has printed")

    def _check_token(self, scope: Scope, headers: _Headers) -> bool:
        """Whether the token came in the address, so that a cookie is due."""
        if scope["method"] in READING:
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            if any(self._is_token(value) for value in query.get("token", [])):
                return True
        if any(self._is_token(value) for value in headers.cookies(self._cookie)):
            return False
        raise Refusal(403, "this needs the token; open the address that 'draftsmith label serve' has printed")

    def _is_token(self, value: str) -> bool:
        return hmac.compare_digest(value.encode("utf-8", "surrogatepass"), self._token)

    def _set_cookie(self) -> bytes:
        return f"{self._cookie}={self._token.decode()}; Path=/; HttpOnly; SameSite=Strict".encode()


class _Headers:
    def __init__(self, scope: Scope) -> None:
        self._pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    def one(self, name: str) -> str | None:
        """The header's value; None where it is absent or stands there more than once."""
        found = [value for own, value in self._pairs if own == name]
        return found[0] if len(found) == 1 else None

    def cookies(self, name: str) -> list[str]:
        parts = [part.strip() for own, value in self._pairs if own == "cookie" for part in value.split(";")]
        return [part.partition("=")[2] for part in parts if part.partition("=")[0] == name]


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _check_origin(headers: _Headers) -> None:
    """The page that sends must be one of ours: scheme aside (a proxy may add TLS), its origin is the Host asked."""
    origin = headers.one("origin") or ""
    scheme, _, place = origin.partition("://")
    if scheme not in ("http", "https") or place != headers.one("host"):
        raise Refusal(403, "only this server's own pages may change anything; open the address that it has printed")


async def _whole_body(headers: _Headers, receive: Receive) -> Receive:
    """Takes the body in, whether its length was told or not, and gives a `receive` that hands it on at once."""
    told = headers.one("content-length")
    if told is not None and told.isdecimal() and (len(told) > 15 or int(told) > MAX_BODY_BYTES):
        raise _too_large()
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal(400, "the request broke off before its end; send it again")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    handed_on = False

    async def replay() -> Message:
        nonlocal handed_on
        if handed_on:
            return await receive()
        handed_on = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


def _too_large() -> Refusal:
    return Refusal(413, f"the request is too large; at most {MAX_BODY_BYTES} bytes are taken; shorten the note")


async def _refuse(refusal: Refusal, scope: Scope, send: Send) -> None:
    is_api = scope["path"].startswith("/api/")
    text = json.dumps({"error": refusal.sentence}) if is_api else f"{refusal.status}: {refusal.sentence}\n"
    body = text.encode()
    kind = b"application/json" if is_api else b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
