"""What the agreement page asks for: how far two annotators agree, one answer with both marks, and a third label that decides.

Owns these requests and replies. What was compared once is remembered, so that a request compares only what is new.
"""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from draftsmith.label.page.actions import check_covers_a_piece
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.page.request_fields import (
    BadRequest,
    annotator_name,
    entry_field,
    only_known,
    span_field,
    text_field,
    verdict_field,
)
from draftsmith.label.page.shown_answer import shown_answer, shown_label
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.agreement import Agreement, LabelComparison, are_comparable, compared
from draftsmith.label.store.store import Store

MOST_DIFFERENCES = 300


@dataclass(frozen=True)
class _Item:
    """What is remembered of one answer: the comparison of each pair, and who has decided between the two."""

    comparisons: dict[tuple[str, str], LabelComparison]
    decided_by: dict[tuple[str, str], str | None]


class DecidingActions:
    """What the agreement page asks for.

    Every method with fields rejects those that are missing, unknown or of the wrong type, and passes on what the store raises.

    Args:
        store: where labels come from and go.
        cutter: what an answer is cut into.
    """

    def __init__(self, store: Store, cutter: Cutter) -> None:
        self._store = store
        self._cutter = cutter
        self._lock = threading.Lock()
        self._known: dict[int, tuple[dict[str, int], _Item]] = {}

    def agreement(self) -> dict[str, Any]:
        """Every pair of annotators with an answer that both have labelled."""
        with self._lock:
            items = self._items()
        pairs: dict[tuple[str, str], list[_Item]] = {}
        for item in items:
            for pair in item.comparisons:
                pairs.setdefault(pair, []).append(item)
        return {"pairs": [_shown_pair(pair, compared_items) for pair, compared_items in sorted(pairs.items())]}

    def compare(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One answer, with the labels of two annotators and the one that decides.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type, or one of the two has no label.
        """
        only_known(fields, "item", "first", "second")
        item = text_field(fields, "item")
        labels = self._store.labels(item)
        for name in (first := text_field(fields, "first"), second := text_field(fields, "second")):
            if name not in labels:
                raise BadRequest(f"{item} has no label of {name!r} any more; reload the page")
        deciding = [(number, label) for number, label in labels.values() if {first, second} <= set(label.replaces)]
        decided = None
        if deciding:
            number, label = max(deciding, key=lambda entry: entry[0])
            decided = shown_label(label) | {"entry": number}
        shown = [shown_label(labels[name][1]) for name in (first, second)]
        return shown_answer(self._store.answer(item), self._cutter) | {"labels": shown, "decided": decided}

    def decide(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the label that counts from now on in place of all others on this answer.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        only_known(fields, "annotator", "item", "verdict", "error", "note")
        verdict, error = verdict_field(fields), span_field(fields)
        item, note = text_field(fields, "item"), text_field(fields, "note", "")
        if error is not None:
            check_covers_a_piece(self._store.answer(item), error, self._cutter)
        label = Label(verdict, annotator_name(fields), "person", error, note=note)
        return {"entry": self._store.decide(item, label)}

    def reopen(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Takes back a label that decided.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        only_known(fields, "annotator", "entry")
        return {"item": self._store.reopen(annotator_name(fields), entry_field(fields))}

    def _items(self) -> list[_Item]:
        several = self._store.with_several_labels()
        stale = [number for number, entries in several.items() if self._known.get(number, (None,))[0] != entries]
        answers = self._store.labelled_answers(stale)
        for number in stale:
            self._known[number] = (several[number], self._compared(answers[number]))
        return [self._known[number][1] for number in several]

    def _compared(self, answers: list[Answer]) -> _Item:
        answers = sorted(answers, key=_author)
        pairs = {
            (_author(first), _author(second)): compared(first, second, lambda answer: self._cutter.pieces(answer)[0])
            for first, second in itertools.combinations(answers, 2)
            if are_comparable(first, second)
        }
        deciding = {_author(answer): set(answer.label.replaces) for answer in answers if answer.label is not None}
        decided_by = {
            pair: next((name for name, replaced in deciding.items() if {*pair} <= replaced), None) for pair in pairs
        }
        return _Item(pairs, decided_by)


def _author(answer: Answer) -> str:
    assert answer.label is not None
    return answer.label.labelled_by


def _shown_pair(pair: tuple[str, str], items: list[_Item]) -> dict[str, Any]:
    agreement = Agreement(*pair, tuple(item.comparisons[pair] for item in items))
    distances = agreement.distances()
    differences = [
        asdict(item.comparisons[pair]) | {"decided_by": item.decided_by[pair]}
        for item in items
        if not item.comparisons[pair].agrees() or item.comparisons[pair].distance
    ]
    # What nobody has decided first.
    differences.sort(key=lambda difference: difference["decided_by"] is not None)
    return {
        "first": agreement.first,
        "second": agreement.second,
        "num_items": len(agreement.comparisons),
        "observed": agreement.observed(),
        "kappa": agreement.kappa(),
        "num_marked": len(distances),
        "num_same_token": sum(distance == 0 for distance in distances),
        "median_distance": statistics.median(distances) if distances else None,
        "mean_distance": statistics.fmean(distances) if distances else None,
        "num_differences": len(differences),
        "num_undecided": sum(difference["decided_by"] is None for difference in differences),
        "differences": differences[:MOST_DIFFERENCES],
    }
