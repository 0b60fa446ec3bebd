"""What a file of labels does not say of itself: source, licence, model, who labelled. The user says it instead.

Owns how these enter an answer. Knows nothing of formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.data.chats.messages import Message
from draftsmith.label.schema import Answer, How, Label, Span, Verdict, answer_id, check_messages, refusal


class SkippedRow(ValueError):
    """A row that gives no answer, through no fault of its own; the message is the reason."""


@dataclass(frozen=True)
class LabelSource:
    """What counts where a row says nothing.

    Attributes:
        source: of the answers.
        labelled_by: who labelled.
        licence: of the source; None where the user has named none.
        model: that wrote the answers; None likewise.
        how: who or what found the labels, against what the format says; None leaves it to the format.
    """

    source: str
    labelled_by: str
    licence: str | None = None
    model: str | None = None
    how: How | None = None

    def label(self, how: How, error: Span | None, checked: Span | None = None, labelled_by: str | None = None) -> Label:
        """A label that is wrong where there is an error span, else correct.

        Args:
            how: who or what found it.
            error: span of the first error, or None.
            checked: the part that the label speaks of; None for all.
            labelled_by: who labelled, if the row says it.
        """
        verdict: Verdict = "correct" if error is None else "wrong"
        return Label(verdict, labelled_by or self.labelled_by, self.how or how, error, checked)

    def unplaced(self, how: How) -> Label:
        """The label of an answer that is wrong, nobody has said where.

        Args:
            how: who or what found it.
        """
        return Label("unplaced", self.labelled_by, self.how or how)

    def answer(
        self,
        prompt: str | Sequence[Message] | Any,
        response: str,
        label: Label | None,
        place: str,
        model: str | None = None,
        licence: str | None = None,
    ) -> Answer:
        """An answer, with what the row says before what the user says.

        Args:
            prompt: one question, or messages.
            response: the answer's text.
            label: or None.
            place: of the row, for messages.
            model: that wrote it, if the row says it.
            licence: of the source, if the row says it.

        Raises:
            ValueError: no licence is known, or the question is no text.
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
