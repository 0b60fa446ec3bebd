"""Whether a folder's earlier run was the run that is asked for now.

Owns the comparison of what two runs depend on, across versions that write down more than their elders did. Does not know what a run
depends on, nor where that is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


def differences(there: Mapping[str, Any], now: Mapping[str, Any], without: Collection[str] = ()) -> list[str]:
    """Which settings differ, as `name: there 'a', now 'b'`, in the order of their names; those inside objects as `settings.name`.

    A setting that one side lacks counts as null there. So null must be how a run does without a later version's setting, which is what
    every run of an earlier version did.

    Args:
        there: of the earlier run, as JSON gives it back.
        now: of this run.
        without: names at the top that may differ.

    Example:
        `{"n": 1}` and `{"n": 1, "context": None}` are the same; with `{"n": 1, "context": 64}` it is `context: there None, now 64`.
    """
    own, others = ({name: settings[name] for name in settings if name not in without} for settings in (now, there))
    return [f"{name}: there {old!r}, now {new!r}" for name, old, new in _unlike(others, own, "")]


def _unlike(there: Mapping[str, Any], now: Mapping[str, Any], within: str) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(there.keys() | now.keys()):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _unlike(old, new, f"{within}{name}.")
        elif old != new:
            yield f"{within}{name}", old, new
