"""What a chat template shows of messages: which of their fields, parts and variables it reads.

Owns: the form in which messages reach a template, and the refusal of what it would leave out in silence. Does not know: tokenizers, which
template counts, replies.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

# What a message may hold for a template to show; everything else of it is for us.
_SHOWN_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
# What templates call a thought; each gets it by the name that it reads.
_THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning")
# A thought as a part of the content, as Magistral's templates take it.
_THOUGHT_TYPE = "thinking"
# What clients and templates call a part of one kind: servers of OpenAI's interface take the second name, templates mostly read the first.
_PART_NAMES = (("image", "image_url"), ("audio", "audio_url", "input_audio"), ("video", "video_url"))
PROBE = "draftsmithprobe"
"""A word that no template changes, to see what it does with text."""
# What a template may raise on messages that it was not written for.
RENDERING_ERRORS = (jinja2.TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, ValueError)


class TemplateRefusal(ValueError):
    """A chat template that fails on messages: they break its rules, or it has a mistake."""


class TemplateFields:
    """What one template reads.

    Args:
        text: the template; None for plain text.
        render: renders messages in the template's own form.
    """

    def __init__(self, text: str | None, render: Callable[[list[dict[str, Any]]], str]) -> None:
        self._text = text or ""
        self._render = render
        self._parts_shown: dict[str, bool] = {}
        self._thought_forms: dict[str, _ThoughtForm | None] = {}
        self.reader = "plain text" if text is None else "the chat template"

    @functools.cached_property
    def thought_names(self) -> tuple[str, ...]:
        """The names under which the template reads a thought; none where it reads no thought."""
        return tuple(name for name in _THOUGHT_NAMES if self._reads_field(name))

    def reads_variable(self, name: str) -> bool:
        """Whether a name occurs in the template.

        Args:
            name: of a variable.

        Returns:
            True where it occurs as a word.
        """
        return re.search(rf"\b{re.escape(name)}\b", self._text) is not None

    def _reads_field(self, name: str) -> bool:
        return re.search(rf"""[.'"]{name}\b""", self._text) is not None

    def shown(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Give messages the form that the template reads.

        Args:
            messages: with further fields of ours.

        Returns:
            The messages as the template gets them: parts as content, parts and a thought by the names that the template reads. A thought is
            a part of the content where the template shows it there alone.

        Raises:
            TemplateRefusal: a message holds what the template does not show.
        """
        shown = []
        for number, message in enumerate(messages):
            self._check(message, number)
            fields = {name: message[name] for name in _SHOWN_FIELDS if name in message}
            if "parts" in message:
                fields["content"] = [self._shown_part(part, message["role"]) for part in message["parts"]]
            if "tool_calls" in message:
                fields["tool_calls"] = self._shown_calls(message["tool_calls"])
            if "reasoning_content" in message:
                fields |= self._shown_thought(message)
            shown.append(fields)
        return shown

    def _check(self, message: Mapping[str, Any], number: int) -> None:
        if "reasoning_content" in message and not self.thought_names:
            raise TemplateRefusal(f"turn {number} has a thought, and {self.reader} does not read reasoning_content")
        if "tool_calls" in message and not self._reads_field("tool_calls"):
            raise TemplateRefusal(f"turn {number} has tool_calls, and {self.reader} does not read them")
        for part in message.get("parts", ()):
            if part["type"] == _THOUGHT_TYPE:
                if self._thought_form(message["role"]) is None:
                    raise TemplateRefusal(
                        f"turn {number} is the {message['role']}'s and has a part of the type {_THOUGHT_TYPE!r}, and {self.reader} does "
                        "not show it"
                    )
            elif part["type"] != "text" and self._part_name(part["type"]) is None:
                raise TemplateRefusal(
                    f"turn {number} has a part of the type {part['type']!r}, and {self.reader} does not show it: this target reads text "
                    "alone; name a multimodal target, or remove the part"
                )

    def _shown_calls(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Calls with their arguments in the form that the template shows."""
        given = []
        for call in calls:
            function = dict(call["function"])
            if self._arguments_are_text:
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            given.append({**call, "function": function})
        return given

    @functools.cached_property
    def _arguments_are_text(self) -> bool:
        """Whether the template fails on arguments that are an object, and shows those that are JSON text."""
        for as_text in (False, True):
            function = {"name": PROBE, "arguments": json.dumps({PROBE: 1}) if as_text else {PROBE: 1}}
            call = {"id": "draftsmit", "type": "function", "function": function}
            turns: list[dict[str, Any]] = [
                {"role": "user", "content": "-"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            with contextlib.suppress(TemplateRefusal):
                self._render(turns)
                return as_text
        return False

    def _shown_thought(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a turn with a thought: the thought's own, or the content with the thought as a part of it."""
        thought, words = message["reasoning_content"], message["content"]
        form = None if self._shows_thought_field else self._thought_form(message["role"])
        if form is None:
            return dict.fromkeys(self.thought_names, thought)
        texts = [{"type": "text", "text": words}] if words else []
        return {"content": [{"type": _THOUGHT_TYPE, _THOUGHT_TYPE: form(thought)}, *texts]}

    @functools.cached_property
    def _shows_thought_field(self) -> bool:
        """Whether the template shows a thought that lies in a field of its own."""
        reply = {"role": "assistant", "content": "-", **dict.fromkeys(self.thought_names, PROBE)}
        return self._shows_probe([{"role": "user", "content": "-"}, reply])

    def _thought_form(self, role: str) -> _ThoughtForm | None:
        """How the template takes a thought that is a part of a turn's content: as a text, or as a list of texts; None for neither."""
        if role not in self._thought_forms:
            forms = _THOUGHT_FORMS if self._reads_field(_THOUGHT_TYPE) else ()
            self._thought_forms[role] = next((form for form in forms if self._shows_thought_part(role, form)), None)
        return self._thought_forms[role]

    def _shows_thought_part(self, role: str, form: _ThoughtForm) -> bool:
        content = [{"type": _THOUGHT_TYPE, _THOUGHT_TYPE: form(PROBE)}, {"type": "text", "text": "-"}]
        turn, asked = {"role": role, "content": content}, {"role": "user", "content": "-"}
        return self._shows_probe([turn, asked] if role == "system" else [asked, turn])

    def _shows_probe(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the template shows a word of these messages, and not the list around it."""
        try:
            written = self._render(messages)
        except TemplateRefusal:
            return False
        return PROBE in written and not _shows_list(written)

    def _shown_part(self, part: Mapping[str, Any], role: str) -> Mapping[str, Any]:
        """A part by the name that the template reads."""
        kind = part["type"]
        form = self._thought_form(role) if kind == _THOUGHT_TYPE else None
        if form is not None:
            return {"type": kind, kind: form(part[kind])}
        name = kind if kind == "text" else self._part_name(kind)
        if name is None or name == kind:
            return part
        rest = {field: value for field, value in part.items() if field != "type"}
        return {"type": name} | {name if field == kind else field: value for field, value in rest.items()}

    def _part_name(self, kind: str) -> str | None:
        """The name under which the template shows a part of a type, its own first; None where it shows none."""
        others = next((names for names in _PART_NAMES if kind in names), ())
        return next((name for name in (kind, *others) if self._shows_part(name)), None)

    def _shows_part(self, kind: str) -> bool:
        """Whether a part of a type changes what the template writes, and the text beside it is still read as text."""
        if kind not in self._parts_shown:
            text = {"type": "text", "text": PROBE}
            contents = [text], [text, {"type": kind, kind: {"url": "-"}}]
            try:
                alone, beside = (self._render([{"role": "user", "content": content}]) for content in contents)
            except TemplateRefusal:
                alone = beside = ""
            as_list = _shows_list(alone) or _shows_list(beside)
            self._parts_shown[kind] = alone != beside and PROBE in beside and not as_list
        return self._parts_shown[kind]


def _shows_list(written: str) -> bool:
    """Whether a template for text alone has written a list as Python or JSON shows it."""
    return "'type'" in written or '"type"' in written


def _as_text(thought: str) -> str:
    return thought


def _as_texts(thought: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": thought}]


_ThoughtForm = Callable[[str], str | list[dict[str, str]]]
_THOUGHT_FORMS: tuple[_ThoughtForm, ...] = (_as_text, _as_texts)


def refusal(messages: Sequence[Mapping[str, Any]], error: Exception) -> TemplateRefusal:
    """Make the error of a template that fails on messages.

    Args:
        messages: with a ``role`` each.
        error: what the template raised.

    Returns:
        The error, to be raised.
    """
    roles = [message["role"] for message in messages]
    return TemplateRefusal(
        f"the chat template fails on turns {roles}: {error}; change the data or give another with --template"
    )
