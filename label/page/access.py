"""Who may speak to the labelling server, and with how much.

Owns the token, its cookie, the checks of Host, Origin and size, and the headers that every reply carries. Knows nothing of
what is asked.

The check of Host is ours and not Starlette's `TrustedHostMiddleware`. That one answers "Invalid host header" without a remedy. It lets a
malformed Host pass where any name is allowed. And in releases that `fastapi>=0.115` permits, it cannot read `[::1]:8010`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """A request that goes no further.

    Attributes:
        status: the HTTP status of the reply.
        sentence: why, and what to do.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence

    def reply(self, path: str) -> Response:
        """The reply: JSON for the API, text for a page.

        Args:
            path: of the request.
        """
        if path.startswith("/api/"):
            return JSONResponse({"error": self.sentence}, self.status)
        return PlainTextResponse(f"{self.status}: {self.sentence}\n", self.status)


class Gate(BaseHTTPMiddleware):
    """Lets a request through to `inner` if it comes with the token and from the server's own pages.

    Args:
        inner: the application behind it.
        token: what the printed address holds; later requests hold it in a cookie.
        host_names: the names that the Host header may give, without ports (a tunnel has another one); None allows any.
            On loopback they keep a web site from reaching the server under a name of its own (DNS rebinding).
    """

    def __init__(self, inner: ASGIApp, token: str, host_names: Iterable[str] | None) -> None:
        super().__init__(inner)
        self._token = token
        self._host_names = None if host_names is None else frozenset(host_names)
        # Cookies do not tell ports apart: two servers on one machine need two names.
        self._cookie = f"draftsmith-{hashlib.sha256(token.encode()).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; turns websockets away."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await super().__call__(scope, _bounded(receive), send)

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Checks a request before the application sees it, and adds the headers.

        Args:
            request: of a browser.
            call_next: the application.
        """
        token_in_address = False
        try:
            self._check_host(request)
            token_in_address = self._check_token(request)
            if request.method not in READING:
                _check_origin(request)
                await request.body()
        except ClientDisconnect:
            response = Refusal(400, "the request broke off before its end; send it again").reply(request.url.path)
        except Refusal as refusal:
            response = refusal.reply(request.url.path)
        else:
            response = await call_next(request)
        response.headers.update(_HEADERS)
        if token_in_address:
            response.set_cookie(self._cookie, self._token, path="/", httponly=True, samesite="strict")
        return response

    def _check_host(self, request: Request) -> None:
        name = _host_name(_only_value(request, "host"))
        if name is None or (self._host_names is not None and name not in self._host_names):
            raise Refusal(403, "this server answers only to its own address; open the one that it has printed")

    def _check_token(self, request: Request) -> bool:
        """Whether the token came in the address, so that a cookie is due."""
        if request.method in READING and any(map(self._is_token, request.query_params.getlist("token"))):
            return True
        if self._cookie in request.cookies and self._is_token(request.cookies[self._cookie]):
            return False
        raise Refusal(403, "this needs the token; open the address that 'draftsmith label serve' has printed")

    def _is_token(self, value: str) -> bool:
        return hmac.compare_digest(value.encode("utf-8", "surrogatepass"), self._token.encode())


def _only_value(request: Request, header: str) -> str:
    """The header's value; empty where it is absent or occurs more than once."""
    values = request.headers.getlist(header)
    return values[0] if len(values) == 1 else ""


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _check_origin(request: Request) -> None:
    """The page that sends must be one of ours: scheme aside (a proxy may add TLS), its origin is the Host asked."""
    scheme, _, place = _only_value(request, "origin").partition("://")
    if scheme not in ("http", "https") or place != _only_value(request, "host"):
        raise Refusal(403, "only this server's own pages may change anything; open the address that it has printed")


def _bounded(receive: Receive) -> Receive:
    """A `receive` that raises Refusal once the body is too large, whether the request gave its length or not."""
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise Refusal(413, f"the request is too large; at most {MAX_BODY_BYTES} bytes are taken; shorten the note")
        return message

    return bounded
