"""What a file of labels does not say of itself and its reader has to: source, licence, model, who labelled.

Owns how these enter an answer. Knows nothing of formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.data.formats import Message
from draftsmith.label.schema import Answer, How, Label, Span, answer_id, check_messages, refusal


class LeftOut(ValueError):
    """A row that gives no answer, through no fault of its own; the message is the reason."""


@dataclass(frozen=True)
class Origin:
    """Stands in where a row is silent. `licence` and `model` are None where the user has named none."""

    source: str
    labelled_by: str
    licence: str | None = None
    model: str | None = None

    def label(self, how: How, error: Span | None, checked: Span | None = None, labelled_by: str | None = None) -> Label:
        """A label that is wrong where there is an error span, else correct."""
        return Label("correct" if error is None else "wrong", labelled_by or self.labelled_by, how, error, checked)

    def answer(
        self,
        prompt: str | Sequence[Message] | Any,
        response: str,
        label: Label | None,
        place: str,
        model: str | None = None,
        licence: str | None = None,
    ) -> Answer:
        """An answer to `prompt` (one question, or messages), with what the row says before what the user says.

        Raises ValueError: nobody has told the licence, or the question is no text.
        """
        licence = licence or self.licence
        if not licence:
            raise ValueError(
                f"{place}: the licence is not in the file; it goes with every answer; give it with --licence"
            )
        if isinstance(prompt, str):
            prompt = [Message(role="user", content=prompt)]
        if not isinstance(prompt, Sequence):
            raise refusal(place, "the question", prompt, "it is text", "correct it")
        check_messages(prompt, place)
        messages = tuple(prompt)
        writer = model or self.model or "unknown"
        return Answer(
            id=answer_id(self.source, messages, response, writer),
            messages=messages,
            response=response,
            model=writer,
            licence=licence,
            source=self.source,
            label=label,
        )
