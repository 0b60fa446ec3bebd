"""`data respond` with a server: what a run records, resumes and refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from reply_server import SETTINGS, Answer, Handler, Server, asking, connect, fail, rows_of
from transformers import PreTrainedTokenizerBase

from draftsmith.cli import main
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import source_files
from draftsmith.data.prompts import read_prompts
from draftsmith.data.replies import reply_files
from draftsmith.data.replies.dialogues import Failure, answer_independently
from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.respond import respond
from draftsmith.data.replies.server_source import ServerOptions
from draftsmith.decode.sampling import ReplyOptions

pytestmark = pytest.mark.usefixtures("impatient")


def once_each(prompts: Path) -> Counter[str]:
    return Counter(prompt.id for prompt in read_prompts(prompts))


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
            str(target),
            prompt_file,
            out,
            reply=ReplyOptions(max_new_tokens=6),
            sampling=SamplingOverrides(temperature=0.0),
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
