"""A browser for the tests of the labelling page."""

from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import CHROMIUM, FLAGS, TOKEN, Page, Visit


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    for package in ("fastapi", "uvicorn", "latex2mathml"):
        pytest.importorskip(package, reason="the labelling page needs the extra draftsmith[label]")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven through playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}; .ci/run installs it")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens the printed address in a browser of its own, and holds the page to raising no error of its own."""
    contexts: list[Any] = []
    faults: list[str] = []

    def opened(
        address: str,
        name: str | None = "alice",
        wide: int = 1280,
        path: str = "/",
        attack: bool = False,
        **options: Any,
    ) -> Page:
        context = browser.new_context(**{"viewport": {"width": wide, "height": 800}} | options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        # What the policy stops shows on the console only.
        if not attack:
            page.on("console", lambda said: faults.append(said.text) if "Content Security" in said.text else None)
        page.goto(f"{address}{path}?token={TOKEN}" + ("" if name is None else f"&name={name}"))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []
