"""A real HTTP server that answers with made-up replies, and the tricks by which it misbehaves."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tiny import EOS

from draftsmith.data.chats.messages import Message
from draftsmith.data.prompts import Prompt
from draftsmith.data.replies.server_source import ServerEngine, ServerOptions
from draftsmith.decode.sampling import GenerationSettings

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


def connect(server: Server, retries: int = 3, timeout: float = 5.0, vocab_size: int = 300, **more: Any) -> ServerEngine:
    options = ServerOptions(server.url, retries=retries, timeout=timeout, **more)
    return ServerEngine(options, server.name, vocab_size, 64)


def asking(*turns: str, name: str = "p") -> Prompt:
    return Prompt(name, tuple(Message(role="user", content=turn) for turn in turns), "train", "test")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fail(status: int, **headers: str) -> Trick:
    return lambda handler, request, times: handler.send({"error": {"message": "overloaded"}}, status, **headers)


def cut(handler: Handler, request: Answer, times: int) -> bool:
    return handler.send(handler.answer(request), cut=9)


def says(**changes: Any) -> Trick:
    """An answer with changed fields; None takes a field away."""

    def trick(handler: Handler, request: Answer, times: int) -> bool:
        answer = handler.answer(request)
        answer["choices"][0].update(changes)
        return handler.send(answer)

    return trick
