"""Replies from a server: a real HTTP server of ours that answers with the bundled decoder, and one that misbehaves in every way it can."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny import EOS
from transformers import PreTrainedTokenizerBase

from draftsmith.cli import main
from draftsmith.data.corpus import source_files
from draftsmith.data.formats import Message
from draftsmith.data.prompts import Prompt, read_prompts
from draftsmith.data.replies import http_json, reply_files
from draftsmith.data.replies import server_source as engine_server
from draftsmith.data.replies.dialogues import Failure, answer_independently
from draftsmith.data.replies.reply_settings import Overrides
from draftsmith.data.replies.reply_sources import BundledEngine, RawReply, Unanswered
from draftsmith.data.replies.respond import respond
from draftsmith.data.replies.server_source import ServerEngine, ServerOptions
from draftsmith.data.replies.source_settings import check_settings, sampling, settle
from draftsmith.data.tokens import ChatTemplate
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.models import Target

SETTINGS = GenerationSettings(max_new_tokens=6, eos_token_ids=(EOS,))
Answer = dict[str, Any]
Trick = Callable[["Handler", Answer, int], bool]


class Server(ThreadingHTTPServer):
    """Serves a made-up model; a trick sees each request first and may answer in its own way.

    Attributes:
        name: what it calls the model.
        reply: ids it answers a request with, and why they end.
        trick: called with the handler, the request and how often this prompt was asked before; True when it has answered.
        asked: every request, in the order of arrival.
        most_at_once: how many requests were ever under way together.
        connections: how many were ever made.
    """

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.models = name, [{"id": name, "max_model_len": 64}]
        self.reply: Callable[[Answer], tuple[list[int], str]] = lambda request: (
            [10 + len(request["prompt"]), EOS],
            "stop",
        )
        self.trick: Trick = lambda handler, request, times: False
        self.asked: list[Answer] = []
        self.headers_seen: list[str] = []
        self.at_once = self.most_at_once = self.connections = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is part of the game."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: Server

    def do_GET(self) -> None:
        self.send({"object": "list", "data": self.server.models} if self.path == "/v1/models" else {}, 200)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            times = sum(one["prompt"] == request["prompt"] for one in self.server.asked)
            self.server.asked.append(request)
            self.server.headers_seen.append(self.headers.get("Authorization", ""))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            if not self.server.trick(self, request, times):
                self.send(self.answer(request))
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def answer(self, request: Answer) -> Answer:
        """As vLLM answers, with return_token_ids."""
        token_ids, finish = self.server.reply(request)
        choice = {"index": 0, "text": "…", "finish_reason": finish, "token_ids": token_ids}
        return {
            "object": "text_completion",
            "model": self.server.name,
            "choices": [choice | {"prompt_token_ids": request["prompt"]}],
        }

    def send(self, answer: Answer, status: int = 200, cut: int = 0, **headers: str) -> bool:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = cut > 0
        return True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(target: Path) -> Iterator[Server]:
    with Server(str(target)) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join(10)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of the same shape, a hundredth as long."""
    real = http_json.JsonClient
    monkeypatch.setattr(engine_server, "JsonClient", lambda *arguments: real(*arguments, first_wait=0.01))


def connect(server: Server, retries: int = 3, timeout: float = 5.0, vocab_size: int = 300, **more: Any) -> ServerEngine:
    options = ServerOptions(server.url, retries=retries, timeout=timeout, **more)
    return ServerEngine(options, server.name, vocab_size, 64)


def asking(*turns: str, name: str = "p") -> Prompt:
    return Prompt(name, tuple(Message(role="user", content=turn) for turn in turns), "train", "test")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompt_file(write_jsonl: Callable[..., Path], tmp_path: Path) -> Path:
    """Twelve prompts, every third of them with two turns, as `data prompts` writes them."""

    def messages(number: int) -> list[dict[str, str]]:
        first, more = {"role": "user", "content": f"How many {number}?"}, {"role": "user", "content": "And then?"}
        return [first, {"role": "assistant", "content": "."}, more] if number % 3 == 0 else [first]

    source = write_jsonl([{"messages": messages(number)} for number in range(12)], "source.jsonl")
    assert main(["data", "prompts", "--source", str(source), "--out", str(tmp_path / "prompts")]) == 0
    return tmp_path / "prompts"


def once_each(prompts: Path) -> Counter[str]:
    return Counter(prompt.id for prompt in read_prompts(prompts))


def test_a_served_target_gives_the_rows_of_the_bundled_decoder(
    server: Server, target: Path, prompt_file: Path, tmp_path: Path
) -> None:
    engine = BundledEngine(Target.load(str(target)))
    lock = threading.Lock()

    def reply(request: Answer) -> tuple[list[int], str]:
        settings = GenerationSettings(request["max_tokens"], eos_token_ids=tuple(request["stop_token_ids"]))
        with lock:
            [one] = engine.reply([request["prompt"]], settings, [0])
        return one.token_ids, "length" if one.finish == "length" else "stop"

    server.reply, server.models = reply, [{"id": server.name, "max_model_len": 256}]
    common = {"target": str(target), "prompts": prompt_file, "reply": ReplyOptions(max_new_tokens=12)}
    common["sampling"] = Overrides(temperature=0.0)
    respond(out=tmp_path / "bundled", **common)
    respond(out=tmp_path / "served", engine="server", server=ServerOptions(server.url, concurrency=4), **common)
    both = [
        sorted(rows_of(tmp_path / name / "responses.jsonl"), key=lambda row: row["id"])
        for name in ("bundled", "served")
    ]
    assert len(both[0]) == 12
    assert both[0] == both[1]
    assert Counter(len(row["turns"]) for row in both[1]) == {1: 8, 2: 4}
    assert 1 < server.most_at_once <= 4
    settings = json.loads((tmp_path / "served" / "settings.json").read_text())
    assert (settings["engine"], settings["served_model"]) == ("server", str(target))


def test_as_many_dialogues_as_were_asked_for_are_always_under_way(
    server: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat, slow = ChatTemplate(tokenizer), threading.Event()
    prompts = [(asking(f"{n}", name=f"p{n}"), [5, 6, 7 + n]) for n in range(9)]

    def trick(handler: Handler, request: Answer, times: int) -> bool:
        # The first prompt is answered after all others: nobody waits for it, as a batch would.
        if request["prompt"] == [5, 6, 7]:
            slow.wait(30)
        time.sleep(0.05)
        return False

    server.trick = trick
    done = []
    for outcome in answer_independently(prompts, SETTINGS, 64, chat, connect(server, concurrency=3)):
        done.append(outcome)
        if len(done) == 8:
            slow.set()
    assert all(isinstance(row, dict) for row in done)
    assert done[-1]["id"] == "p0"  # type: ignore[index]
    assert server.most_at_once == 3


def hang(handler: Handler, request: Answer, times: int) -> bool:
    time.sleep(3.0)
    return True


def fail(status: int, **headers: str) -> Trick:
    return lambda handler, request, times: handler.send({"error": {"message": "overloaded"}}, status, **headers)


def cut(handler: Handler, request: Answer, times: int) -> bool:
    return handler.send(handler.answer(request), cut=9)


def hang_up(handler: Handler, request: Answer, times: int) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def rubbish(handler: Handler, request: Answer, times: int) -> bool:
    body = b"<html>502</html>"
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


def trickle(handler: Handler, request: Answer, times: int) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.1)
    return True


def trickle_head(handler: Handler, request: Answer, times: int) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(80):
        handler.wfile.write(f"X-{number}: a\r\n".encode())
        time.sleep(0.1)
    return True


def says(**changes: Any) -> Trick:
    """An answer with changed fields; None takes a field away."""

    def trick(handler: Handler, request: Answer, times: int) -> bool:
        answer = handler.answer(request)
        answer["choices"][0].update(changes)
        return handler.send(answer)

    return trick


def empty(handler: Handler, request: Answer, times: int) -> bool:
    return handler.send({"choices": []})


MISHAPS: dict[str, tuple[Trick, str]] = {
    "timeout": (hang, "timed out"),
    "trickle": (trickle, "timed out: no whole answer"),
    "500": (fail(500), "status 500: overloaded"),
    "503": (fail(503), "status 503"),
    "429": (fail(429, Retry_After="0.01"), "status 429"),
    "cut body": (cut, "peer closed connection without sending complete message body"),
    "hang-up": (hang_up, "Server disconnected|reset"),
    "rubbish": (rubbish, "no JSON in the answer: b'<html>"),
    "no choice": (empty, "without its one choice"),
    "aborted": (says(finish_reason="abort"), "ended the reply with 'abort'"),
}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_passing_mishap_costs_another_attempt_and_nothing_else(server: Server, mishap: str) -> None:
    trick, _ = MISHAPS[mishap]
    server.trick = lambda handler, request, times: times < 2 and trick(handler, request, times)
    engine = connect(server, timeout=1.0)
    assert engine.ask([5, 6, 7], SETTINGS, 1) == RawReply([13, EOS], "stop")
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[1] == server.asked[2]


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_lasting_mishap_is_told_after_the_last_attempt(server: Server, mishap: str) -> None:
    trick, told = MISHAPS[mishap]
    server.trick = trick
    with pytest.raises(Unanswered, match=told) as error:
        connect(server, retries=1, timeout=0.5).ask([5, 6, 7], SETTINGS, 1)
    assert error.value.attempts == len(server.asked) == 2


def test_a_server_that_names_its_pause_gets_it(server: Server) -> None:
    server.trick = lambda handler, request, times: times == 0 and fail(429, Retry_After="1")(handler, request, times)
    started = time.monotonic()
    connect(server).ask([5, 6, 7], SETTINGS, 1)
    assert 1.0 <= time.monotonic() - started < 10.0
    assert http_json._seconds("1.5") == 1.5
    assert 55 <= http_json._seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert http_json._seconds("soon") == 0.0


def test_a_connection_is_kept_and_one_that_the_server_has_closed_costs_no_attempt(server: Server) -> None:
    engine = connect(server, retries=0)
    for _ in range(3):
        engine.ask([5, 6, 7], SETTINGS, 1)
    assert server.connections == 1

    def close_without_a_word(handler: Handler, request: Answer, times: int) -> bool:
        handler.send(handler.answer(request))
        handler.close_connection = True
        return True

    server.trick = close_without_a_word
    for expected in (1, 2, 3):
        engine.ask([5, 6, 7], SETTINGS, 1)
        time.sleep(0.3)
        assert server.connections == expected
    assert len(server.asked) == 6


def test_an_answer_whose_head_trickles_in_is_given_up_in_time(server: Server) -> None:
    server.trick = trickle_head
    started = time.monotonic()
    with pytest.raises(Unanswered, match="timed out: no whole answer"):
        connect(server, retries=0, timeout=0.5).ask([5, 6, 7], SETTINGS, 1)
    assert time.monotonic() - started < 4.0


def test_an_answer_after_which_the_server_closes_is_read(server: Server) -> None:
    server.trick = lambda handler, request, times: handler.send(handler.answer(request), Connection="close")
    engine = connect(server, retries=0)
    assert [engine.ask([5, 6, 7], SETTINGS, 1) for _ in range(2)] == [RawReply([13, EOS], "stop")] * 2


def test_a_server_may_be_waited_for_as_long_as_one_likes(server: Server) -> None:
    server.trick = fail(503)
    client = http_json.JsonClient(server.url, retries=1100, first_wait=0.0)
    with pytest.raises(Unanswered, match="503") as error:
        client.post("/v1/completions", {"prompt": []}, lambda answer: answer)
    assert error.value.attempts == 1101


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_without_an_answer_ends_with_the_run(scheme: str) -> None:
    """Over https the request is still connecting: the other side never answers its handshake."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = http_json.JsonClient(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=60, retries=5)

        def ask() -> None:
            with pytest.raises(Unanswered, match="the run is ending"):
                client.post("/completions", {}, lambda answer: answer)
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        connection, _ = silent.accept()
        with connection:
            client.close()
            assert ended.wait(20)
    with pytest.raises(Unanswered, match="the run is ending"):
        client.get("/models", lambda answer: answer)
    client.close()


def test_an_answer_that_never_ends_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_json, "MAX_ANSWER_BYTES", 1 << 20)
    server.trick = lambda handler, request, times: handler.send({"more": "x" * (2 << 20)})
    with pytest.raises(ValueError, match=r"/completions with more than 1 MiB; .*check that this is the address"):
        connect(server).ask([5, 6, 7], SETTINGS, 1)


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


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_request_that_is_wrong_is_an_error_at_once(server: Server, status: int) -> None:
    server.trick = fail(status)
    with pytest.raises(ValueError, match=rf"status {status}: overloaded; this would not change"):
        connect(server).ask([5, 6, 7], SETTINGS, 1)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("trick", "told"),
    [
        (says(token_ids=None), "text without token ids"),
        (says(prompt_token_ids=None), "text without token ids"),
        (says(token_ids=["token_id:5"]), "text without token ids"),
        (says(prompt_token_ids=[1, 5, 6, 7]), r"another prompt than it was sent: 4 tokens \[1, 5, 6, 7\] instead of 3"),
        (says(token_ids=[300, EOS]), "token 300, the target's tokenizer has 300"),
        (says(token_ids=[5] * 7, finish_reason="length"), "7 tokens where 1 to 6 were asked for"),
        (says(token_ids=[]), "0 tokens where"),
    ],
)
def test_an_answer_that_is_not_the_targets_to_this_prompt_is_refused(server: Server, trick: Trick, told: str) -> None:
    server.trick = trick
    with pytest.raises(ValueError, match=told):
        connect(server).ask([5, 6, 7], SETTINGS, 1)


def test_an_answer_of_another_model_is_refused_and_one_under_another_of_its_names_is_not(server: Server) -> None:
    server.models = [{"id": "first", "root": "/weights"}, {"id": "second", "root": "/weights"}, {"id": "other"}]
    engine = ServerEngine(ServerOptions(server.url, served_model="second"), "org/target", 300, 64)
    for name in ("first", "second", "org/target"):
        server.name = name
        assert engine.ask([5], SETTINGS, 1).token_ids == [11, EOS]
    server.name = "other"
    with pytest.raises(ValueError, match="asked for second and answered with other"):
        engine.ask([5], SETTINGS, 1)


def test_one_bad_reply_among_good_ones_does_not_keep_the_others_from_being_answered(
    server: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    server.trick = lambda handler, request, times: (
        request["prompt"][0] == 7 and says(token_ids=[300, EOS])(handler, request, times)
    )
    chat = ChatTemplate(tokenizer)

    def outcomes(first: int, trusted: bool = False) -> list[object]:
        prompts = [(asking("Hi", name=f"p{n}"), [n]) for n in range(first, 10)]
        engine = connect(server, concurrency=1)
        return [
            (found.id, "token 300" in found.reason) if isinstance(found, Failure) else found["id"]
            for found in answer_independently(prompts, SETTINGS, 64, chat, engine, trusted)
        ]

    assert outcomes(5) == ["p5", "p6", ("p7", True), "p8", "p9"]
    assert outcomes(7, trusted=True) == [("p7", True), "p8", "p9"]
    with pytest.raises(ValueError, match="token 300"):
        outcomes(7)


def test_a_reply_that_ends_at_a_token_of_the_servers_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ended \(stop\) at token 9, which is no end token"):
        settle(RawReply([8, 9], "stop"), SETTINGS, 6, None)


def test_stop_strings_end_a_reply_with_the_token_that_completes_one(
    target: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer.encode("He has seven apples now")
    settings = GenerationSettings(len(ids), eos_token_ids=(EOS,), stop_strings=("apples",))
    reply = settle(RawReply(ids, "stop"), settings, len(ids), tokenizer)
    assert reply.finish == "stop"
    assert tokenizer.decode(reply.token_ids).endswith("apples")
    assert len(reply.token_ids) < len(ids)
    assert "apples" not in tokenizer.decode(reply.token_ids[:-1])


def test_another_model_is_not_asked_unless_it_is_said_to_be_the_target(server: Server, target: Path) -> None:
    server.models = [{"id": "some/model", "root": "/else"}]
    with pytest.raises(ValueError, match=rf"serves some/model, not {target}"):
        connect(server)
    assert connect(server, served_model="some/model").model == "some/model"
    server.models = [{"id": "alias", "root": server.name}]
    assert connect(server).model == "alias"


def test_replies_stay_within_the_servers_own_context(server: Server) -> None:
    server.models = [{"id": server.name, "max_model_len": 5}]
    engine = connect(server)
    assert engine.context == 5
    engine.ask([5, 6, 7], SETTINGS, 1)
    assert server.asked[0]["max_tokens"] == 2


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(server).ask([5], SETTINGS, 1)
    monkeypatch.setenv("SERVER_KEY", "secret")
    connect(server, api_key_variable="SERVER_KEY").ask([5], SETTINGS, 1)
    monkeypatch.setenv("SERVER_KEY", "secret\n")
    connect(server, api_key_variable="SERVER_KEY").ask([5], SETTINGS, 1)
    assert server.headers_seen == ["", "Bearer secret", "Bearer secret"]
    monkeypatch.setenv("SERVER_KEY", "sec\nret")
    with pytest.raises(ValueError, match="line breaks") as error:
        connect(server, api_key_variable="SERVER_KEY")
    assert "ret" not in str(error.value).replace("retries", "")


def test_no_server_is_one_clear_message(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match="is the server running"):
        ServerEngine(ServerOptions(f"http://127.0.0.1:{port}", retries=1), "target", 300, None)
    with pytest.raises(ValueError, match="must look like"):
        ServerEngine(ServerOptions("127.0.0.1:8000"), "target", 300, None)


def test_every_setting_is_named_and_a_seed_belongs_to_its_request() -> None:
    settings = GenerationSettings(9, 0.7, 20, 0.9, 0.0, 1.1, 5, (EOS,), ("stop",))
    said = sampling(settings, request_id=3, budget=8)
    assert said == {
        "max_tokens": 8,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 5 * 2**32 + 3,
        "stop": ["stop"],
        "stop_token_ids": [EOS],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    assert 0 <= sampling(GenerationSettings(seed=2**62), 2**32 - 1, 1)["seed"] < 2**63
    check_settings(settings)
    check_settings(GenerationSettings(temperature=1.0, min_p=0.1, top_k=5))
    check_settings(GenerationSettings(temperature=0.01))
    with pytest.raises(ValueError, match=r"vLLM samples at 0\.01"):
        check_settings(GenerationSettings(temperature=0.001))
    with pytest.raises(ValueError, match="min_p before top_p"):
        check_settings(GenerationSettings(temperature=1.0, min_p=0.1, top_p=0.9))
    least = GenerationSettings(9, constraints=Constraints(min_new_tokens=3))
    check_settings(least)
    assert sampling(least, 0, 9)["min_tokens"] == 3
    with pytest.raises(
        ValueError, match=r"suppress_tokens \(\(5,\)\), which vLLM has no exact word for.*--engine bundled"
    ):
        check_settings(replace(least, constraints=Constraints(suppress_tokens=(5,), min_new_tokens=3)))


def command(server: Server, target: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    asked = [
        "data",
        "respond",
        "--target",
        str(target),
        "--prompts",
        str(prompts),
        "--out",
        str(out),
        "--temperature",
        "0",
    ]
    return [*asked, "--engine", "server", "--url", server.url, "--max_new_tokens", "6", "--concurrency", "3", *more]


def test_prompts_without_an_answer_are_recorded_and_asked_again_by_the_next_run(
    server: Server, target: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sick = tmp_path / "out", set[tuple[int, ...]]()

    def trick(handler: Handler, request: Answer, times: int) -> bool:
        if len(sick) < 2 and times == 0:
            sick.add(tuple(request["prompt"]))
        return tuple(request["prompt"]) in sick and handler.send({"message": "no"}, 500)

    server.trick = trick
    asked = command(server, target, prompt_file, out, "--retries", "1")
    assert main(asked) == 1
    assert "2 of 12 prompts got no reply" in capsys.readouterr().err
    failures = rows_of(out / "failures.jsonl")
    assert [set(row) for row in failures] == [{"id", "reason", "attempts", "time"}] * 2
    assert {(row["reason"], row["attempts"]) for row in failures} == {("status 500: no", 2)}
    answered = {row["id"] for row in rows_of(out / "responses.jsonl")}
    assert len(answered) == 10
    assert answered.isdisjoint(row["id"] for row in failures)
    before = len(server.asked)
    server.trick = lambda handler, request, times: False
    assert main(asked) == 0
    rows = rows_of(out / "responses.jsonl")
    assert Counter(row["id"] for row in rows) == once_each(prompt_file)
    assert {row["id"] for row in rows[10:]} == {row["id"] for row in failures}
    assert len(server.asked) - before == sum(len(row["turns"]) for row in rows[10:])


def test_prompts_that_never_get_an_answer_can_be_done_without(
    server: Server, target: Path, prompt_file: Path, tmp_path: Path
) -> None:
    out, sick = tmp_path / "out", list[list[int]]()

    def trick(handler: Handler, request: Answer, times: int) -> bool:
        sick[:] = sick or [request["prompt"]]
        return request["prompt"] in sick and handler.send({"message": "no"}, 500)

    server.trick = trick
    asked = command(server, target, prompt_file, out, "--retries", "0")
    assert main(asked) == 1
    with pytest.raises(ValueError, match="has 11 of 12 replies"):
        source_files(out)
    assert main([*asked, "--skip_failed", "true"]) == 0
    assert source_files(out) == [out / "responses.jsonl"]
    # Whoever asks again without these words wants them all.
    assert main(asked) == 1
    with pytest.raises(ValueError, match="has 11 of 12 replies"):
        source_files(out)


def test_a_run_goes_on_with_another_server_in_so_many_words_and_not_with_another_engine(
    server: Server,
    target: Path,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, kept = tmp_path / "out", list[reply_files.JsonlAppender]()

    class Watched(reply_files.JsonlAppender):
        def __init__(self, path: Path, **settings: Any) -> None:
            super().__init__(path, **settings)
            kept.append(self)

    monkeypatch.setattr(reply_files, "JsonlAppender", Watched)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    asked = command(server, target, prompt_file, out)
    assert main(asked) == 0
    assert "Bearer sesame" in server.headers_seen
    # A million replies do not fit in memory.
    assert kept[0].path == out / "responses.jsonl"
    assert kept[0].rows
    assert all(isinstance(row, str) for row in kept[0].rows), "ids, not rows"
    host, port = "localhost", server.server_address[1]
    moved = [word.replace("127.0.0.1", host) for word in asked]
    assert main(moved) == 0
    said = capsys.readouterr()
    assert f"begun with {server.url}, resumes with http://{host}:{port};" in said.out
    assert json.loads((out / "settings.json").read_text())["url"] == f"http://{host}:{port}"
    assert main(moved) == 0
    assert "begun with" not in capsys.readouterr().out
    assert not [path for path in out.iterdir() if b"sesame" in path.read_bytes()]
    assert "sesame" not in said.out + said.err
    with pytest.raises(ValueError, match="engine: there 'server', now None"):
        respond(
            str(target), prompt_file, out, reply=ReplyOptions(max_new_tokens=6), sampling=Overrides(temperature=0.0)
        )


def test_a_server_that_is_gone_for_good_ends_the_run(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    server.trick = fail(500)
    prompts = [(asking("Hi", name=f"p{n}"), [5, 6, n]) for n in range(200)]
    engine, outcomes = connect(server, retries=0, concurrency=2), list[object]()
    with pytest.raises(ValueError, match="the last 16 prompts got no answer"):
        outcomes.extend(answer_independently(prompts, SETTINGS, 64, ChatTemplate(tokenizer), engine))
    assert len(server.asked) < 30


def test_a_run_that_is_stopped_does_not_wait_for_requests_under_way(
    server: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    server.trick = lambda handler, request, times: (request["prompt"] != [5] and bool(time.sleep(20))) or False
    prompts = [(asking("Hi", name=f"p{n}"), [5 + n]) for n in range(4)]
    outcomes = answer_independently(prompts, SETTINGS, 64, ChatTemplate(tokenizer), connect(server, concurrency=3))
    assert not isinstance(next(outcomes), Failure)
    started = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 10


def test_options_of_another_engine_are_refused(target: Path, prompt_file: Path, tmp_path: Path, drafter: Path) -> None:
    common = {"target": str(target), "prompts": prompt_file, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="--url http://x goes with --engine server"):
        respond(server=ServerOptions("http://x"), **common)
    with pytest.raises(ValueError, match="--drafter is an option of the bundled decoder"):
        respond(engine="server", server=ServerOptions("http://x"), drafter=drafter, **common)
    with pytest.raises(ValueError, match="give --url"):
        respond(engine="server", **common)
    assert not (tmp_path / "out").exists()


@contextmanager
def running(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "draftsmith.cli", *words], stdout=output, stderr=output, env=variables
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_exactly_one_row_a_prompt(
    server: Server, target: Path, prompt_file: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    written, gate = out / "responses.jsonl", threading.Semaphore(4)

    def trick(handler: Handler, request: Answer, times: int) -> bool:
        gate.acquire(timeout=120)
        return False

    server.trick = trick
    with running(command(server, target, prompt_file, out), log) as process:
        deadline = time.monotonic() + 120
        # Rows reach the disk every two seconds at the latest, when a row is written: one at a time until some are there.
        while not (written.exists() and written.stat().st_size):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            if len(server.asked) >= 7:
                time.sleep(1.0)
                gate.release()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    for _ in range(100):
        gate.release()
    assert 0 < len(rows_of(written)) < 12
    # Torn in the middle of a line, as a kill may leave it.
    written.write_bytes(written.read_bytes() + b'{"id": "p3", "mess')
    with running(command(server, target, prompt_file, out), log) as process:
        assert process.wait(120) == 0, log.read_text()
    assert Counter(row["id"] for row in rows_of(written)) == once_each(prompt_file)
