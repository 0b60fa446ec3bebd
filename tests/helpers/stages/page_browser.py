"""What the tests of the labelling page share: a server in a thread, and how a person reads and presses keys."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.schema import Label
from draftsmith.label.store.store import Store

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "the-token"

Page = Any
Visit = Callable[..., Page]


class Served:
    """A server in a thread, as long as the `with` lasts."""

    def __init__(self, store: Store, shared: float = 0.0, cutter: Cutter | None = None, check: Any = None) -> None:
        import uvicorn

        from draftsmith.label.page.access import LOOPBACK_NAMES
        from draftsmith.label.page.serve_command import listen
        from draftsmith.label.page.server import build_app

        app = build_app(store, cutter or Cutter(), TOKEN, LOOPBACK_NAMES, shared, check)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        self._listener = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})

    def __enter__(self) -> str:
        self._thread.start()
        return self.address

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


def shows(page: Page, item: str) -> None:
    """Waits until the page shows that item and takes keys for it."""
    page.wait_for_function("(id) => document.getElementById('where')?.textContent.endsWith(`· ${id}`)", arg=item)
    page.wait_for_selector("body:not(.busy) #work:visible")


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def label_of(store: Store, item: str) -> Label | None:
    return store.history(item)[-1].label


def marked(page: Page) -> list[str]:
    found: list[str] = page.locator("#answer [aria-selected=true]").all_text_contents()
    return found
