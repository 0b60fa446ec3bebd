"""Processes that hold a target together: how long they wait for the one that has the samples."""

from datetime import timedelta
from typing import Any

import pytest

from draftsmith.data.cache import sharded_extraction as together


def test_followers_wait_for_days_while_the_first_process_reads_its_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(together.distributed, "new_group", lambda **settings: groups.append(settings))
    monkeypatch.setattr(together, "_send", lambda numbers, group: None)
    monkeypatch.setattr(together, "_receive", lambda group: [])
    with together.leading(None):  # type: ignore[arg-type]
        pass
    together.follow(None, None)  # type: ignore[arg-type]
    assert [group["backend"] for group in groups] == ["gloo", "gloo"]
    assert all(group["timeout"] >= timedelta(days=2) for group in groups)
