"""Where thoughts and tool calls lie in a reply's token ids, by the marks that the chat template writes around them.

Owns: finding the marks of a template, and the kind of each token of a reply that was generated. Does not know: rows, masks, files.
"""

import contextlib
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith.data.chats.token_kinds import Kind
from draftsmith.models.target.prompt_template import NO_OPTIONS, PromptTemplate, TemplateOptions, template_in_use
from draftsmith.models.target.template_fields import PROBE, TemplateRefusal

_INNER, _ARGUMENT = "draftsmithinner", "draftsmithargument"
# Mistral's templates want ids of nine letters.
_CALL = {"id": "draftsmit", "type": "function", "function": {"name": _INNER, "arguments": {_ARGUMENT: 1}}}
# What no words begin with by chance, such as <tool_call> or [TOOL_CALLS]; [ and {"name": are no such mark.
_SURE_MARK = re.compile(r"<[^<>]*[^\W\d_][^<>]*>|\[[^\[\]{}\"']*[^\W\d_][^\[\]{}\"']*\]")
_NAME = r"[\w.-]+"
_USUAL_START, _USUAL_END = "<think>", "</think>"
# A prompt shows within its last tokens whether it opens a thought.
_PROMPT_END = 16


class ReplyMarks:
    """The marks of one template.

    Args:
        template: the template.

    Attributes:
        thought_start: what a reply writes before a thought; empty where the template shows none, or the prompt writes it.
        thought_end: what is written behind it.
        call_start: what a tool call begins with; empty where the template shows none.
        is_sure: words do not begin so. A mark like `[` or `{"name":` tells a call only with a name and what the template writes behind it.
    """

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template
        self.thought_start = self.thought_end = self.call_start = self._call_before = self._call_behind = ""
        self.is_sure = False
        if template.text is None:
            return
        if template.fields.thought_names:
            self.thought_start, self.thought_end = self._around({"reasoning_content": _INNER})
        elif _USUAL_END in template.text:  # such a template takes thoughts out of the words
            self.thought_start, self.thought_end = _USUAL_START, _USUAL_END
        before, behind = self._around({"tool_calls": [_CALL]}, behind_words=True)
        self.call_start = before.split()[0] if before.split() else ""
        self.is_sure = not self.call_start.startswith("{") and _SURE_MARK.search(self.call_start) is not None
        # Up to the first argument, and there may be none.
        self._call_before, self._call_behind = before, behind.partition(_ARGUMENT)[0].rstrip("\\\"' \n")

    def _around(self, extra: Mapping[str, Any], behind_words: bool = False) -> tuple[str, str]:
        """What the template writes before and behind `_INNER` in a reply: between it and the words, or the prompt's end."""
        template, asked = self._template, [{"role": "user", "content": "-"}]
        with contextlib.suppress(TemplateRefusal):
            prompt = template.render(asked, add_generation_prompt=True)
            reply = {"role": "assistant", "content": PROBE, **extra}
            written = template.render([*asked, reply], add_generation_prompt=False)
            before, inner, behind = written.partition(_INNER)
            # A prompt that opens or closes a thought itself leaves no more to write before one.
            before = before.removeprefix(prompt) if before.startswith(prompt) else ""
            if inner:
                return (before.rpartition(PROBE)[2] if behind_words else before).strip(), behind.partition(PROBE)[
                    0
                ].strip()
        return "", ""

    def kinds(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> bytes:
        """Tell the kind of each token of a reply.

        A thought that the prompt has opened, or that the reply opens itself, lasts until its end mark. An empty one is no thought. A call
        lasts until the reply's end.

        Args:
            prompt_ids: what the target read.
            reply_ids: what it replied.

        Returns:
            A `Kind` for each token of the reply.
        """
        text = self._decoded(reply_ids)
        thought = self.thought_length(text, self._decoded(prompt_ids[-_PROMPT_END:]))
        call = self.call_place(text, thought)
        first_words = self._num_tokens(reply_ids, thought)
        first_call = len(reply_ids) if call < 0 else self._num_tokens(reply_ids, call, whole=False)
        lengths = (first_words, max(0, first_call - first_words), len(reply_ids) - max(first_words, first_call))
        kinds = zip((Kind.THOUGHT, Kind.REPLY, Kind.TOOL_CALL), lengths, strict=True)
        return b"".join(bytes([kind]) * length for kind, length in kinds)

    def asks_for_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt leaves room for a thought: the template knows thoughts, and the prompt does not supply an empty one.

        Args:
            prompt_ids: what the target reads.

        Returns:
            True where the reply may think.
        """
        end = self._decoded(prompt_ids[-_PROMPT_END:]).rstrip()
        return bool(self.thought_end) and not end.endswith(self.thought_end)

    def thought_length(self, text: str, prompt: str) -> int:
        """Find the thought that a reply begins with.

        Args:
            text: the reply.
            prompt: the end of what the target read.

        Returns:
            Characters of the thought, marks included; 0 without one.
        """
        if not self.thought_end:
            return 0
        start = self.thought_start
        thought, end, _ = text.partition(self.thought_end)
        opened = text.lstrip().startswith(start) if start else bool(end)
        if not opened and not prompt.rstrip().endswith(start or "\0"):
            return 0
        return len(thought) + len(end) if thought.strip().removeprefix(start).strip() else 0

    def call_place(self, text: str, first: int, names: Collection[str] = ()) -> int:
        """Find the first tool call of a reply.

        Example: where a template writes `[weather(city="Oslo")]`, there is a call in that text, and none in `[weather](https://...)`.

        Args:
            text: the reply.
            first: number of the character to begin at.
            names: of the tools; a mark that is not sure tells a call of theirs alone. Without them, any name will do.

        Returns:
            Number of the call's first character; -1 where there is none.
        """
        if self.is_sure or not self._call_before:
            return text.find(self.call_start, first) if self.call_start else -1
        name = "|".join(map(re.escape, names)) if names else _NAME
        call = re.compile(f"{_spaced(self._call_before)}(?:{name}){_spaced(self._call_behind)}").search(text, first)
        return call.start() if call and self._call_behind else -1

    def _num_tokens(self, ids: Sequence[int], characters: int, whole: bool = True) -> int:
        """How many tokens cover so many characters; with `whole` False, without the token that only begins in them."""
        if characters == 0:
            return 0
        covered = bisect_left(range(len(ids) + 1), characters, key=lambda count: len(self._decoded(ids[:count])))
        if not whole and covered and len(self._decoded(ids[:covered])) > characters:
            return covered - 1
        return covered

    def _decoded(self, ids: Sequence[int]) -> str:
        tokenizer = self._template.tokenizer
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _spaced(written: str) -> str:
    """A pattern for what a template writes, with any space between its words and signs."""
    return r"\s*".join(re.escape(piece) for piece in re.findall(r"\w+|[^\w\s]", written)) + r"\s*"


def marks_of(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, options: TemplateOptions = NO_OPTIONS
) -> ReplyMarks:
    """Find the marks of the template in use; a tokenizer without one has none.

    Args:
        tokenizer: the target's.
        template: the path of a Jinja file, or "none"; None for the tokenizer's own.
        options: the template's name and its variables.

    Returns:
        The marks.

    Raises:
        ValueError: as `PromptTemplate`.
    """
    return ReplyMarks(template_in_use(tokenizer, template, options))
