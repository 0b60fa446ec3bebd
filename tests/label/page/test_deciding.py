"""The agreement page in a real browser: both marks in the text, and a third label that decides and is what rows are made of."""

from collections.abc import Callable

import pytest
from page_browser import Served, Visit, label_of, marked, press
from tiny import make_tokenizer

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.label.commands.rows_command import make_rows
from draftsmith.label.page.decisions import DecidingActions
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.schema import Answer, Label, deciding
from draftsmith.label.store.store import NotOpen, Store

pytest.importorskip("latex2mathml", reason="the labelling page needs the extra draftsmith[label]")


@pytest.fixture
def disputed(store: Store, make: Callable[..., Answer]) -> Store:
    """Two answers that alice and bob have marked at different places, one that they agree on."""
    store.add([make(name) for name in "abc"], "importer")
    for name, error in (("alice", (4, 5)), ("bob", (10, 11))):
        for item in "ab":
            store.annotate(item, Label("wrong", name, "person", error))
        store.annotate("c", Label("correct", name, "person"))
    return store


def test_both_marks_stand_in_the_text_and_one_key_decides(visit: Visit, disputed: Store) -> None:
    with Served(disputed) as address:
        page = visit(address, name="carol", path="/agreement")
        page.wait_for_selector("#differences tr")
        assert "2, 2 of them undecided" in page.inner_text("#differences-caption")
        press(page, "Tab")
        page.get_by_role("button", name="a", exact=True).press("Enter")
        page.wait_for_selector("#case:visible")
        assert page.locator("#answer .by-first").all_text_contents() == ["3"]
        assert page.locator("#answer .by-second").all_text_contents() == ["3"]
        assert page.locator("#answer .tagged").evaluate_all("(all) => all.map((one) => one.dataset.by)") == [
            "alice",
            "bob",
        ]
        assert page.locator("#said li").all_text_contents() == ["alice: an error: “3”", "bob: an error: “3”"]
        assert "How many? (a)" in page.inner_text("#prompt")
        press(page, "1")
        page.wait_for_function("() => document.getElementById('where').textContent.endsWith('· b')")
        page.wait_for_selector("body:not(.busy)")
        assert label_of(disputed, "a") == Label("wrong", "carol", "person", (4, 5), replaces=("alice", "bob"))
        press(page, "Home", "w")
        assert marked(page) == ["1"]
        press(page, "Enter")
        page.wait_for_selector("#found:visible")
        assert label_of(disputed, "b") == Label("wrong", "carol", "person", (2, 3), replaces=("alice", "bob"))
        assert "2, 0 of them undecided" in page.inner_text("#differences-caption")
        assert page.locator("#differences tr").first.inner_text().endswith("carol")


def test_a_decision_is_shown_and_can_be_taken_back_by_its_author_only(visit: Visit, disputed: Store) -> None:
    disputed.decide("a", Label("correct", "carol", "person", note="read it again"))
    with Served(disputed) as address:
        for name in ("alice", "carol"):
            page = visit(address, name=name, path="/agreement")
            page.get_by_role("button", name="a", exact=True).click()
            page.wait_for_selector("#case:visible")
            assert page.inner_text("#decided") == "carol has decided: all correct (read it again)"
            assert page.is_hidden("#decide")
            assert page.is_visible("#reopen") == (name == "carol")
        press(page, "u")
        page.wait_for_selector("#decide:visible")
        assert {label.labelled_by for _, label in disputed.labels("a").values()} == {"alice", "bob"}


def test_an_answer_on_which_they_agree_when_it_is_opened_again_leads_back_to_the_list(
    visit: Visit, disputed: Store
) -> None:
    disputed.decide("a", Label("correct", "carol", "person"))
    with Served(disputed) as address:
        page = visit(address, name="carol", path="/agreement")
        page.wait_for_selector("#differences tr")
        page.get_by_role("button", name="a", exact=True).press("Enter")
        page.wait_for_selector("#reopen:visible")
        disputed.annotate("a", Label("wrong", "alice", "person", (10, 11)))
        page.click("#reopen")
        page.wait_for_selector("#found:visible")
        page.wait_for_selector("body:not(.busy)")
        assert page.is_hidden("#case")
        assert "not among the differences" in page.inner_text("#status")


def test_a_decision_that_is_saved_is_not_called_undone_where_the_list_cannot_be_fetched(
    visit: Visit, disputed: Store
) -> None:
    with Served(disputed) as address:
        page = visit(address, name="carol", path="/agreement")
        page.get_by_role("button", name="a", exact=True).press("Enter")
        page.wait_for_selector("#case:visible")
        page.route("**/api/agreement", lambda route: route.abort())
        press(page, "1")
        page.wait_for_selector("body:not(.busy)")
        page.wait_for_function("() => document.getElementById('status').textContent.includes('Reload the page')")
        assert page.inner_text("#status").startswith("Saved: your label counts.")
        label = label_of(disputed, "a")
        assert label is not None
        assert label.labelled_by == "carol"


def test_a_party_and_a_stranger_without_a_name_cannot_decide(visit: Visit, disputed: Store) -> None:
    with Served(disputed) as address:
        for name, told in (("alice", "somebody else decides"), (None, "Give your name")):
            page = visit(address, name=name, path="/agreement")
            page.get_by_role("button", name="a", exact=True).click()
            page.wait_for_selector("#case:visible")
            assert told in page.inner_text("#may-not")
            press(page, "1", "c", "x")
            assert page.is_hidden("#decide")
        assert disputed.num_entries() == 6


def test_the_store_takes_one_decision_by_a_third_person(disputed: Store) -> None:
    verdict = Label("correct", "carol", "person")
    entry = disputed.decide("a", verdict)
    assert disputed.decide("a", verdict) == entry, "sent twice"
    for name, told in (
        ("carol", "has labelled a already"),
        ("alice", "has labelled a already"),
        ("dave", "'carol' has decided on a"),
    ):
        with pytest.raises(NotOpen, match=told):
            disputed.decide("a", Label("unplaced", name, "person"))
    with pytest.raises(NotOpen, match="is no decision of 'dave'"):
        disputed.reopen("dave", entry)
    assert (disputed.reopen("carol", entry), disputed.reopen("carol", entry)) == ("a", "a")
    disputed.add([Answer("new", disputed.answer("a").messages, "x", "m", "MIT", "s")], "importer")
    with pytest.raises(NotOpen, match="has 0 labels"):
        disputed.decide("new", verdict)


def test_rows_and_export_take_the_label_that_decides(disputed: Store) -> None:
    disputed.decide("a", Label("wrong", "carol", "person", (10, 11)))
    of_a = [answer for answer in disputed.answers() if answer.id == "a"]
    assert [answer.label and answer.label.labelled_by for answer in deciding(of_a)] == ["carol"]
    tokenizer = make_tokenizer()
    made = make_rows(disputed.answers(), tokenizer, ChatTemplate(tokenizer))
    assert made.num_disputed == 1, "b, on which nobody has decided"
    [row] = [row for row in made.rows if row.id == "a"]
    assert row.labels.count(0) == 1, "carol's mark"


def test_what_was_compared_once_is_not_read_again(disputed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = DecidingActions(disputed, Cutter())
    first = actions.agreement()
    asked: list[list[int]] = []
    read = disputed.labelled_answers
    monkeypatch.setattr(disputed, "labelled_answers", lambda items: asked.append(list(items)) or read(items))
    assert actions.agreement() == first
    disputed.decide("b", Label("correct", "carol", "person"))
    again = actions.agreement()
    assert asked == [[], [2]]
    [pair] = again["pairs"]
    assert (pair["num_differences"], pair["num_undecided"]) == (2, 1)
    assert [difference["decided_by"] for difference in pair["differences"]] == [None, "carol"]
    assert {(pair["first"], pair["second"]) for pair in again["pairs"]} == {("alice", "bob")}, "carol saw both marks"
