"""Between one reply and the next turn: what the template writes there, and where a template rewrites what was said before.

Owns the rule for end marks, and when a conversation must be read anew. Does not know: engines, files, masks.

The rule. A reply's own ids are never changed. A reply that ended by itself brings its end mark along, whichever end token it is: behind it
comes what the template writes behind the end mark of a turn. A reply cut short (by length or a stop string) gets the template's whole
closing. The template's end mark is the first token behind a turn's content, white space aside, if it is a special token and the template
closes the last turn of a conversation with it or with an end token: gpt-oss writes `<|end|>` between turns, `<|return|>` behind the last.
A token that opens the next turn and also ends replies (GLM-4's `<|user|>`) is left out only where the reply ended with it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from draftsmith.data.formats import Message
from draftsmith.models.prompt_template import PromptTemplate, TemplateRefusal, encoded

# Stands for a reply while a conversation is rendered; plain letters, which no template trims or escapes.
SENTINEL = "draftsmithreplygoeshere"
_MARKED = Message(role="assistant", content=SENTINEL)


class Seams:
    """What one template writes between a reply and the turn that follows it."""

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template

    def ids(self, asked: Sequence[Message], reply_ids: Sequence[int], following: Sequence[Message]) -> list[int]:
        """Ids between a reply to `asked` and the next reply, `following` being the user's next turn.

        Raises:
            ValueError: the template shows the reply not exactly once, or fails.
        """
        template = self._template
        if template.text is None:
            return encoded(template.tokenizer, "\n" + "\n".join(m["content"] for m in following), special=False)
        ids = self._behind_reply(template._render([*asked, _MARKED, *following], add_generation_prompt=True))
        if not reply_ids or reply_ids[-1] not in template.eos_ids:
            return ids
        return self._without_end_mark(ids, reply_ids[-1])

    def _without_end_mark(self, ids: list[int], ended_by: int) -> list[int]:
        """What the template writes behind a turn, less its end mark and the white space before it.

        Worked example, end tokens `<e>` and `<x>`: of `\\n <e> \\n <u>` is left `\\n <u>`, whether the reply ended by `<e>` or `<x>`.
        """
        place = self._first_visible(ids)
        if place is None:
            return ids
        mark = ids[place]
        is_mark = mark == ended_by or (
            self._is_special(mark)
            and self._last_mark is not None
            and self._last_mark in {mark, *self._template.eos_ids}
        )
        return ids[place + 1 :] if is_mark else ids

    @functools.cached_property
    def _last_mark(self) -> int | None:
        """The first token that the template writes behind the last reply of a conversation, white space aside."""
        asked = Message(role="user", content="-")
        ids = self._behind_reply(self._template._render([asked, _MARKED], add_generation_prompt=False))
        place = self._first_visible(ids)
        return None if place is None else ids[place]

    def _behind_reply(self, rendered: str) -> list[int]:
        _, tail = around_sentinel(rendered)
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
    """

    def __init__(self, template: PromptTemplate, asked: Sequence[Message]) -> None:
        self._template = template
        self._seams = Seams(template)
        self._messages = list(asked)
        self._text = "" if template.text is None else template._render(asked, add_generation_prompt=True)

    def next_prompt_ids(
        self, prompt_ids: Sequence[int], reply_ids: Sequence[int], following: Sequence[Message]
    ) -> list[int]:
        """What the target reads before its next reply.

        They begin with `prompt_ids + reply_ids`, unless the template shows what was read and said otherwise now that more follows: then
        they are the whole conversation as it renders it.

        Args:
            prompt_ids: what the target read before its latest reply.
            reply_ids: that reply, its end token included.
            following: the user's next turn.
        """
        grown = [*prompt_ids, *reply_ids, *self._seams.ids(self._messages, reply_ids, following)]
        if self._template.text is None:
            return grown
        before, said, header = self._text, self._said(prompt_ids, reply_ids), self._written_before_reply()
        reply = Message(role="assistant", content=said.removeprefix(header))
        self._messages += [reply, *following]
        try:
            self._text = self._template._render(self._messages, add_generation_prompt=True)
        except TemplateRefusal:  # of an empty reply, say: nobody can tell what it would make of the turns before
            return grown
        # A header that the template writes and the target did not say changes nothing of what was said.
        as_said = (before + said, before + header + reply["content"])
        return grown if self._text.startswith(as_said) else self._template._encode(self._text)

    def _said(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> str:
        """The reply's text without its end token, as it stands behind the prompt: some tokenizers write a first word otherwise."""
        ended = bool(reply_ids) and reply_ids[-1] in self._template.eos_ids
        whole = self._decoded([*prompt_ids, *(reply_ids[:-1] if ended else reply_ids)])
        return whole.removeprefix(self._decoded(prompt_ids))

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self._template.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _written_before_reply(self) -> str:
        """What the template writes between the prompt and a reply's content, in place of the target."""
        shown, _ = around_sentinel(self._template._render([*self._messages, _MARKED], add_generation_prompt=False))
        return shown.removeprefix(self._text) if shown.startswith(self._text) else ""


def around_sentinel(rendered: str) -> tuple[str, str]:
    """The text before and behind the sentinel. Raises ValueError where it is not there exactly once."""
    head, *tails = rendered.split(SENTINEL)
    if len(tails) != 1:
        raise ValueError("the chat template does not show an assistant turn exactly once; give another with --template")
    return head, tails[0]
