"""Which answers are served to people: those that `label rows` can use, whatever people say of them."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONTEXT, make_tokenizer

pytest.importorskip("fastapi", reason="the labelling page needs the extra draftsmith[label]")
pytest.importorskip("latex2mathml", reason="the labelling page needs the extra draftsmith[label]")

from draftsmith import cli
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.label.commands.rows_command import make_rows
from draftsmith.label.page.actions import LabellingActions
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.page.target_check import TargetCheck
from draftsmith.label.row_checks import REFUSED, SILENT, TOO_LONG, UNPLACED, LeftOut, RowChecks
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store
from draftsmith.label.token_labels import tokenize

Make = Callable[..., Answer]
# It fails on a prompt that says NO.
PICKY = "{% for m in messages %}{% if 'NO' in m.content %}{{ raise_exception('not this') }}{% endif %}{{ m.content }}{% endfor %}"


def checks(max_length: int | None = 60) -> RowChecks:
    tokenizer = make_tokenizer(PICKY)
    return RowChecks(tokenizer, ChatTemplate(tokenizer, None, ()), max_length)


def mixed(make: Make) -> list[Answer]:
    refused = replace(make("refused"), messages=(Message(role="user", content="NO"),))
    return [make("long", "one two " * 40), make("good"), refused, make("fine", "2")]


def test_what_rows_would_leave_out_is_listed_and_not_served(store: Store, make: Make) -> None:
    store.add(mixed(make), "importer")
    check = TargetCheck(store, checks(), 0.0)
    assert {reason.item_id: reason.reason for reason in check.look()} == {"long": TOO_LONG, "refused": REFUSED}
    actions = LabellingActions(store, Cutter(), 0.0, check)
    first = actions.next({"annotator": "alice"})
    assert (first["item"]["id"], first["progress"]["num_waiting"], first["progress"]["num_withheld"]) == ("good", 2, 2)
    assert store.num_waiting() == 2
    actions.label({"annotator": "alice", "item": "good", "verdict": "correct"})
    second = actions.next({"annotator": "alice"})
    assert (second["item"]["id"], second["progress"]["num_waiting"]) == ("fine", 1)


def test_answers_that_come_while_it_serves_are_looked_at_too(store: Store, make: Make) -> None:
    check = TargetCheck(store, checks(), 0.0)
    assert check.look() == []
    actions = LabellingActions(store, Cutter(), 0.0, check)
    store.add(mixed(make), "importer")
    assert actions.next({"annotator": "alice"})["item"]["id"] == "good"
    assert {reason.item_id for reason in check.left_out} == {"long", "refused"}


def test_an_unfit_answer_that_waits_again_after_an_undo_is_not_served(store: Store, make: Make) -> None:
    store.add([make("long", "one two " * 40), make("good")], "importer")
    LabellingActions(store, Cutter(), 0.0).next({"annotator": "alice"})  # served without a target
    store.annotate("long", Label("correct", "alice", "person"), assigned=True)
    check = TargetCheck(store, checks(), 0.0)
    assert check.look() == [], "nobody has to look at it"
    store.undo("alice")
    found = LabellingActions(store, Cutter(), 0.0, check).next({"annotator": "alice"})
    assert (found["item"]["id"], found["progress"]["num_waiting"]) == ("good", 1)


TEXT = st.text(st.sampled_from("ab 1+=\n.é😀"), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(response=TEXT, prompt=st.sampled_from(["How?", "NO", "long " * 12]), data=st.data())
def test_whatever_a_person_says_of_a_served_answer_gives_a_row(
    make: Make, response: str, prompt: str, data: st.DataObject
) -> None:
    answer = replace(make("a", response), messages=(Message(role="user", content=prompt),))
    looked = checks(40)
    reason = looked.why_not(answer)
    pieces, _ = Cutter(lambda text: tokenize(text, looked.tokenizer), "tokens").pieces(answer)
    error = data.draw(st.sampled_from(pieces)) if pieces else (0, 1)
    for label in (Label("correct", "alice", "person"), Label("wrong", "alice", "person", error)):
        made = make_rows([replace(answer, label=label)], looked.tokenizer, looked.chat, max_length=40)
        assert bool(made.rows) == (reason is None), (made.left_out, reason)
    if reason is not None:
        assert made.left_out[0][1] in (TOO_LONG, REFUSED, SILENT)
        assert made.left_out[0][1] == reason.reason


def test_the_command_lists_what_it_does_not_serve(
    place: str, store: Store, make: Make, target: Path, tmp_path: Path
) -> None:
    store.add([make("long", "one two " * CONTEXT), make("good")], "importer")
    listed = tmp_path / "unserved.jsonl"
    command = [sys.executable, "-m", "draftsmith.cli", "label", "serve", "--store", place, "--port", "0"]
    command += ["--target", str(target), "--unserved", str(listed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("Ctrl-C"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    # An answer shows that the server has taken over Ctrl-C.
    address = next(line for line in lines if line.startswith("open:")).removeprefix("open:").strip()
    with urllib.request.urlopen(address, timeout=60):
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert lines[0] == f"store: {place}, 1 answers wait for a label\n"
    assert f"not served, as label rows would leave them out: 1 answers: 1 {TOO_LONG}\n" in lines
    assert any(re.fullmatch(rf"  long, \d+ of {CONTEXT} tokens: {TOO_LONG}\n", line) for line in lines)
    [row] = [json.loads(line) for line in listed.read_text().splitlines()]
    assert (row["id"], row["reason"]) == ("long", TOO_LONG)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max_length", "5"], "name it with --target"),
        (["--unserved", "x.jsonl"], "name it with --target"),
        (["--template", "none"], "template speaks of a target, and none is named"),
        (["--template_args.enable_thinking=false", "--revision", "main"], "revision, template_args speak of a target"),
        (["--trust_remote_code", "true"], "trust_remote_code speaks of a target"),
        (["--target", "x", "--max_length", "0"], "max_length is 0; it counts tokens"),
    ],
)
def test_options_of_the_check_need_a_target_and_a_length(
    place: str, store: Store, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert cli.main(["label", "serve", "--store", place, *words]) == 1
    assert told in capsys.readouterr().err


def test_rows_take_a_refined_mark_in_place_of_the_step(make: Make) -> None:
    step = make("a", "1 + 1 = 2\n2 + 2 = 5", Label("wrong", "set", "person", (10, 19)))
    mine = replace(step, label=Label("wrong", "alice", "person", (18, 19), replaces=("set",)))
    looked = checks()
    both, alone = (make_rows(answers, looked.tokenizer, looked.chat) for answers in ([step, mine], [mine]))
    assert both.rows == alone.rows
    assert both.num_disputed == 0
    unplaced = replace(step, label=Label("unplaced", "alice", "person"))
    assert make_rows([unplaced], looked.tokenizer, looked.chat).left_out == [("a", UNPLACED)]
    assert (
        make_rows([step, unplaced], looked.tokenizer, looked.chat).rows
        == make_rows([step], looked.tokenizer, looked.chat).rows
    )


def test_whoever_listens_learns_of_each_answer_that_does_not_fit_once(store: Store, make: Make) -> None:
    store.add([make("long", "one two " * 40)], "importer")
    check = TargetCheck(store, checks(), 0.0)
    check.look()
    told: list[tuple[list[str], list[str]]] = []
    check.tell = lambda new: told.append(
        ([reason.item_id for reason in new], [reason.item_id for reason in check.left_out])
    )
    actions = LabellingActions(store, Cutter(), 0.0, check)
    actions.next({"annotator": "alice"})
    assert told == []
    store.add(mixed(make)[1:], "importer")
    for _ in range(2):
        actions.next({"annotator": "alice"})
    assert told == [(["refused"], ["long", "refused"])]


def test_the_list_of_what_does_not_fit_can_be_read_while_it_grows(make: Make) -> None:
    waiting: list[tuple[Answer, list[Label]]] = [(make(str(number)), []) for number in range(20_000)]
    store: Any = SimpleNamespace(last_item=lambda: 1, waiting=lambda *_, **__: waiting, withhold=lambda ids: None)
    all_fail: Any = SimpleNamespace(why_not=lambda answer, imported: LeftOut(answer.id, TOO_LONG))
    check = TargetCheck(store, all_fail, 0.0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(check.look)
            while not looking.done():
                assert len(check.left_out) <= len(waiting)
    finally:
        sys.setswitchinterval(interval)
    assert check.left_out == looking.result()


def test_a_file_of_the_target_is_not_overwritten_with_the_list(
    place: str, store: Store, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = target / "config.json"
    before = config.read_bytes()
    words = ["label", "serve", "--store", place, "--target", str(target), "--unserved", str(config)]
    assert cli.main(words) == 1
    assert "would overwrite it" in capsys.readouterr().err
    assert config.read_bytes() == before
