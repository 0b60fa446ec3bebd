"""The connection to a server that fails, stalls, closes or cuts its answers off."""

import socket
import threading
import time
from email.utils import formatdate

import pytest
from reply_server import SETTINGS, Answer, Handler, Server, Trick, connect, cut, fail, says
from tiny import EOS

from draftsmith.data.replies import http_json
from draftsmith.data.replies.reply_sources import RawReply, Unanswered

pytestmark = pytest.mark.usefixtures("impatient")


def hang(handler: Handler, request: Answer, times: int) -> bool:
    time.sleep(3.0)
    return True


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
