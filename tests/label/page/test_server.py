"""The labelling server without a browser: what it lets in, what it refuses, and that a refusal writes nothing."""

import asyncio
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from draftsmith import cli
from draftsmith.extras import install_command
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.schema import Answer, Label, Tokens
from draftsmith.label.store.store import Store

pytest.importorskip("fastapi", reason="the labelling server needs the extra draftsmith[label]")
pytest.importorskip("latex2mathml", reason="the labelling server needs the extra draftsmith[label]")

from fastapi.testclient import TestClient

from draftsmith.label.page import access as gate_module
from draftsmith.label.page.access import LOOPBACK_NAMES, MAX_BODY_BYTES, Gate
from draftsmith.label.page.serve_command import cutter_for
from draftsmith.label.page.server import build_app
from draftsmith.label.store import store as store_module
from draftsmith.label.token_labels import tokenize
from draftsmith.models.files.loading import load_tokenizer

TOKEN = "the-token"
ADDRESS = "http://127.0.0.1:8010"
ROUTES = [
    ("GET", "/"),
    ("GET", "/agreement"),
    ("GET", "/web/label.js"),
    ("GET", "/api/agreement"),
    ("GET", "/none"),
] + [("POST", f"/api/{name}") for name in ("next", "label", "skip", "undo", "compare", "decide", "reopen")]
Ask = Callable[..., Any]


def open_client(store: Store, shared: float = 0.0, cutter: Cutter | None = None) -> TestClient:
    """A browser that has opened the printed address."""
    client = TestClient(build_app(store, cutter or Cutter(), TOKEN, LOOPBACK_NAMES, shared), base_url=ADDRESS)
    client.headers["origin"] = ADDRESS
    assert client.get("/", params={"token": TOKEN}).status_code == 200
    return client


def stranger(store: Store) -> TestClient:
    return TestClient(build_app(store, Cutter(), TOKEN, LOOPBACK_NAMES, 0.0), base_url=ADDRESS)


@pytest.fixture
def filled(store: Store, make: Callable[..., Answer]) -> Store:
    store.add([make(name) for name in "abc"], "importer")
    return store


@pytest.fixture
def client(filled: Store) -> Iterator[TestClient]:
    with open_client(filled) as opened:
        yield opened


def sent(client: TestClient, path: str, fields: dict[str, Any]) -> Any:
    # Not `json=`: httpx itself refuses half characters and infinities, which others may send.
    return client.post(f"/api/{path}", content=json.dumps(fields), headers={"content-type": "application/json"})


def asked(client: TestClient, path: str, **fields: Any) -> dict[str, Any]:
    reply = sent(client, path, fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def refused(client: TestClient, status: int, path: str, **fields: Any) -> str:
    reply = sent(client, path, fields)
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"])


# ---- the way in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", "?token=the-token%00"])
def test_without_the_token_everything_is_refused(filled: Store, method: str, path: str, query: str) -> None:
    reply = stranger(filled).request(method, path + query, headers={"origin": ADDRESS}, json={"annotator": "alice"})
    assert reply.status_code == 403
    assert "open the address that 'draftsmith label serve' has printed" in reply.text
    assert "set-cookie" not in reply.headers
    assert filled.assign("bob") is not None, "and nobody was given an item"


def test_the_token_is_no_key_to_a_change_without_the_cookie(filled: Store) -> None:
    reply = stranger(filled).post(f"/api/next?token={TOKEN}", headers={"origin": ADDRESS}, json={"annotator": "alice"})
    assert reply.status_code == 403


def test_the_token_in_the_address_gives_a_cookie_that_scripts_and_other_sites_cannot_use(filled: Store) -> None:
    client = stranger(filled)
    reply = client.get("/", params={"token": TOKEN})
    assert reply.status_code == 200
    cookie = reply.headers["set-cookie"]
    assert {"httponly", "samesite=strict", "path=/"} <= set(cookie.lower().split("; "))
    assert client.get("/agreement").status_code == 200, "from now on the cookie is enough"
    assert "set-cookie" not in client.get("/agreement").headers


def test_two_servers_on_one_machine_have_cookies_of_two_names(filled: Store) -> None:
    names = set()
    for token in ("one", "two"):
        app = build_app(filled, Cutter(), token, LOOPBACK_NAMES, 0.0)
        reply = TestClient(app, base_url=ADDRESS).get("/", params={"token": token})
        names.add(reply.headers["set-cookie"].partition("=")[0])
    assert len(names) == 2


def test_tokens_are_compared_in_constant_time(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = gate_module.hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(gate_module.hmac, "compare_digest", watched)
    client = open_client(filled)
    assert compared == [(TOKEN.encode(), TOKEN.encode())]
    client.get("/agreement")
    assert len(compared) == 2


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8010", "127.0.0.1.evil.example", "[::1", "", "localhost."]
)
def test_on_loopback_another_host_name_is_refused(client: TestClient, host: str) -> None:
    reply = client.get("/", headers={"host": host})
    assert (reply.status_code, "this server answers only to its own address" in reply.text) == (403, True)


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:8010", "[::1]:8010", "LOCALHOST"])
def test_loopback_names_are_taken_through_any_port(client: TestClient, host: str) -> None:
    assert client.get("/", params={"token": TOKEN}, headers={"host": host}).status_code == 200


def test_a_server_for_other_machines_answers_to_any_name(filled: Store) -> None:
    app = build_app(filled, Cutter(), TOKEN, None, 0.0)
    client = TestClient(app, base_url="http://labels.example:8010")
    assert client.get("/", params={"token": TOKEN}).status_code == 200
    own, other = {"origin": "https://labels.example:8010"}, {"origin": ADDRESS}
    assert client.post("/api/next", json={"annotator": "alice"}, headers=own).status_code == 200, "TLS by a proxy"
    assert client.post("/api/next", json={"annotator": "alice"}, headers=other).status_code == 403


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:9999", "http://127.0.0.1", ""]
)
def test_a_change_that_another_site_asks_for_is_refused(client: TestClient, filled: Store, origin: str | None) -> None:
    del client.headers["origin"]
    headers = {} if origin is None else {"origin": origin}
    reply = client.post("/api/next", json={"annotator": "alice"}, headers=headers)
    assert (reply.status_code, "only this server's own pages" in reply.text) == (403, True)
    assert filled.assign("bob") == filled.answer("a")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_reply_carries_the_guarding_headers(filled: Store, method: str, path: str) -> None:
    for client in (open_client(filled), stranger(filled)):
        headers = client.request(method, path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("chunked", [True, False])
def test_a_huge_body_is_refused_even_if_its_length_is_not_told(
    client: TestClient, filled: Store, chunked: bool
) -> None:
    body = b'{"annotator": "alice", "note": "' + b"x" * MAX_BODY_BYTES + b'"}'
    content = iter([body[i : i + 1000] for i in range(0, len(body), 1000)]) if chunked else body
    reply = client.post("/api/label", content=content, headers={"content-type": "application/json"})
    assert reply.request.headers.get("transfer-encoding") == ("chunked" if chunked else None)
    assert (reply.status_code, "the request is too large" in reply.json()["error"]) == (413, True)
    assert filled.num_entries() == 0


def test_a_body_up_to_the_limit_is_taken(client: TestClient, filled: Store) -> None:
    asked(client, "next", annotator="alice")
    note = "n" * (MAX_BODY_BYTES - 200)
    asked(client, "label", annotator="alice", item="a", verdict="correct", note=note)
    assert filled.history("a")[0].label == Label("correct", "alice", "person", note=note)


def test_pages_hold_no_inline_script_or_style_and_nothing_from_elsewhere() -> None:
    web = files("draftsmith.label.page").joinpath("web")
    for entry in web.iterdir():
        text = entry.read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
        assert not re.search(r"(src|href|from|import)\W{1,3}https?:", text), entry.name
        if entry.name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>", text)
            assert not re.search(r"<style|\sstyle=|\son\w+=", text)


# ---- labelling ----------------------------------------------------------------------------------------------------------


def test_an_item_is_shown_labelled_and_followed_by_the_next(client: TestClient, filled: Store) -> None:
    first = asked(client, "next", annotator="alice")
    rest = [[" "], ["so", 7, 9], [" "], ["3", 10, 11]]
    assert first["item"] == {
        "id": "a",
        "source": "tests",
        "messages": [{"role": "user", "content": "How many? (a)", "blocks": []}],
        "cut": "words",
        "blocks": [],
        "reference": None,
        "imported": [],
        "segments": [["1", 0, 1], ["+", 1, 2], ["1", 2, 3], ["=", 3, 4], ["3", 4, 5], [",", 5, 6], *rest],
    }
    assert first["progress"] == {
        "num_labelled": 0,
        "num_released": 0,
        "num_waiting": 3,
        "mean_seconds": None,
        "last_entry": None,
        "num_withheld": 0,
    }
    assert asked(client, "next", annotator="alice") == first, "a reload or a second tab goes on with it"
    told = asked(client, "label", annotator="alice", item="a", verdict="wrong", error=[4, 5], note="sum", seconds=12.5)
    [entry] = filled.history("a")
    assert entry.label == Label("wrong", "alice", "person", (4, 5), note="sum")
    assert (entry.number, entry.author, entry.seconds) == (told["entry"], "alice", 12.5)
    second = asked(client, "next", annotator="alice")
    assert second["item"]["id"] == "b"
    assert second["progress"] == {
        "num_labelled": 1,
        "num_released": 0,
        "num_waiting": 2,
        "mean_seconds": 12.5,
        "last_entry": told["entry"],
        "num_withheld": 0,
    }
    assert told["progress"] == second["progress"], "the reply to a label counts it already"


def test_the_last_item_is_followed_by_none(client: TestClient) -> None:
    for item in "abc":
        asked(client, "next", annotator="alice")
        asked(client, "label", annotator="alice", item=item, verdict="correct")
    found = asked(client, "next", annotator="alice")
    assert found["item"] is None
    assert (found["progress"]["num_labelled"], found["progress"]["num_waiting"]) == (3, 0)


def test_what_is_shown_is_cut_as_the_target_cuts_it(filled: Store) -> None:
    cutter = Cutter(lambda text: Tokens("t", ((0, 4), (4, 4), (4, 11))), "tokens of x")
    item = asked(open_client(filled, cutter=cutter), "next", annotator="alice")["item"]
    assert (item["cut"], item["segments"]) == ("tokens of x", [["1+1=", 0, 4], ["3, so 3", 4, 11]])


def test_positions_count_characters_whatever_javascript_counts(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a", "😀😀 no")], "importer")
    client = open_client(store)
    item = asked(client, "next", annotator="alice")["item"]
    assert item["segments"] == [["😀😀", 0, 2], [" "], ["no", 3, 5]]
    asked(client, "label", annotator="alice", item="a", verdict="wrong", error=[3, 5])
    assert store.answer("a").response[slice(*store.history("a")[0].label.error)] == "no"  # type: ignore[union-attr, misc]


def test_a_request_that_is_sent_twice_writes_once(client: TestClient, filled: Store) -> None:
    asked(client, "next", annotator="alice")
    label = {"annotator": "alice", "item": "a", "verdict": "wrong", "error": [4, 5], "note": ""}
    assert asked(client, "label", **label, seconds=1) == asked(client, "label", **label, seconds=2)
    entry = asked(client, "next", annotator="alice")["progress"]["last_entry"]
    undone = asked(client, "undo", annotator="alice", entry=entry)
    assert undone["label"] == {"by": "alice", "verdict": "wrong", "error": [4, 5], "note": ""}
    assert (undone["item"], undone["progress"]["num_waiting"]) == ("a", 3)
    assert asked(client, "undo", annotator="alice", entry=entry) == undone
    assert filled.num_entries() == 2, "a label and its undoing"


def test_another_label_from_a_stale_tab_is_refused(client: TestClient, filled: Store) -> None:
    asked(client, "next", annotator="alice")
    asked(client, "label", annotator="alice", item="a", verdict="correct")
    told = refused(client, 409, "label", annotator="alice", item="a", verdict="wrong", error=[4, 5])
    assert told == "a has a label of 'alice' already; take it back first, then change it"
    assert "a has a label" in refused(client, 409, "skip", annotator="alice", item="a", reason="")
    assert filled.num_entries() == 1


def test_what_is_undone_is_offered_again_and_the_log_keeps_it(client: TestClient, filled: Store) -> None:
    for item in "ab":
        asked(client, "next", annotator="alice")
        entry = asked(client, "label", annotator="alice", item=item, verdict="correct", note=f"on {item}")["entry"]
    asked(client, "next", annotator="alice")
    told = refused(client, 409, "undo", annotator="alice", entry=entry - 1)
    assert "is not the last label of 'alice'" in told
    assert asked(client, "undo", annotator="alice", entry=entry)["label"]["note"] == "on b"
    found = asked(client, "next", annotator="alice")
    assert (found["item"]["id"], found["progress"]["num_labelled"]) == ("b", 1)
    assert len(filled.history("b")) == 2


def test_undo_leaves_labels_alone_that_were_imported_under_the_same_name(
    store: Store, make: Callable[..., Answer]
) -> None:
    store.add([make("a", label=Label("correct", "alice", "person")), make("b")], "importer")
    client = open_client(store)
    assert asked(client, "next", annotator="alice")["progress"]["last_entry"] is None
    assert "not the last label" in refused(client, 409, "undo", annotator="alice", entry=1)
    assert store.num_entries() == 1


def test_a_skipped_item_goes_to_somebody_else_with_the_reason(client: TestClient, place: str) -> None:
    asked(client, "next", annotator="alice")
    asked(client, "skip", annotator="alice", item="a", reason="no idea")
    found = asked(client, "next", annotator="alice")
    assert (found["item"]["id"], found["progress"]["num_released"]) == ("b", 1)
    assert asked(client, "next", annotator="bob")["item"]["id"] == "a"
    with sqlite3.connect(place) as connection:
        assert connection.execute("SELECT reason, author FROM releases").fetchall() == [("no idea", "alice")]
    assert "a is not assigned to 'alice'" in refused(client, 409, "skip", annotator="alice", item="a")


def test_an_item_of_somebody_else_or_of_nobody_cannot_be_labelled_or_skipped(client: TestClient, filled: Store) -> None:
    asked(client, "next", annotator="alice")
    asked(client, "next", annotator="bob")
    for item in "bc":
        label = {"annotator": "alice", "item": item, "verdict": "correct"}
        assert f"{item} is not assigned to 'alice'" in refused(client, 409, "label", **label)
        assert f"{item} is not assigned to 'alice'" in refused(client, 409, "skip", annotator="alice", item=item)
    assert "there is no answer 'z'" in refused(client, 400, "label", annotator="alice", item="z", verdict="correct")
    assert filled.num_entries() == 0


def test_annotators_at_once_get_each_item_once(store: Store, make: Callable[..., Answer]) -> None:
    items = [f"item-{number}" for number in range(20)]
    store.add([make(item) for item in items], "importer")
    got: list[str] = []
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            client = open_client(store)
            while (item := asked(client, "next", annotator=name)["item"]) is not None:
                asked(client, "label", annotator=name, item=item["id"], verdict="correct")
                got.append(item["id"])
        except BaseException as failure:
            failures.append(failure)
            raise

    workers = [threading.Thread(target=work, args=(f"annotator {number}",)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert Counter(got) == Counter(items)
    assert store.num_entries() == 20


def test_a_shared_item_goes_to_two_and_their_agreement_is_told(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a"), make("b")], "importer")
    client = open_client(store, shared=1.0)
    for name, error in (("alice", [4, 5]), ("bob", [10, 11])):
        asked(client, "next", annotator=name)
        asked(client, "label", annotator=name, item="a", verdict="wrong", error=error)
        assert asked(client, "next", annotator=name)["item"]["id"] == "b"
        asked(client, "label", annotator=name, item="b", verdict="correct")
    assert asked(client, "next", annotator="carol")["item"] is None
    [pair] = client.get("/api/agreement").json()["pairs"]
    assert pair == {
        "first": "alice",
        "second": "bob",
        "num_items": 2,
        "observed": 1.0,
        "kappa": 1.0,
        "num_marked": 1,
        "num_same_token": 0,
        "median_distance": 3,
        "mean_distance": 3.0,
        "num_differences": 1,
        "num_undecided": 1,
        "differences": [{"item_id": "a", "first": "wrong", "second": "wrong", "distance": 3, "decided_by": None}],
    }


# ---- requests in error --------------------------------------------------------------------------------------------------

GOOD = {"annotator": "alice", "item": "a", "verdict": "wrong", "error": [4, 5], "note": "", "seconds": 1.0}
BAD = [
    ({"annotator": ""}, "annotator is"),
    ({"annotator": " alice"}, "annotator is"),
    ({"annotator": "a\nb"}, "annotator is"),
    ({"annotator": "x" * 65}, "a name is 1 to 64"),
    ({"annotator": None}, "annotator is null; it is text"),
    ({"annotator": ["alice"]}, "it is text"),
    ({"item": 7}, "item is 7; it is text"),
    ({"item": "nowhere"}, "there is no answer 'nowhere'"),
    ({"verdict": "unplaced"}, "the verdict 'unplaced' has no error span"),
    ({"verdict": "maybe"}, "it is correct, wrong, unplaced"),
    ({"verdict": ["wrong"]}, "it is correct, wrong, unplaced"),
    ({"verdict": None}, "verdict is null"),
    ({"verdict": "correct"}, "the verdict 'correct' has no error span"),
    ({"error": None}, 'the verdict "wrong" needs the place'),
    ({"error": [4, 12]}, "0 <= start < end <= 11"),
    ({"error": [-1, 3]}, "0 <= start < end <= 11"),
    ({"error": [5, 4]}, "0 <= start < end <= 11"),
    ({"error": [4, 4]}, "0 <= start < end <= 11"),
    ({"error": [6, 7]}, "it covers none of the words"),
    ({"error": [4, 10**30]}, "0 <= start < end <= 11"),
    ({"error": [True, 5]}, "two whole numbers"),
    ({"error": [4.0, 5]}, "two whole numbers"),
    ({"error": [4]}, "two whole numbers"),
    ({"error": "45"}, "two whole numbers"),
    ({"note": 5}, "note is 5; it is text"),
    ({"note": "\ud800"}, "half a character"),
    ({"note": "a\0b"}, "NUL"),
    ({"seconds": -1}, "seconds is -1"),
    ({"seconds": "1"}, "seconds is"),
    ({"seconds": True}, "seconds is true"),
    ({"seconds": 1e9}, "a number from 0 to 86400"),
    ({"labelled_by": "bob"}, 'the field "labelled_by" is not known'),
]


@pytest.mark.parametrize(("change", "told"), BAD, ids=[str(change)[:40] for change, _ in BAD])
def test_a_malformed_label_is_refused_in_one_sentence_and_not_written(
    client: TestClient, filled: Store, change: dict[str, Any], told: str
) -> None:
    asked(client, "next", annotator="alice")
    sentence = refused(client, 400, "label", **{**GOOD, **change})
    assert told in sentence
    assert "\n" not in sentence
    assert filled.num_entries() == 0


@pytest.mark.parametrize("field", ["annotator", "item", "verdict"])
def test_a_label_without_a_field_is_refused(client: TestClient, filled: Store, field: str) -> None:
    asked(client, "next", annotator="alice")
    assert field in refused(client, 400, "label", **{key: value for key, value in GOOD.items() if key != field})
    assert filled.num_entries() == 0


@pytest.mark.parametrize("entry", [None, "1", 1.0, True, -1, 2**70])
def test_an_undo_without_a_number_is_refused(client: TestClient, entry: object) -> None:
    assert "entry is" in refused(client, 400, "undo", annotator="alice", entry=entry)


BODIES = [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"annotator": NaN}', b"[" * 60_000, b"9" * 5000]


@pytest.mark.parametrize("body", BODIES, ids=[str(body[:12]) for body in BODIES])
@pytest.mark.parametrize("path", ["next", "label", "skip", "undo", "compare", "decide", "reopen"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, path: str, body: bytes) -> None:
    reply = client.post(f"/api/{path}", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"].startswith("the request ")


def test_a_form_of_another_site_is_no_json(client: TestClient) -> None:
    reply = client.post("/api/next", content=b'{"annotator": "alice"}', headers={"content-type": "text/plain"})
    assert (reply.status_code, "is not JSON" in reply.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    "path", ["/none", "/web/../server.py", "/web/%2e%2e/server.py", "/docs", "/openapi.json", "/web/"]
)
def test_what_is_not_there_is_told(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert (reply.status_code, "there is nothing at" in reply.json()["error"]) == (404, True)


def test_a_wrong_method_is_told(client: TestClient) -> None:
    assert client.get("/api/next").status_code == 405
    assert client.delete("/").json() == {"error": "/ does not take DELETE; open /"}


TRUE_TO_LIFE = st.sampled_from(["bob", "a", "b", "wrong", "correct", [4, 5], 1])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = (
    TRUE_TO_LIFE | SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
FIELDS = st.sampled_from(["annotator", "item", "verdict", "error", "note", "seconds", "reason", "entry", "more"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["label", "skip", "undo", "compare", "decide", "reopen"]),
    fields=st.dictionaries(FIELDS, VALUES),
)
def test_no_request_of_a_stranger_breaks_the_server_or_writes_a_label(
    client: TestClient, filled: Store, path: str, fields: dict[str, Any]
) -> None:
    reply = sent(client, path, fields)
    assert reply.status_code in (400, 409)
    assert "\n" not in reply.json()["error"]
    assert filled.num_entries() == 0


def test_a_locked_store_is_told_with_a_hint_and_then_works_again(place: str, filled: Store) -> None:
    with Store(place, patience_seconds=0.05) as impatient:
        client = open_client(impatient)
        asked(client, "next", annotator="alice")
        other = sqlite3.connect(place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        reply = client.post("/api/label", json=GOOD)
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) > 0
        assert "nothing was written; try again in a few seconds" in reply.json()["error"]
        other.execute("ROLLBACK")
        other.close()
        assert filled.num_entries() == 0
        asked(client, "label", **GOOD)
        assert filled.num_entries() == 1


def test_a_row_that_another_process_wrote_first_is_worth_another_try(
    client: TestClient, filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        raise IntegrityError("insert", None, Exception("UNIQUE constraint failed"))

    monkeypatch.setattr(store_module, "take", late)
    assert "try again" in refused(client, 503, "next", annotator="alice")


def test_a_prompt_with_a_script_in_it_is_sent_as_data_only(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a", "<script>alert(1)</script>")], "importer")
    client = open_client(store)
    reply = client.post("/api/next", json={"annotator": "alice"})
    assert reply.headers["content-type"] == "application/json"
    assert "".join(one[0] for one in reply.json()["item"]["segments"]) == "<script>alert(1)</script>"
    assert "alert(1)" not in client.get("/").text


def test_a_formula_that_nests_too_deeply_for_a_reply_stays_text(store: Store, make: Callable[..., Answer]) -> None:
    deep, flat = ("$" + r"\sqrt{" * levels + "x" + "}" * levels + "$" for levels in (130, 40))
    store.add([make("a", f"{deep} and {flat}")], "importer")
    with open_client(store) as client:
        [block] = asked(client, "next", annotator="alice")["item"]["blocks"]
    assert block["parts"][0] == f"{deep} and "
    assert block["parts"][1]["tex"] == flat


def test_a_request_that_breaks_off_reaches_nobody() -> None:
    sent: list[Any] = []

    async def inner(*_: Any) -> None:
        raise AssertionError("it got through")

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    gate = Gate(inner, TOKEN, None)
    headers = {"host": "h:1", "origin": "http://h:1", "cookie": f"{gate._cookie}={TOKEN}"}
    scope = {"type": "http", "method": "POST", "path": "/api/next", "query_string": b""}
    asyncio.run(gate(scope | {"headers": [(k.encode(), v.encode()) for k, v in headers.items()]}, receive, send))
    assert sent[0]["status"] == 400
    assert "broke off" in sent[1]["body"].decode()


def test_a_websocket_is_turned_away() -> None:
    sent: list[Any] = []

    async def inner(*_: Any) -> None:
        raise AssertionError("it got through")

    async def send(message: Any) -> None:
        sent.append(message)

    handshake = Gate(inner, TOKEN, None)({"type": "websocket", "headers": []}, inner, send)  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        handshake.send(None)  # type: ignore[attr-defined]
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---- the command --------------------------------------------------------------------------------------------------------


def serve(*words: object) -> int:
    return cli.main(["label", "serve", *map(str, words)])


def test_the_command_prints_an_address_that_works_and_ends_cleanly_on_ctrl_c(place: str, filled: Store) -> None:
    filled.annotate("c", Label("correct", "set", "rule"))
    command = [sys.executable, "-m", "draftsmith.cli", "label", "serve", "--store", place, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"store: {place}, 2 answers wait for a label\n"
        address = process.stdout.readline().removeprefix("open:").strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*/\?token=[\w-]{32}", address)
        assert "Ctrl-C" in process.stdout.readline()
        with urllib.request.urlopen(address, timeout=60) as reply:
            assert "draftsmith" in reply.read().decode()
    finally:
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out.endswith(f"ended; 0 entries were added to {place}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shared", "1.5"], "shared is 1.5; it is the share of answers"),
        (["--port", "70000"], "port is 70000; a port is a number up to 65535"),
        (["--host", "no such host"], "cannot listen on no such host"),
        (["--target", "nowhere"], "nowhere"),
    ],
)
def test_an_impossible_option_is_refused(
    place: str, filled: Store, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert serve("--store", place, *words) == 1
    assert told in capsys.readouterr().err


def test_with_a_target_answers_are_cut_into_its_tokens(filled: Store, target: Path) -> None:
    tokens = tokenize("1+1=3, so 3", load_tokenizer(str(target)))
    pieces, name = cutter_for(str(target)).pieces(filled.answer("a"))
    assert (pieces, name) == (tokens.offsets, f"tokens of {target}")
    assert cutter_for(None).pieces(filled.answer("a"))[1] == "words"


def test_a_port_in_use_is_told(place: str, filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve("--store", place, "--port", port) == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; give another" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("--store", tmp_path / "none.db") == 1
    assert "does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "latex2mathml"])
def test_without_the_extra_the_command_says_which_to_install(
    place: str, filled: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert serve("--store", place) == 1
    assert (
        f"the package {package}; run: {install_command('fastapi', 'starlette', 'uvicorn', 'latex2mathml')}\n"
        in capsys.readouterr().err
    )
