"""JSON over HTTP with patience.

Owns: connections, time limits, which answers are worth another attempt and how long to wait for it. Does not know: what is asked.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

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
        timeout: seconds without a byte after which an attempt has failed.
        retries: further attempts after the first, each after a wait that doubles from `first_wait` seconds to a minute, with jitter.
        first_wait: see retries.

    Raises ValueError for an address that is none.
    """

    def __init__(
        self, url: str, key: str = "", timeout: float = 600.0, retries: int = 5, first_wait: float = 1.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}; it must look like http://host:8000 or https://host/v1")
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
                wait = min(60.0, self.first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                if attempt <= self.retries:
                    self._closed.wait(max(wait, min(_LONGEST_WAIT, error.after)))
        raise Unanswered(reason, attempt)

    def _once(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        connection = self._connection()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
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


def _seconds(retry_after: str) -> float:
    """Seconds or a date, as HTTP has it; 0 for anything else. Example: "7" -> 7.0."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
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
