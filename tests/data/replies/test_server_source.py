"""Replies from a server: which answers are the target's, and what is asked of it."""

import json
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from reply_server import SETTINGS, Answer, Handler, Server, Trick, asking, connect, fail, rows_of, says
from tiny import EOS
from transformers import PreTrainedTokenizerBase

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.replies.dialogues import Failure, answer_independently
from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.reply_sources import BundledEngine, RawReply
from draftsmith.data.replies.respond import respond
from draftsmith.data.replies.server_source import ServerEngine, ServerOptions
from draftsmith.data.replies.vllm_sampling import check_settings, sampling, settle
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.models import Target

pytestmark = pytest.mark.usefixtures("impatient")


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
    common["sampling"] = SamplingOverrides(temperature=0.0)
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
