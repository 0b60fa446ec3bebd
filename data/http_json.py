"""JSON over HTTP with patience.

Owns: connections, time limits, which answers are worth another attempt and how long to wait for it. Does not know: what is asked.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import json
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import SplitResult, urlsplit

from draftsmith.data.engines import Unanswered

# Too early, too many, and whatever lies with the server; every other 4xx will be said again.
_PASSING = frozenset({408, 425, 429, *range(500, 600)})
_LONGEST_WAIT = 300.0

Answer = TypeVar("Answer")


class Retry(Exception):
    """This attempt failed; another may not. `after` is how long the server asked to be left alone, in seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class JsonClient:
    """Asks one server, from any number of threads; each has a connection of its own, which is kept open.

    Args:
        url: http:// or https://, with the path that requests are under.
        key: sent as a bearer token unless empty.
        timeout: seconds after which an attempt without a whole answer has failed, however its bytes trickle in.
        retries: further attempts after the first, each after a wait that doubles from `first_wait` seconds to a minute, with jitter.
        first_wait: see retries.

    Raises ValueError for an address that is none or holds more than one, and for a key that no header can carry.
    """

    def __init__(
        self, url: str, key: str = "", timeout: float = 600.0, retries: int = 5, first_wait: float = 1.0
    ) -> None:
        parts = _address(url)
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                "the server's key holds line breaks or other characters that a header cannot carry; set its variable to the key alone"
            )
        if timeout <= 0 or retries < 0:
            raise ValueError(
                f"timeout is {timeout} and retries {retries}; give a timeout above 0 and 0 or more retries"
            )
        self.url, self._parts, self._key = url, parts, key
        self.timeout, self.retries, self.first_wait = timeout, retries, first_wait
        self._local, self._open, self._lock = threading.local(), set[http.client.HTTPConnection](), threading.Lock()
        self._closed = threading.Event()

    def get(self, path: str, read: Callable[[dict[str, Any]], Answer]) -> Answer:
        """What `read` makes of the object at a path. Raises as `post`."""
        return self._patiently("GET", path, None, read)

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Answer]) -> Answer:
        """What `read` makes of the server's answer to an object; it raises Retry for an answer that is none.

        Raises Unanswered when the last attempt failed (no connection, no answer in time, an answer cut short or no JSON object, 429,
        5xx), ValueError for an answer that says the request or its sender is wrong (any other status).
        """
        return self._patiently("POST", path, json.dumps(body).encode(), read)

    def close(self) -> None:
        """Whoever waits for an answer is told that there will be none."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError, AttributeError):  # not connected, or not any more
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _patiently(
        self, method: str, path: str, body: bytes | None, read: Callable[[dict[str, Any]], Answer]
    ) -> Answer:
        reason, attempt = "the run is ending", 0
        while attempt <= self.retries and not self._closed.is_set():
            attempt += 1
            try:
                return read(self._once(method, path, body))
            except Retry as error:
                reason = str(error)
                wait = min(60.0, self.first_wait * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)
                if attempt <= self.retries:
                    # On top of what the server asks for: whom it sent away together shall not come back together.
                    self._closed.wait(wait + min(_LONGEST_WAIT, error.after))
        raise Unanswered(reason, attempt)

    def _once(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        connection, deadline = self._connection(), time.monotonic() + self.timeout
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            if connection.sock is not None:
                connection.sock.settimeout(self.timeout)
            connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
            if self._closed.is_set():
                # Closed while this connection was being made, when there was nothing yet to shut down.
                raise ConnectionAbortedError("the run is ending")
            connection.response_class = cast(type[http.client.HTTPResponse], partial(_TimedResponse, deadline))
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            raise Retry(f"{type(error).__name__}: {error}") from error
        if response.will_close:
            self._drop(connection)
        if response.status in _PASSING:
            after = _seconds(response.headers.get("Retry-After", ""))
            raise Retry(f"status {response.status}: {_message(content)}", after)
        if response.status != 200:
            raise ValueError(
                f"{self.url} answered {path} with status {response.status}: {_message(content)}; this would not change by asking again"
            )
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise Retry(f"no JSON in the answer: {content[:80]!r}") from error
        if not isinstance(answer, dict):
            raise Retry(f"no JSON object in the answer: {content[:80]!r}")
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is not None and _hung_up(connection):
            self._drop(connection)
            connection = None
        if connection is None:
            host, port = self._parts.hostname or "", self._parts.port
            if self._parts.scheme == "https":
                context = ssl.create_default_context()
                connection = http.client.HTTPSConnection(host, port, timeout=self.timeout, context=context)
            else:
                connection = http.client.HTTPConnection(host, port, timeout=self.timeout)
            self._local.connection = connection
            with self._lock:
                self._open.add(connection)
        return connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._local.connection = None
        with self._lock:
            self._open.discard(connection)


def _address(url: str) -> SplitResult:
    """Raises ValueError for what is no address of a server; names nothing of it that may be secret."""
    try:
        parts = urlsplit(url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        there = False
    if there and (parts.username is not None or parts.query or parts.fragment):
        raise ValueError(
            f"url holds more than the address of {parts.hostname} (a user, a query); these would not be sent, and addresses are written "
            "to provenance.json; give scheme, host, port and path alone, and a key by --api_key_variable"
        )
    if not there:
        raise ValueError(f"url is {url.rpartition('@')[2]!r}; it must look like http://host:8000 or https://host/v1")
    return parts


def _hung_up(connection: http.client.HTTPConnection) -> bool:
    """Whether a connection that lies idle has been closed from the other side: servers do so after some seconds."""
    if connection.sock is None:
        return False
    waiting = select.poll()
    waiting.register(connection.sock, select.POLLIN)
    return bool(waiting.poll(0))


class _TimedResponse(http.client.HTTPResponse):
    """An answer that is whole in time, its head as well as its body, or raises TimeoutError."""

    def __init__(self, deadline: float, own_socket: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(own_socket, *arguments, **named)
        self.fp = io.BufferedReader(_TimedBytes(self.fp.detach(), own_socket, deadline))


class _TimedBytes(io.RawIOBase):
    """What a socket receives. Each wait is as long as is left: a socket's own limit begins anew with every byte."""

    def __init__(self, received: io.RawIOBase, own_socket: socket.socket, deadline: float) -> None:
        self._received, self._socket, self._deadline = received, own_socket, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TimeoutError("timed out: the answer trickles in and is not whole")
        self._socket.settimeout(_left(self._deadline))
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds until then, for a socket, which takes 0 for something else."""
    return max(1e-3, deadline - time.monotonic())


def _seconds(retry_after: str) -> float:
    """Seconds or a date, as HTTP has it; 0 for anything else. Example: "7" -> 7.0."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _message(content: bytes) -> str:
    """What an error's body says, in OpenAI's shape where it has that, cut to a line."""
    text = content.decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        found = answer.get("error", answer)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "no explanation"
