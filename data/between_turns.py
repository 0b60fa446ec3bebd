"""Between one reply and the next turn: what the template writes there, and where a template rewrites earlier turns.

Owns the rule for end marks, and when a conversation must be read anew. Does not know: engines, files, masks.

The rule. A reply's own ids are never changed. A reply that ended by itself brings its end mark along, whichever end token it is. Behind
it follows what the template writes behind the end mark of a turn. A reply cut short (by length or a stop string) gets the template's whole
closing.

The template's end mark is the first token behind a turn's content, white space aside, under two conditions. It is a special token, and
the template closes the last turn of a conversation with it or with an end token. Example: gpt-oss writes `<|end|>` between turns and
`<|return|>` behind the last. Where the template leaves the last turn open, the end mark is an end token that does not come before the
user's first text. A token that opens the next turn and also ends replies (GLM-4's `<|user|>`) is left out only where the reply ended with
it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from draftsmith.data.chats.messages import Message, is_blank_system
from draftsmith.models.target.prompt_template import PromptTemplate, encoded
from draftsmith.models.target.template_fields import TemplateRefusal

# Stands for a reply while a conversation is rendered; plain small letters, which no template trims, escapes or puts in another case.
_SENTINEL = "draftsmithreplygoeshere"
_PLAIN_REPLY = Message(role="assistant", content=_SENTINEL)


class BetweenTurns:
    """What one template writes between a reply and the turn that follows it.

    Args:
        template: the template.
    """

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template

    def ids(self, asked: Sequence[Message], reply_ids: Sequence[int], following: Sequence[Message]) -> list[int]:
        """Encode what lies between a reply and the next one.

        Args:
            asked: the messages before the reply.
            reply_ids: the reply, its end token included.
            following: the user's next turn.

        Returns:
            Token ids.

        Raises:
            ValueError: the template shows the reply not exactly once, or fails.
        """
        template = self._template
        if template.text is None:
            spoken = [message["content"] for message in following if not is_blank_system(message)]
            return encoded(template.tokenizer, "\n" + "\n".join(spoken), special=False)
        ids = self._behind_reply(asked, following)
        if not reply_ids or reply_ids[-1] not in template.eos_ids:
            return ids
        return self._without_end_mark(ids, reply_ids[-1])

    def _without_end_mark(self, ids: list[int], ended_by: int) -> list[int]:
        """What the template writes behind a turn, less its end mark and the white space before it.

        Worked example, end tokens `<e>` and `<x>`: of `\\n <e> \\n <u>` remains `\\n <u>`, whether the reply ended by `<e>` or `<x>`.
        """
        place = self._first_visible(ids)
        if place is None:
            return ids
        mark = ids[place]
        is_mark = mark == ended_by or (self._is_special(mark) and self._closes_turns(mark))
        return ids[place + 1 :] if is_mark else ids

    def _closes_turns(self, mark: int) -> bool:
        """Whether a special token behind a turn's content is its end mark, and does not open the next turn."""
        if self._last_mark is None:
            return mark in self._template.eos_ids and mark not in self._before_first_turn
        return self._last_mark in {mark, *self._template.eos_ids}

    @functools.cached_property
    def _before_first_turn(self) -> list[int]:
        """What the template writes before the user's first text."""
        asked = Message(role="user", content=_SENTINEL)
        return self._template.rendered_ids(
            self._template.render([asked], add_generation_prompt=True).split(_SENTINEL)[0]
        )

    @functools.cached_property
    def _last_mark(self) -> int | None:
        """The first token that the template writes behind the last reply of a conversation, white space aside."""
        ids = self._behind_reply([Message(role="user", content="-")])
        place = self._first_visible(ids)
        return None if place is None else ids[place]

    def _behind_reply(self, asked: Sequence[Message], following: Sequence[Message] = ()) -> list[int]:
        head, tail = around_reply(self._template, asked, following)
        rendered = head + _SENTINEL + tail
        return self._template.ids_from(rendered, len(rendered) - len(tail))

    def _first_visible(self, ids: Sequence[int]) -> int | None:
        """The first token that is more than white space."""
        for index, token in enumerate(ids):
            if self._is_special(token) or str(self._template.tokenizer.decode([token])).strip():
                return index
        return None

    def _is_special(self, token: int) -> bool:
        return token in self._template.eos_ids or token in self._template.tokenizer.added_tokens_decoder


class History:
    """A conversation as its template renders it while it grows.

    Args:
        template: the template.
        asked: the messages before the first reply.

    Raises:
        TemplateRefusal: the template fails on these messages.
    """

    def __init__(self, template: PromptTemplate, asked: Sequence[Message]) -> None:
        self._template = template
        self._between = BetweenTurns(template)
        self._messages = list(asked)
        # None once the template has failed on a reply: then nobody can tell what it would make of the turns before.
        self._text: str | None = "" if template.text is None else template.render(asked, add_generation_prompt=True)

    def next_prompt_ids(
        self, prompt_ids: Sequence[int], reply_ids: Sequence[int], following: Sequence[Message]
    ) -> list[int]:
        """Encode what the target reads before its next reply.

        The ids begin with `prompt_ids + reply_ids`. The one exception is a template that shows earlier turns otherwise, now that more
        follows. Then they are the whole conversation as it renders it. Where the template fails on a reply, such as an empty one, the ids
        continue what the target read and said, behind what the template writes for a reply of plain words.

        Args:
            prompt_ids: what the target read before its latest reply.
            reply_ids: that reply, its end token included.
            following: the user's next turn.

        Returns:
            Token ids.

        Raises:
            ValueError: the template shows a reply not exactly once, or fails on replies of plain words (see `check_turns`).
        """
        grown = [*prompt_ids, *reply_ids, *self._between_ids(reply_ids, following)]
        if self._template.text is None:
            return grown
        before = self._text
        if before is None:
            self._messages += [_PLAIN_REPLY, *following]
            return grown
        said, header = self._said(prompt_ids, reply_ids), self._written_before_reply(before)
        reply = Message(role="assistant", content=said.removeprefix(header))
        self._messages += [reply, *following]
        try:
            self._text = self._template.render(self._messages, add_generation_prompt=True)
        except TemplateRefusal:
            self._forget_replies()
            return grown
        # A header that the template writes and the target did not say leaves the target's words unchanged.
        as_said = (before + said, before + header + reply["content"])
        if self._text.startswith(as_said):
            return grown
        anew = self._template.rendered_ids(self._text)
        # A tokenizer may drop white space: then a text that differs in nothing else is the same ids.
        read = [self._template.rendered_ids(text) for text in as_said]
        return grown if any(anew[: len(ids)] == ids for ids in read) else anew

    def replaced_prompt_ids(self, following: Sequence[Message]) -> list[int] | None:
        """Encode what the target reads before its next reply, where the data set's own call replaces its latest one.

        Args:
            following: the data set's call, and what the tools gave back.

        Returns:
            The whole conversation as the template renders it; None where the template failed on an earlier reply.
        """
        if self._text is None:
            return None
        self._messages += following
        self._text = self._template.render(self._messages, add_generation_prompt=True)
        return self._template.rendered_ids(self._text)

    def _between_ids(self, reply_ids: Sequence[int], following: Sequence[Message]) -> list[int]:
        """What lies between the latest reply and the next one."""
        try:
            return self._between.ids(self._messages, reply_ids, following)
        except TemplateRefusal:
            self._forget_replies()
            return self._between.ids(self._messages, reply_ids, following)

    def _forget_replies(self) -> None:
        """Let plain words take the place of all replies, since the template fails on one."""
        self._messages = [_PLAIN_REPLY if message["role"] == "assistant" else message for message in self._messages]
        self._text = None

    def _said(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> str:
        """The reply's text without its end token, as it reads behind the prompt: some tokenizers write a first word otherwise."""
        ended = bool(reply_ids) and reply_ids[-1] in self._template.eos_ids
        whole = self._decoded([*prompt_ids, *(reply_ids[:-1] if ended else reply_ids)])
        return whole.removeprefix(self._decoded(prompt_ids))

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self._template.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _written_before_reply(self, prompt: str) -> str:
        """What the template writes between the prompt's text and a reply's content, in place of the target."""
        shown, _ = around_reply(self._template, self._messages)
        return shown.removeprefix(prompt) if shown.startswith(prompt) else ""


def check_turns(template: PromptTemplate, turns: Sequence[Sequence[Message]]) -> None:
    """Check that a template writes all turns of a conversation whose replies are not there yet.

    Args:
        template: the template.
        turns: the messages before each reply.

    Raises:
        ValueError: the template shows a reply not exactly once, or fails.
    """
    asked: list[Message] = []
    for number, turn in enumerate(turns):
        if replaces_reply(turn):
            if template.text is None:
                raise ValueError(
                    "a tool's answer follows, and plain text shows no turns; give a template with --template"
                )
            template.render([*asked, *turn], add_generation_prompt=True)
        elif number and template.text is not None:
            around_reply(template, asked, turn)
            asked.append(_PLAIN_REPLY)
        asked += turn
    template.fields.shown(asked)
    template.check_shown_roles(asked)


def replaces_reply(turn: Sequence[Message]) -> bool:
    """Whether a turn begins with a call of the data set, which takes the place of the target's own reply before it.

    Args:
        turn: the messages before a reply.

    Returns:
        True where it does: the tool answered that call, whatever the target replied.
    """
    return turn[0]["role"] == "assistant"


def around_reply(
    template: PromptTemplate, asked: Sequence[Message], following: Sequence[Message] = (), thought: str | None = None
) -> tuple[str, str]:
    """Render the text before and behind a reply.

    Args:
        template: the template.
        asked: the messages before the reply.
        following: the user's next turn; the prompt of the next reply then ends the text.
        thought: of the reply, which then belongs to the text before it.

    Returns:
        The text before the reply, and the text behind it.

    Raises:
        ValueError: the template shows the reply not exactly once, or fails.
    """
    said = str([*asked, *following])
    mark = _SENTINEL
    if mark in said.lower():
        mark += hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()
    reply = Message(role="assistant", content=mark)
    if thought is not None:
        reply["reasoning_content"] = thought
    head, *tails = template.render([*asked, reply, *following], add_generation_prompt=bool(following)).split(mark)
    if len(tails) != 1:
        raise ValueError("the chat template does not show an assistant turn exactly once; give another with --template")
    return head, tails[0]
