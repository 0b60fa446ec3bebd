"""The store on a team's database server: the same promises as on SQLite. Runs where DRAFTSMITH_DATABASE_URL names an empty database.

DRAFTSMITH_DATABASE_URL=postgresql+psycopg://user:password@127.0.0.1/labels pytest tests/label/store/test_team_database.py
"""

import os
import threading

import pytest

from draftsmith.data.chats.messages import Message
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store

URL = os.environ.get("DRAFTSMITH_DATABASE_URL", "")
pytestmark = pytest.mark.skipif(not URL, reason="DRAFTSMITH_DATABASE_URL names no database server to try the store on")
NUM_ITEMS, NUM_ANNOTATORS = 40, 5


def answer(number: int) -> Answer:
    question = Message(role="user", content=f"question {number} <script>")
    return Answer(f"team-{number}", (question,), f"answer {number} é", "model", "CC0-1.0", "team")


def test_annotators_on_a_server_share_the_items_and_the_log_keeps_every_word() -> None:
    with Store(URL, create=True) as store:
        assert store.add([answer(number) for number in range(NUM_ITEMS)], "importer").items == NUM_ITEMS
        assert store.add([answer(number) for number in range(NUM_ITEMS)], "importer").items == 0
    labelled: dict[str, list[str]] = {}

    def work(name: str) -> None:
        with Store(URL) as store:
            own = labelled.setdefault(name, [])
            while (item := store.assign(name)) is not None:
                store.annotate(item.id, Label("wrong", name, "person", (0, 3)), seconds=1.0)
                own.append(item.id)

    threads = [threading.Thread(target=work, args=(f"annotator-{number}",)) for number in range(NUM_ANNOTATORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [item for own in labelled.values() for item in own]
    assert len(everything) == len(set(everything)) == NUM_ITEMS
    busiest = max(labelled, key=lambda name: len(labelled[name]))
    with Store(URL) as store:
        undone = store.undo(busiest)
        assert undone == labelled[busiest][-1]
        assert [entry.label is None for entry in store.history(undone)] == [False, True]
        assert store.num_entries() == NUM_ITEMS + 1
