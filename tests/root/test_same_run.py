from typing import Any

import pytest

from draftsmith.provenance import differences

SETTINGS: dict[str, Any] = {"temperature": 0.0, "stop": ["a"], "constraints": None}


@pytest.mark.parametrize("there", [
    {"dtype": "float32", "settings": SETTINGS},
    {"dtype": "float32", "settings": {"temperature": 0.0, "stop": ["a"]}},
    {"dtype": "float32", "settings": SETTINGS, "context": None},
])  # fmt: skip
def test_a_setting_that_an_earlier_version_did_not_write_down_counts_as_null(there: dict[str, Any]) -> None:
    now = {"dtype": "float32", "settings": SETTINGS}
    assert differences(there, now) == differences(now, there) == []


@pytest.mark.parametrize(("there", "told"), [
    ({"settings": {"temperature": 0.0}}, ["settings.constraints: there None, now {'top_h': 0.5}"]),
    ({"settings": {"temperature": 1.0, "constraints": {"top_h": 0.5}}}, ["settings.temperature: there 1.0, now 0.0"]),
    ({"context": 64}, ["context: there 64, now None", "settings: there None, now {'temperature': 0.0, 'constraints': {'top_h': 0.5}}"]),
])  # fmt: skip
def test_what_differs_is_named_with_both_values(there: dict[str, Any], told: list[str]) -> None:
    now = {"settings": {"temperature": 0.0, "constraints": {"top_h": 0.5}}, "url": "b"}
    assert differences({**there, "url": "a"}, now, without=["url"]) == told
