"""What an annotator may do on the labelling page, each as one request: fields in, what the page then shows out.

Owns which fields a request has, and what becomes of them. Knows no web framework, and nothing of agreement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.page.request_fields import (
    BadRequest,
    annotator_name,
    entry_field,
    only_known,
    seconds_field,
    span_field,
    text_field,
    verdict_field,
)
from draftsmith.label.page.shown_answer import shown_answer, shown_imports, shown_label
from draftsmith.label.page.target_check import TargetCheck
from draftsmith.label.schema import Answer, Label, Span
from draftsmith.label.store.store import LogEntry, Store


class LabellingActions:
    """What an annotator may do.

    Every method with fields rejects those that are missing, unknown or of the wrong type, and passes on what the store raises.

    Args:
        store: where answers come from and labels go.
        cutter: what an answer is cut into.
        shared: the share of the items that two annotators get.
        check: which answers fit the target; None serves all.
    """

    def __init__(self, store: Store, cutter: Cutter, shared: float, check: TargetCheck | None = None) -> None:
        self._store = store
        self._cutter = cutter
        self._shared = shared
        self._check = check

    def next(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The open item of an annotator, or a new one, and how far they are.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        only_known(fields, "annotator")
        annotator = annotator_name(fields)
        if self._check is not None:
            self._check.look()
        answer = self._store.assign(annotator, self._shared)
        while answer is not None and self._check is not None and not self._check.fits(answer):
            answer = self._store.assign(annotator, self._shared)
        return {"item": None if answer is None else self._shown(answer), "progress": self._progress(annotator)}

    def label(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a label of the annotator's open item. It replaces the imported labels that it refines.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        only_known(fields, "annotator", "item", "verdict", "error", "note", "seconds")
        verdict, error = verdict_field(fields), span_field(fields)
        annotator, item = annotator_name(fields), text_field(fields, "item")
        note, seconds = text_field(fields, "note", ""), seconds_field(fields)
        if error is not None:
            check_covers_a_piece(self._store.answer(item), error, self._cutter)
        replaces = () if verdict == "unplaced" else self._refined(item, annotator)
        label = Label(verdict, annotator, "person", error, note=note, replaces=replaces)
        entry = self._store.annotate(item, label, seconds, assigned=True)
        return {"entry": entry, "progress": self._progress(annotator)}

    def skip(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the annotator's open item back.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        only_known(fields, "annotator", "item", "reason")
        reason = text_field(fields, "reason", "").strip() or "skipped"
        annotator = annotator_name(fields)
        self._store.release(text_field(fields, "item"), annotator, reason)
        return {"progress": self._progress(annotator)}

    def undo(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the annotator's last label back. The reply holds what it said.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        only_known(fields, "annotator", "entry")
        annotator, number = annotator_name(fields), entry_field(fields)
        item = self._store.undo(annotator, number)
        label = _undone_label(self._store.history(item), number)
        return {"item": item, "label": label, "progress": self._progress(annotator)}

    def _refined(self, item: str, annotator: str) -> tuple[str, ...]:
        """Whose labels no longer count once a person has said what is wrong; those without a place are nobody's refinement."""
        imported = self._store.imported(item)
        names = {label.labelled_by for label in imported if label.verdict != "unplaced"}
        return tuple(sorted(names - {annotator}))

    def _progress(self, annotator: str) -> dict[str, Any]:
        num_withheld = 0 if self._check is None else len(self._check.left_out)
        return asdict(self._store.progress(annotator, self._shared)) | {"num_withheld": num_withheld}

    def _shown(self, answer: Answer) -> dict[str, Any]:
        imported = self._store.imported(answer.id)
        return shown_answer(answer, self._cutter) | {"imported": shown_imports(answer, imported, self._cutter)}


def check_covers_a_piece(answer: Answer, error: Span, cutter: Cutter) -> None:
    """Checks that a person could have marked an error.

    Args:
        answer: that it is in.
        error: its span.
        cutter: what the answer is cut into.

    Raises:
        BadRequest: it covers no piece.
    """
    pieces, cut = cutter.pieces(answer)
    inside = 0 <= error[0] < error[1] <= len(answer.response)  # if not, the store says so
    if inside and not any(max(start, error[0]) < min(end, error[1]) for start, end in pieces):
        raise BadRequest(f"error is {list(error)}; it covers none of the {cut}; mark at least one of them")


def _undone_label(history: list[LogEntry], number: int) -> dict[str, Any] | None:
    label = next((entry.label for entry in history if entry.number == number), None)
    return None if label is None else shown_label(label)
