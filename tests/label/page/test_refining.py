"""Imported labels as a queue to refine, "wrong, cannot say where", jumps, the reference and formulas: in a real browser."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from page_browser import Served, Visit, label_of, marked, press, shows

from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store

STEPS = "3 + 4 = 7\nStep 2: 7 * 2 = 15\nso it is 15"
STEP = (10, 28)


@pytest.fixture
def imported(store: Store, make: Callable[..., Answer]) -> Store:
    """Four answers whose second step a set calls wrong, and one that it calls correct."""
    wrong = Label("wrong", "set", "person", STEP)
    store.add([make(name, STEPS, wrong) for name in "abcd"], "importer")
    store.add([make("fine", STEPS, Label("correct", "set", "person"))], "importer")
    return store


def test_an_imported_step_is_shaded_and_one_key_refines_it(visit: Visit, imported: Store) -> None:
    with Served(imported) as address:
        page = visit(address)
        shows(page, "a")
        assert "".join(page.locator("#answer .step").all_text_contents()) == "Step2:7*2=15"
        assert "set says: the shaded step is wrong" in page.inner_text("#imported")
        assert marked(page) == []
        press(page, "1")
        shows(page, "b")
        press(page, "2")
        shows(page, "c")
        assert "2 labelled by you, 2 still to go" in page.inner_text("#counts")
        press(page, "3")
        shows(page, "d")
        press(page, "ArrowRight", "ArrowRight", "ArrowRight", "Enter")
        page.wait_for_selector("#done:visible")
        spans = {}
        for item in "abcd":
            label = label_of(imported, item)
            assert label is not None
            assert (label.verdict, label.labelled_by, label.replaces) == ("wrong", "alice", ("set",)), item
            assert label.error is not None
            spans[item] = STEPS[slice(*label.error)]
        assert spans == {"a": "7", "b": "15", "c": STEPS[slice(*STEP)], "d": ":"}
        assert label_of(imported, "fine") == Label("correct", "set", "person"), "nobody was asked about it"


def test_a_person_may_find_the_imported_step_right_or_be_unable_to_say_where(visit: Visit, imported: Store) -> None:
    with Served(imported) as address:
        page = visit(address)
        shows(page, "a")
        press(page, "c")
        shows(page, "b")
        press(page, "x")
        shows(page, "c")
        assert label_of(imported, "a") == Label("correct", "alice", "person", replaces=("set",))
        assert label_of(imported, "b") == Label("unplaced", "alice", "person"), "the set's step still counts"
        press(page, "u")
        shows(page, "b")
        assert page.locator("#answer .step").count() > 0


def test_a_step_without_a_number_has_no_first_number(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a", "it is so\nthen not\n", Label("wrong", "set", "person", (9, 17)))], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        press(page, "1")
        assert "states no number" in page.inner_text("#status")
        assert store.num_entries() == 1
        press(page, "2")
        page.wait_for_selector("#done:visible")
        assert label_of(store, "a") == Label("wrong", "alice", "person", (14, 17), replaces=("set",))


def test_wrong_without_a_place_is_one_key_and_done(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a"), make("b")], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        press(page, "x")
        shows(page, "b")
        assert label_of(store, "a") == Label("unplaced", "alice", "person")
        assert "1 labelled by you, 1 still to go" in page.inner_text("#counts")
        page.get_by_role("button", name="Wrong, cannot say where").click()
        page.wait_for_selector("#done:visible")
        assert store.num_waiting() == 0


def test_the_hint_to_mark_goes_when_something_is_marked(
    visit: Visit, store: Store, make: Callable[..., Answer]
) -> None:
    store.add([make("a")], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        press(page, "Enter")
        assert page.inner_text("#status").startswith("Mark the first wrong word first")
        press(page, "Home")
        assert page.inner_text("#status") == ""


def test_the_reference_is_shown_where_there_is_one(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    store.add([replace(make("a"), reference="It is <b>2</b>."), make("b")], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        assert page.inner_text("#reference-box #reference") == "It is <b>2</b>."
        press(page, "c")
        shows(page, "b")
        assert page.is_hidden("#reference-box")
