"""JSON over HTTP, asked again until the server answers.

Owns: connections, proxies, limits of time and size, which answers are worth another attempt and how long to wait for it. Does not
know: what is asked. `httpx` speaks HTTP. Its time limits begin anew with every byte. So each attempt is a task of one event loop, which
cancels it when its time is up.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from draftsmith.data.replies.reply_sources import Unanswered
from draftsmith.extras import install_command

MAX_ANSWER_BYTES = 256 << 20  # a reply of a million tokens takes about 16 MiB

# Too early, too many, and whatever lies with the server; every other status would come again.
_PASSING = frozenset({408, 425, 429, *range(500, 600)})
_LONGEST_WAIT = 300.0
_CLOSED = "the run is ending"

Answer = TypeVar("Answer")


class RetryableError(Exception):
    """This attempt failed; another may not.

    Attributes:
        after: how long the server asked to be left alone, in seconds.
    """

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class JsonClient:
    """Asks one server, from any number of threads; connections are kept open and shared.

    Args:
        url: http:// or https://, with the path that requests are under.
        key: sent as a bearer token unless empty.
        timeout: seconds after which an attempt without a whole answer has failed, however slowly its bytes arrive.
        retries: further attempts after the first, each after a wait that doubles from `first_wait` seconds to a minute, with jitter.
        first_wait: see retries.

    Raises:
        ValueError: the address is none or holds more than one, or no header can carry the key. Also for a timeout or retries out of
            range, and for a proxy of the environment that cannot be used.
    """

    def __init__(
        self, url: str, key: str = "", timeout: float = 600.0, retries: int = 5, first_wait: float = 1.0
    ) -> None:
        parts = _address(url)
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError(
                "the server's key holds line breaks or other characters that a header cannot carry; set its variable to the key alone"
            )
        if timeout <= 0 or retries < 0:
            raise ValueError(
                f"timeout is {timeout} and retries {retries}; give a timeout above 0 and 0 or more retries"
            )
        self.url, self.timeout, self.retries, self.first_wait = url, timeout, retries, first_wait
        self._proxy = _proxy_for(parts)
        self._http = _http_client(url, key, self._proxy)
        self._closed, self._resources = threading.Event(), ExitStack()
        self._portal = self._resources.enter_context(start_blocking_portal(name="draftsmith-http"))

    def get(self, path: str, read: Callable[[dict[str, Any]], Answer]) -> Answer:
        """Ask for the object at a path.

        Args:
            path: under the client's address.
            read: makes the answer of the object; it raises RetryableError for an object that is none.

        Returns:
            What `read` makes of it.

        Raises:
            Unanswered: as `post`.
            ValueError: as `post`.
        """
        return self._patiently("GET", path, None, read)

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Answer]) -> Answer:
        """Send an object, and wait for the answer.

        Args:
            path: under the client's address.
            body: the object.
            read: makes the answer of the server's object; it raises RetryableError for an object that is none.

        Returns:
            What `read` makes of it.

        Raises:
            Unanswered: the last attempt failed, or the client was closed. An attempt fails without a connection, without a whole answer in
                time, without a JSON object, and with status 429 or 5xx.
            ValueError: the answer says that the request or its sender is wrong (any other status), or it is too large.
        """
        return self._patiently("POST", path, json.dumps(body).encode(), read)

    def close(self) -> None:
        """End every request under way: whoever waits for an answer gets Unanswered. A second call does nothing."""
        if not self._closed.is_set():
            self._closed.set()
            self._portal.call(self._http.aclose)
            self._portal.call(self._portal.stop, True)  # cancels requests that have no connection yet
            self._resources.close()

    def _patiently(
        self, method: str, path: str, body: bytes | None, read: Callable[[dict[str, Any]], Answer]
    ) -> Answer:
        reason, attempt = _CLOSED, 0
        while attempt <= self.retries and not self._closed.is_set():
            attempt += 1
            try:
                return read(self._once(method, path, body))
            except RetryableError as error:
                reason = str(error)
                wait = min(60.0, self.first_wait * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)
                if attempt <= self.retries:
                    # On top of what the server asks for: whom it sent away together shall not come back together.
                    self._closed.wait(wait + min(_LONGEST_WAIT, error.after))
        raise Unanswered(reason, attempt)

    def _once(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        try:
            response, content = self._portal.call(self._exchange, method, path, body)
        except (httpx.RequestError, TimeoutError, CancelledError, RuntimeError) as error:
            if self._closed.is_set():
                raise RetryableError(_CLOSED) from error
            if isinstance(error, TimeoutError):
                raise RetryableError(f"timed out: no whole answer in {self.timeout:g} seconds{self._way()}") from error
            if isinstance(error, httpx.RequestError):
                raise RetryableError(f"{_first_cause(error)}{self._way()}") from error
            raise
        if response.status_code in _PASSING:
            after = _seconds(response.headers.get("Retry-After", ""))
            raise RetryableError(f"status {response.status_code}: {_message(content)}{self._way()}", after)
        if response.status_code != 200:
            raise ValueError(
                f"{self.url} answered {path} with status {response.status_code}: {_message(content)}{self._way()}; this would not change "
                "by asking again"
            )
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise RetryableError(f"no JSON in the answer: {content[:80]!r}") from error
        if not isinstance(answer, dict):
            raise RetryableError(f"no JSON object in the answer: {content[:80]!r}")
        return answer

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[httpx.Response, bytes]:
        """One attempt: the answer and all of its body."""
        content = bytearray()
        with anyio.fail_after(self.timeout):
            async with self._http.stream(method, path, content=body) as response:
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        raise ValueError(
                            f"{self.url} answered {path} with more than {MAX_ANSWER_BYTES >> 20} MiB; a reply is far smaller; check that "
                            "this is the address of the server"
                        )
        return response, bytes(content)

    def _way(self) -> str:
        """Words for a failure that may be a proxy's. A proxy's address can hold a password, so only its host is named."""
        if self._proxy is None:
            return ""
        return f" (through the proxy {self._proxy.host} of the environment; NO_PROXY names hosts to reach without it)"


def _http_client(url: str, key: str, proxy: httpx.URL | None) -> httpx.AsyncClient:
    """A client with no limits of its own, for certificates that the system trusts (`SSL_CERT_FILE` names others)."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        return httpx.AsyncClient(
            base_url=url,
            headers=headers,
            verify=ssl.create_default_context(),
            proxy=proxy,
            trust_env=False,
            timeout=None,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=None),
        )
    except (ValueError, ImportError) as error:
        raise _bad_proxy() from error


def _address(url: str) -> SplitResult:
    """The parts of a server's address.

    Raises:
        ValueError: it is no address of a server. The message repeats nothing of it that may be secret.
    """
    try:
        parts = urlsplit(url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        there = False
    if there and (parts.username is not None or parts.query or parts.fragment):
        raise ValueError(
            f"url holds more than the address of {parts.hostname} (a user, a query); these would not be sent, and addresses are written "
            "to provenance.json; give scheme, host, port and path alone, and a key by --api_key_variable"
        )
    if not there:
        raise ValueError(f"url is {url.rpartition('@')[2]!r}; it must look like http://host:8000 or https://host/v1")
    return parts


def _proxy_for(parts: SplitResult) -> httpx.URL | None:
    """The proxy that the environment names for a server (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY).

    None for this machine's own addresses: no proxy elsewhere can reach them.

    Raises:
        ValueError: the variable holds no address. The message does not repeat it, since it can hold a password.
    """
    host = parts.hostname or ""
    if _is_loopback(host) or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    try:
        url = httpx.URL(proxy if "://" in proxy else f"http://{proxy}")
    except httpx.InvalidURL as error:
        raise _bad_proxy() from error
    if not url.host:
        raise _bad_proxy()
    return url


def _bad_proxy() -> ValueError:
    return ValueError(
        "the environment names a proxy that cannot be used; a proxy looks like http://host:3128 (for socks5:// run: "
        f"{install_command('httpx[socks]')}); correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or add the server's host to NO_PROXY"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_cause(error: BaseException) -> str:
    """The first cause of an error that has a message: "ConnectionRefusedError: ..." instead of "All connection attempts failed"."""
    words, following = type(error).__name__, error
    while True:
        words = f"{type(following).__name__}: {following}" if str(following) else words
        if isinstance(following, BaseExceptionGroup):
            following = following.exceptions[0]
        elif cause := following.__cause__ or following.__context__:
            following = cause
        else:
            return words


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
        error = answer.get("error", answer)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "no explanation"
