"""An answer as the page gets it: its pieces, its formulas, and what imported labels say of it.

Owns these JSON objects. Text goes as text. Knows nothing of who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from draftsmith.data.chats.messages import Message
from draftsmith.label.page.latex import blocks
from draftsmith.label.page.markable_spans import Cutter, segments
from draftsmith.label.schema import Answer, Label, Span
from draftsmith.label.steps import is_step, refinements

_LONGEST_NAME = 200  # characters of a path or an address


def shown_answer(answer: Answer, cutter: Cutter) -> dict[str, Any]:
    """What the page shows of an answer.

    Args:
        answer: with or without a reference.
        cutter: what it is cut into.
    """
    pieces, cut = cutter.pieces(answer)
    return {
        "id": answer.id,
        "source": answer.source,
        "messages": [_shown_turn(message) for message in answer.messages],
        "cut": cut,
        "segments": [[segment.text, *(segment.span or ())] for segment in segments(answer.response, pieces)],
        "blocks": blocks(answer.response),
        "reference": None
        if answer.reference is None
        else {"text": answer.reference, "blocks": blocks(answer.reference)},
    }


def _shown_turn(message: Message) -> dict[str, Any]:
    """A turn of the prompt. Pictures and sounds are named, not shown: the page loads nothing from elsewhere."""
    text = message["content"]
    shown: dict[str, Any] = {"role": message["role"], "content": text, "blocks": blocks(text)}
    if "parts" in message:
        shown["others"] = [_part_name(part) for part in message["parts"] if part["type"] != "text"]
    return shown


def _part_name(part: Mapping[str, Any]) -> str:
    """The type of a part, and its path or address where it has a short one: `image a/1.png`."""
    values = [
        value.get("url") if isinstance(value, Mapping) else value for name, value in part.items() if name != "type"
    ]
    named = (value for value in values if isinstance(value, str) and not value.startswith("data:"))
    return " ".join([part["type"], next(named, "")[:_LONGEST_NAME]]).strip()


def shown_imports(answer: Answer, imported: Sequence[Label], cutter: Cutter) -> list[dict[str, Any]]:
    """What imported labels say, and what of a wrong step may be meant.

    Args:
        answer: that they speak of.
        imported: labels that leave something to find out.
        cutter: what the answer is cut into.
    """
    pieces, _ = cutter.pieces(answer)
    return [
        shown_label(label) | {"steps": None if label.error is None else _steps(answer.response, label.error, pieces)}
        for label in imported
    ]


def shown_label(label: Label) -> dict[str, Any]:
    """What the page shows of a label.

    Args:
        label: of anybody.
    """
    return {"by": label.labelled_by, "verdict": label.verdict, "error": label.error, "note": label.note}


def _steps(response: str, error: Span, pieces: Sequence[Span]) -> dict[str, Any] | None:
    found_steps = refinements(response, error, pieces) if is_step(response, error) else None
    return None if found_steps is None else asdict(found_steps)
