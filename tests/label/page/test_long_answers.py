"""Long answers and formulas in a real browser: jumps, formulas drawn from LaTeX, a phone, and a day's work by the keyboard alone."""

import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from page_browser import Page, Served, Visit, label_of, marked, press, shows

pytest.importorskip("latex2mathml", reason="the labelling page needs the extra draftsmith[label]")

from draftsmith.data.chats.messages import Message
from draftsmith.label.page.latex import blocks
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store

LONG = "First, add them. That is 3 + 4.5 = 7.5 now.\n\nThen double it. It gives 16.\nSo it is 16."
TEX = r"Let $x^2 = 16$, at $5 and $6." + "\n" + r"\[ x = \pm\frac{8}{2}" + "\n" + r"= \pm 4 \]" + "\n" + r"\boxed{4}"


@pytest.fixture
def page(visit: Visit, store: Store, make: Callable[..., Answer]) -> "Page":
    store.add([make("a", LONG)], "importer")
    with Served(store) as address:
        opened = visit(address)
        shows(opened, "a")
        yield opened


def after(page: Page, *keys: str) -> list[str]:
    """What is marked after each key, together."""
    found = []
    for key in keys:
        press(page, key)
        found.append(" ".join(marked(page)))
    return found


def test_jumps_go_by_word_by_sentence_and_by_step(page: Page) -> None:
    assert after(page, "w", "w", "w", "w", "b") == ["First", "add", "them", "That", "them"]
    assert after(page, ".", ".", ",", ",") == ["That", "Then", "That", "First"]
    assert after(page, "j", "j", "k", "k", "k") == ["Then", "So", "Then", "First", "First"]
    assert after(page, "Control+ArrowDown", "Control+ArrowRight", "Control+ArrowLeft", "Control+ArrowUp") == [
        "That",
        "is",
        "That",
        "First",
    ]
    assert after(page, "PageDown", "PageUp") == ["Then", "First"]


def test_a_letter_jumps_wherever_a_layout_has_it(page: Page) -> None:
    """On Dvorak, w lies where others have the comma, and v where they have the full stop."""
    press(page, "w")
    page.evaluate(
        "document.getElementById('answer').dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'w', code: 'Comma', bubbles: true }))"
    )
    assert marked(page) == ["add"]


def test_with_shift_a_jump_marks_to_the_end_of_the_word_sentence_or_step(page: Page) -> None:
    press(page, "j", "j")
    assert after(page, "Shift+W", "Shift+>", "Shift+J") == [
        "Then double",
        "Then double it .",
        "Then double it . It gives 16 .",
    ]
    press(page, "Escape", ".")
    assert marked(page) == ["First"]


def test_formulas_are_drawn_and_the_text_stays_markable(
    visit: Visit, store: Store, make: Callable[..., Answer]
) -> None:
    answer = replace(make("a", TEX), reference=r"It is $\sqrt{16}$.")
    store.add([replace(answer, messages=(Message(role="user", content=r"Solve $x^2=16$"),))], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        assert page.locator("#drawn math").count() == 3
        assert page.locator("#drawn math msup").count() == 1
        assert page.locator("#drawn math mfrac").bounding_box()["height"] > 20, "a fraction is drawn as one"
        assert page.locator("#drawn .boxed").count() == 1
        assert "at $5 and $6." in page.inner_text("#drawn")
        assert (page.locator("#prompt math").count(), page.locator("#reference msqrt").count()) == (1, 1)
        assert page.text_content("#answer") == TEX
        page.click("#drawn .drawn-line >> nth=1")
        assert marked(page) == ["\\["]
        assert page.locator("#drawn .here mfrac").count() == 1, "its line is lit"
        press(page, "Enter")
        page.wait_for_selector("#done:visible")
        assert label_of(store, "a") == Label("wrong", "alice", "person", (TEX.index("\\["), TEX.index("\\[") + 2))


def test_what_a_formula_holds_never_becomes_html(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    attack = (
        r"$\href{javascript:alert(1)}{x}$ $\text{<img src=x onerror=alert(1)>}$ $<script>alert(1)</script>$ $&lt;b&gt;$"
    )
    store.add([replace(make("a", attack), reference=attack)], "importer")
    with Served(store) as address:
        page = visit(address)
        shows(page, "a")
        assert page.locator("#drawn math").count() == 4
        assert page.locator("main :is(img, script, a)").count() == 0
        assert page.locator("math :is([href], [onerror], [style])").count() == 0
        assert "<img src=x onerror=alert(1)>" in page.inner_text("#drawn").replace("\xa0", " ")


def test_a_day_by_the_keyboard_alone(visit: Visit, store: Store, make: Callable[..., Answer]) -> None:
    """Log in, refine, mark in a long text, correct, unplaced, note, undo, skip; the counters are right after each."""
    step = Label("wrong", "set", "person", (10, 19))
    store.add([make("a", "1 + 1 = 2\n2 + 2 = 5", step), make("b", LONG), *(make(name) for name in "cde")], "importer")
    with Served(store) as address:
        page = visit(address, name=None)
        page.keyboard.type("alice")
        press(page, "Enter")
        shows(page, "a")
        counts = []

        def count(item: str | None) -> None:
            if item is None:
                page.wait_for_selector("#done:visible")
            else:
                shows(page, item)
            counts.append(tuple(map(int, re.findall(r"\d+", page.text_content("#counts") or ""))))

        for key, following in (
            ("2", "b"),
            ("j", None),
            ("j", None),
            (".", None),
            ("w", None),
            ("Enter", "c"),
            ("c", "d"),
            ("u", "c"),
        ):
            press(page, key)
            if following:
                count(following)
        press(page, "n")
        page.keyboard.type("hard to say")
        press(page, "Escape", "x")
        count("d")
        press(page, "s")
        page.keyboard.type("not mine")
        press(page, "Enter")
        count("e")
        press(page, "End", "Enter")
        count(None)
        assert counts == [(1, 4), (2, 3), (3, 2), (2, 3), (3, 2), (3, 1, 1), (4, 0, 1)]
        assert label_of(store, "a") == Label("wrong", "alice", "person", (18, 19), replaces=("set",))
        start = LONG.index("gives")
        assert label_of(store, "b") == Label("wrong", "alice", "person", (start, start + 5))
        assert label_of(store, "c") == Label("unplaced", "alice", "person", note="hard to say")
        assert store.num_waiting() == 1, "the skipped one"


def test_a_phone_refines_marks_by_touch_and_nothing_is_out_of_reach(
    visit: Visit, store: Store, make: Callable[..., Answer]
) -> None:
    step = Label("wrong", "set", "person", (10, 19))
    store.add([make("a", "1 + 1 = 2\n2 + 2 = 5", step), replace(make("b", TEX), reference="4")], "importer")
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with Served(store) as address:
        page = visit(address, **phone)
        shows(page, "a")
        for item in ("a", "b"):
            shows(page, item)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            small = page.evaluate(
                "[...document.querySelectorAll('main button')].filter((b) => b.checkVisibility()"
                " && b.getBoundingClientRect().height < 34).map((b) => b.textContent)"
            )
            assert small == []
            if item == "a":
                page.get_by_role("button", name=re.compile("Last word")).tap()
        page.tap("#piece-3")
        page.get_by_role("button", name="First error is here").tap()
        page.wait_for_selector("#done:visible")
        assert label_of(store, "a") == Label("wrong", "alice", "person", (18, 19), replaces=("set",))
        label = label_of(store, "b")
        assert label is not None
        assert label.error is not None


@pytest.mark.parametrize(
    "beginning",
    [
        r"\( ",
        r"\[ ",
        r"\begin{align} ",
        r"\begin{align} \begin{gather} ",
        r"\boxed{",
        r"\boxed{{a}",
        "$ ",
        " $a",
        "$$ ",
        "$$$ ",
        r"$\$ ",
    ],
)
def test_a_text_of_beginnings_without_ends_is_read_at_once(beginning: str) -> None:
    start = time.process_time()
    blocks(beginning * (120_000 // len(beginning)))
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        (r"so \[ a \\[4pt] b \] and \(c\)", [r"\[ a \\[4pt] b \]", r"\(c\)"]),
        (r"\( a \) \( b \)", [r"\( a \)", r"\( b \)"]),
        (r"lost \( and \(a\)", [r"\(a\)"]),
        (r"\begin{align} a &= b \\ c &= d \end{align}", [r"\begin{align} a &= b \\ c &= d \end{align}"]),
        (r"lost \begin{align} and \begin{align} a \end{align}", [r"\begin{align} a \end{align}"]),
        ("$$a$$, $b$ and $5 or $6", ["$$a$$", "$b$"]),
    ],
)
def test_a_formula_reaches_from_the_last_beginning_to_its_end(text: str, formulas: list[str]) -> None:
    parts = [part for block in blocks(text) for part in block["parts"]]
    assert [part["tex"] for part in parts if not isinstance(part, str)] == formulas
