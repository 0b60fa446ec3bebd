"""Proxies on the way to a server, and secrets in addresses."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from reply_server import Answer, Server

from draftsmith.data.replies import http_json
from draftsmith.data.replies.reply_sources import Unanswered
from draftsmith.data.replies.server_source import ServerEngine, ServerOptions

pytestmark = pytest.mark.usefixtures("impatient")


class Proxy(BaseHTTPRequestHandler):
    """Answers every request itself and keeps what it was asked for."""

    asked: ClassVar[list[str]] = []
    status = 200

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"by": "proxy"}')

    do_CONNECT = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a proxy; no other is in the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(Proxy, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def models_at(url: str) -> Answer:
    client = http_json.JsonClient(url, timeout=5, retries=0)
    try:
        return client.get("/models", lambda answer: answer)
    finally:
        client.close()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_proxy_of_the_environment_is_asked(proxy: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, f"http://{proxy}")
    assert models_at("http://node.invalid:8000/v1") == {"by": "proxy"}
    assert Proxy.asked == ["GET http://node.invalid:8000/v1/models"]


def test_https_goes_through_a_tunnel_of_the_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:sesame@{proxy}")
    monkeypatch.setattr(Proxy, "status", 407)
    with pytest.raises(Unanswered, match=r"407.*through the proxy 127\.0\.0\.1 .*NO_PROXY") as error:
        models_at("https://node.invalid/v1")
    assert Proxy.asked == ["CONNECT node.invalid:443"]
    assert "sesame" not in str(error.value)


def test_a_refusal_that_may_be_the_proxys_names_it(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setattr(Proxy, "status", 403)
    with pytest.raises(ValueError, match=r"status 403.*through the proxy 127\.0\.0\.1 .*NO_PROXY"):
        models_at("http://node.invalid:8000/v1")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_no_proxy_is_asked_for_this_machine(
    server: Server, proxy: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy}")
    assert models_at(server.url.replace("127.0.0.1", name) + "/v1")["data"] == server.models
    assert Proxy.asked == []


@pytest.mark.parametrize("excepted", ["*", "example.com,node.invalid", ".invalid", "node.invalid:8000"])
def test_no_proxy_is_asked_for_hosts_that_the_environment_excepts(
    proxy: str, monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy}")
    monkeypatch.setenv("NO_PROXY", excepted)
    with pytest.raises(Unanswered, match="gaierror"):
        models_at("http://node.invalid:8000/v1")
    assert Proxy.asked == []


@pytest.mark.parametrize("address", ["http://me:sesame@host:x", "gopher://me:sesame@host", "http://"])
def test_a_proxy_that_cannot_be_used_is_an_error_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", address)
    with pytest.raises(ValueError, match=r"proxy that cannot be used; .*HTTP_PROXY") as error:
        http_json.JsonClient("http://node.invalid:8000")
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize("url", ["http://me:sesame@host:8000", "https://host/v1?key=sesame", "http://me:sesame@host:x"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="url") as error:
        ServerEngine(ServerOptions(url), "target", 300, None)
    assert "sesame" not in str(error.value)
