"""The labelling page in a real browser, worked by keyboard and mouse as a person would."""

import re
import sqlite3
from collections.abc import Callable, Iterator

import pytest
from page_browser import Page, Served, Visit, label_of, marked, press, shows

from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.schema import Answer, Label, Tokens
from draftsmith.label.store.store import Store


@pytest.fixture
def filled(store: Store, make: Callable[..., Answer]) -> Store:
    store.add([make(name) for name in "abcd"], "importer")
    return store


@pytest.fixture
def address(filled: Store) -> Iterator[str]:
    with Served(filled) as address:
        yield address


def test_several_items_are_labelled_with_the_keyboard_alone(visit: Visit, address: str, filled: Store) -> None:
    page = visit(address, name=None)
    assert page.evaluate("document.activeElement.id") == "name"
    page.keyboard.type("alice")
    press(page, "Enter")
    shows(page, "a")
    assert "token" not in page.url, "the token does not stay in sight"
    press(page, *["ArrowRight"] * 5)
    assert marked(page) == ["3"]
    press(page, "Enter")
    shows(page, "b")
    press(page, "c")
    shows(page, "c")
    press(page, "Home", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight")
    assert marked(page) == ["+", "1", "="]
    press(page, "Enter")
    shows(page, "d")
    press(page, "End", "Shift+Home", "Enter")
    page.wait_for_selector("#done:visible")
    assert "You have labelled 4." in page.inner_text("#done")
    found = {answer.id: answer.label for answer in filled.answers()}
    assert found == {
        "a": Label("wrong", "alice", "person", (4, 5)),
        "b": Label("correct", "alice", "person"),
        "c": Label("wrong", "alice", "person", (1, 4)),
        "d": Label("wrong", "alice", "person", (0, 11)),
    }
    [entry] = filled.history("a")
    assert entry.seconds is not None
    assert 0 < entry.seconds < 60


def test_a_mark_is_set_extended_and_cleared_by_clicks(visit: Visit, address: str, filled: Store) -> None:
    page = visit(address)
    shows(page, "a")
    page.click("#answer >> text=so")
    assert marked(page) == ["so"]
    page.click("#piece-4", modifiers=["Shift"])
    assert marked(page) == ["3", ",", "so"]
    assert "words 5 to 7 of 8, 3, so" in page.inner_text("#mark")
    page.click("text=Shorter")
    assert marked(page) == ["3", ","]
    page.click("text=Longer")
    page.click("#piece-2")
    page.click("#piece-2")
    assert marked(page) == []
    page.get_by_role("button", name="First error is here").click(force=True)
    assert "Mark the first wrong word first" in page.inner_text("#status")
    page.click("#piece-7")
    page.click("text=First error is here")
    shows(page, "b")
    page.click("text=All correct")
    shows(page, "c")
    assert label_of(filled, "a") == Label("wrong", "alice", "person", (10, 11))
    assert label_of(filled, "b") == Label("correct", "alice", "person")


def test_undo_brings_the_item_back_as_it_was_marked(visit: Visit, address: str, filled: Store) -> None:
    page = visit(address)
    shows(page, "a")
    press(page, "u")
    assert page.inner_text("#status") == "There is nothing to take back."
    press(page, "Home", "ArrowRight", "n")
    page.keyboard.type("a sum, c and s")
    press(page, "Escape", "Enter")
    shows(page, "b")
    assert label_of(filled, "a") == Label("wrong", "alice", "person", (1, 2), note="a sum, c and s")
    press(page, "u")
    shows(page, "a")
    assert (marked(page), page.input_value("#note")) == (["+"], "a sum, c and s")
    press(page, "ArrowRight", "Enter")
    shows(page, "b")
    assert label_of(filled, "a") == Label("wrong", "alice", "person", (2, 3), note="a sum, c and s")
    assert len(filled.history("a")) == 3


def test_undo_works_where_nothing_is_left(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a")], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        press(page, "c")
        page.wait_for_selector("#done:visible")
        press(page, "u")
        shows(page, "a")
        assert store.answers() == []


def test_a_skipped_item_is_given_back_with_the_reason(visit: Visit, address: str, filled: Store, place: str) -> None:
    page = visit(address)
    shows(page, "a")
    press(page, "s", "Escape", "s")
    page.keyboard.type("not my subject")
    press(page, "Enter")
    shows(page, "b")
    assert "0 labelled by you, 3 still to go, 1 skipped" in page.inner_text("#counts")
    assert filled.assign("bob") == filled.answer("a")
    with sqlite3.connect(place) as connection:
        assert connection.execute("SELECT reason FROM releases").fetchall() == [("not my subject",)]


def test_the_keys_are_told_and_do_nothing_while_they_are(visit: Visit, address: str, filled: Store) -> None:
    page = visit(address)
    shows(page, "a")
    press(page, "?")
    assert page.is_visible("#help")
    assert "undo your last label" in page.inner_text("#help")
    press(page, "c", "ArrowRight", "Escape")
    assert page.is_hidden("#help")
    assert (marked(page), filled.num_entries()) == ([], 0)


def test_a_key_that_is_held_down_moves_on_but_labels_once(visit: Visit, address: str, filled: Store) -> None:
    page = visit(address)
    shows(page, "a")
    for _ in range(3):
        page.keyboard.down("ArrowRight")
    page.keyboard.up("ArrowRight")
    assert marked(page) == ["1"], "the third piece"
    assert page.inner_text("#mark").startswith("First error: word 3 ")
    page.keyboard.down("c")
    shows(page, "b")
    page.keyboard.down("c")
    page.keyboard.up("c")
    press(page, "c")
    shows(page, "c")
    assert filled.num_entries() == 2


def test_up_and_down_keep_to_the_column(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a", "one two three\nfour five six\n\nseven eight nine")], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        page.click("#piece-1")
        got = []
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowUp"):
            press(page, key)
            got += marked(page)
        assert got == ["five", "eight", "eight", "five", "two", "two"]


def test_dark_comes_from_the_system_and_from_the_switch(visit: Visit, address: str) -> None:
    def ground(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = visit(address, name="alice"), visit(address, name="bob", color_scheme="dark")
    assert (ground(light), ground(dark)) == ("rgb(246, 245, 241)", "rgb(22, 24, 28)")
    light.click("#theme")
    assert (ground(light), light.inner_text("#theme")) == (ground(dark), "Theme: dark")
    light.reload()
    assert ground(light) == ground(dark), "the choice is kept"
    dark.click("#theme")
    dark.click("#theme")
    assert (ground(dark), dark.inner_text("#theme")) == ("rgb(246, 245, 241)", "Theme: light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(visit: Visit, address: str, scheme: str) -> None:
    page = visit(address, color_scheme=scheme)
    shows(page, "a")
    press(page, "ArrowRight", "ArrowRight")
    ratios = page.evaluate(
        """() => {
          const channels = (color) => color.match(/[\\d.]+/g).map(Number);
          const light = (color) => {
            const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = channels(color).map(linear);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = (node) => {
            for (; node; node = node.parentElement) {
              const color = getComputedStyle(node).backgroundColor;
              if (channels(color)[3] !== 0) return color;
            }
            return "rgb(255, 255, 255)";
          };
          const found = {};
          for (const node of document.querySelectorAll("body *")) {
            const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
            if (!own || !node.checkVisibility()) continue;
            const [a, b] = [light(getComputedStyle(node).color), light(ground(node))];
            found[`${node.tagName}.${node.className} ${node.textContent}`] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }
          return found;
        }"""
    )
    assert len(ratios) > 20
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_a_script_in_prompt_or_answer_stays_text(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    attack = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    answer = make("<b>a</b>", attack)
    message = {"role": "user", "content": attack}
    store.add([Answer(**{**vars(answer), "messages": (message,), "source": attack})], "importer")
    with Served(store) as address:
        page = visit(address)
        page.wait_for_selector("#work:visible")
        assert page.inner_text("#prompt .text") == attack
        assert page.text_content("#answer") == attack
        assert "<b>a</b>" in page.inner_text("#where")
        assert page.locator("main img, main script, main b:not(#person-name)").count() == 0
        press(page, "End")
        page.wait_for_timeout(200)
        assert page.title() == "Label · draftsmith"


def test_the_policy_stops_a_script_that_gets_in(visit: Visit, address: str) -> None:
    page = visit(address, attack=True)
    shows(page, "a")
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'taken'";
          document.body.append(script);
        }"""
    )
    assert page.title() == "Label · draftsmith"


def test_two_annotators_at_once_get_items_of_their_own(visit: Visit, address: str, filled: Store) -> None:
    alice, bob = visit(address, name="alice"), visit(address, name="bob")
    shows(alice, "a")
    shows(bob, "b")
    press(alice, "c")
    shows(alice, "c")
    press(bob, "Home", "Enter")
    shows(bob, "d")
    assert {answer.id: answer.label.labelled_by for answer in filled.answers() if answer.label} == {
        "a": "alice",
        "b": "bob",
    }


def test_a_reload_goes_on_with_the_item_the_mark_and_the_note(visit: Visit, address: str) -> None:
    page = visit(address)
    shows(page, "a")
    press(page, "Home", "Shift+ArrowRight", "n")
    page.keyboard.type("hm")
    page.reload()
    shows(page, "a")
    assert (marked(page), page.input_value("#note")) == (["1", "+"], "hm")


def test_a_second_tab_has_the_same_item_and_the_first_goes_on_when_it_is_done(
    visit: Visit, address: str, filled: Store
) -> None:
    page = visit(address)
    shows(page, "a")
    tab = page.context.new_page()
    tab.goto(f"{address}/?name=alice")
    shows(tab, "a")
    press(tab, "Home", "Enter")
    shows(tab, "b")
    press(page, "c")
    shows(page, "b")
    assert "a has a label of 'alice' already" in page.inner_text("#trouble")
    assert label_of(filled, "a") == Label("wrong", "alice", "person", (0, 1))


def test_a_locked_store_loses_nothing_that_was_marked(visit: Visit, filled: Store, place: str) -> None:
    with Store(place, patience_seconds=0.1) as impatient, Served(impatient) as address:
        page = visit(address)
        shows(page, "a")
        press(page, "Home", "ArrowRight", "n")
        page.keyboard.type("kept")
        other = sqlite3.connect(place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        press(page, "Escape", "Enter")
        page.wait_for_selector("#trouble:visible")
        assert "Not saved: the store is busy" in page.inner_text("#trouble")
        assert (marked(page), page.input_value("#note")) == (["+"], "kept")
        other.execute("ROLLBACK")
        other.close()
        page.get_by_role("button", name="Try again").click()
        shows(page, "b")
        assert page.is_hidden("#trouble")
        assert label_of(filled, "a") == Label("wrong", "alice", "person", (1, 2), note="kept")
        assert filled.num_entries() == 1


def test_try_again_saves_what_is_marked_now(visit: Visit, filled: Store, place: str) -> None:
    with Store(place, patience_seconds=0.1) as impatient, Served(impatient) as address:
        page = visit(address)
        shows(page, "a")
        other = sqlite3.connect(place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        press(page, "Home", "Enter")
        page.wait_for_selector("#trouble:visible")
        page.wait_for_selector("body:not(.busy)")
        press(page, "ArrowRight", "ArrowRight")
        other.execute("ROLLBACK")
        other.close()
        page.get_by_role("button", name="Try again").click()
        shows(page, "b")
        assert label_of(filled, "a") == Label("wrong", "alice", "person", (2, 3))


def test_a_server_that_is_gone_is_told_and_the_mark_is_kept(visit: Visit, filled: Store) -> None:
    served = Served(filled)
    with served as address:
        page = visit(address)
        shows(page, "a")
    press(page, "Home", "Enter")
    page.wait_for_selector("#trouble:visible")
    assert "the server cannot be reached" in page.inner_text("#trouble")
    assert marked(page) == ["1"]


def test_agreement_is_told_on_a_page_of_its_own(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a"), make("b")], "importer")
    with Served(store, shared=1.0) as address:
        pages = {name: visit(address, name=name) for name in ("alice", "bob")}
        pages["alice"].click("text=Agreement")
        pages["alice"].wait_for_selector("text=No answer has been labelled by two people yet")
        pages["alice"].click("nav >> text=Label")
        for name, key in (("alice", "Home"), ("bob", "End")):
            shows(pages[name], "a")
            press(pages[name], key, "Enter")
            shows(pages[name], "b")
            press(pages[name], "c")
            pages[name].wait_for_selector("#done:visible")
        page = pages["bob"]
        page.click("text=Agreement")
        page.wait_for_selector("#pairs tr")
        assert page.inner_text("#pairs tr").split("\t") == ["alice and bob", "2", "100 %", "1.00", "1", "0", "7", "7"]
        differences = page.inner_text("#differences tr").split("\t")
        assert differences == ["a", "alice: an error", "bob: an error", "7", "\u2013"]
        page.click("nav >> text=Label")
        page.wait_for_selector("#done:visible")
        assert page.inner_text("#person-name") == "bob", "the name comes along"


@pytest.mark.parametrize("wide", [400, 1280])
def test_nothing_is_wider_than_the_window(visit: Visit, store: Store, make: Callable[..., Answer], wide: int) -> None:
    store.add([make("a", "x" * 400 + " = " + "1234567890" * 30), make("b")], "importer")
    with Served(store, shared=1.0) as address:
        page = visit(address, wide=wide)
        shows(page, "a")
        press(page, "Home")
        for state in ("?", "Escape", "s", "Escape"):
            press(page, state)
            assert page.evaluate("document.documentElement.scrollWidth") <= wide
        other = visit(address, name="bob-with-a-rather-long-name", wide=wide)
        for one in (page, other):
            shows(one, "a")
            press(one, "c")
            shows(one, "b")
        other.goto(f"{address}/agreement")
        other.wait_for_selector("#pairs tr")
        assert other.evaluate("document.documentElement.scrollWidth") <= wide


def test_a_mark_is_told_by_more_than_its_colour_and_moves_no_text(visit: Visit, address: str) -> None:
    page = visit(address)
    shows(page, "a")
    places = "[...document.querySelectorAll('.piece')].map((one) => one.getBoundingClientRect().left)"
    before = page.evaluate(places)
    press(page, "Home", "Shift+ArrowRight")
    assert page.evaluate(places) == before
    style = page.evaluate("({...getComputedStyle(document.getElementById('piece-0'))})")
    assert (style["textDecorationLine"], style["textDecorationStyle"]) == ("underline", "wavy")
    assert style["boxShadow"] != "none"


def test_a_screen_reader_finds_landmarks_names_and_the_mark(visit: Visit, address: str) -> None:
    page = visit(address)
    shows(page, "a")
    press(page, "ArrowRight", "ArrowRight")
    for role, name in (("main", None), ("navigation", "Pages"), ("banner", None), ("region", "Answer in words")):
        assert page.get_by_role(role, **({} if name is None else {"name": name})).count() == 1, role
    assert page.get_by_role("status").count() == 1
    box = page.get_by_role("listbox", name="Answer in words")
    assert box.evaluate("(box) => box === document.activeElement")
    active = box.get_attribute("aria-activedescendant")
    assert page.text_content(f"#{active}") == "+"
    assert page.get_by_role("option", selected=True).count() == 1
    for name in ("First error is here Enter", "All correct c", "Skip s", "Undo u", "Keys ?"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1, name
    assert page.get_by_role("textbox", name=re.compile("Note")).count() == 1
    unnamed = "[...document.querySelectorAll('input, textarea, progress')].filter((one) => !one.labels.length).length"
    assert page.evaluate(unnamed) == 0


def test_the_focus_can_be_seen_wherever_tab_leads(visit: Visit, address: str) -> None:
    page = visit(address)
    shows(page, "a")
    page.evaluate("document.activeElement.blur()")
    seen = set()
    for _ in range(16):
        press(page, "Tab")
        name, style, width = page.evaluate(
            "(({tagName, id, textContent}, style) => [tagName + id + textContent.trim(), style.outlineStyle, style.outlineWidth])"
            "(document.activeElement, getComputedStyle(document.activeElement))"
        )
        if name.startswith("BODY"):
            continue
        seen.add(name)
        assert (style, width) == ("solid", "3px"), name
    assert {"TEXTAREAnote", "BUTTONUndo u", "AAgreement"} <= seen


def test_tokens_are_shown_as_they_are_line_breaks_and_gaps_included(
    visit: Visit, store: Store, make: Callable[..., Answer]
) -> None:
    store.add([make("a", "ab\n c  d")], "importer")
    tokens = Tokens("t", ((0, 2), (2, 3), (3, 5), (5, 6), (7, 8)))
    with Served(store, cutter=Cutter(lambda _: tokens, "tokens of x")) as address:
        page = visit(address)
        shows(page, "a")
        assert page.inner_text("#cut") == "in tokens of x"
        assert page.locator("#answer .piece").all_text_contents() == ["ab", "\n", " c", " ", "d"]
        assert page.text_content("#answer") == "ab\n c  d"
        assert page.get_by_role("option", name="line break").count() == 1
        press(page, "Home", "ArrowRight")
        assert "token 2 of 5, ⏎" in page.inner_text("#mark")
        press(page, "ArrowRight", "Shift+End")
        assert "tokens 3 to 5 of 5,  c  d" in page.inner_text("#mark"), "the gap is within the mark"
        press(page, "Enter")
        page.wait_for_selector("#done:visible")
        assert label_of(store, "a") == Label("wrong", "alice", "person", (3, 8))
