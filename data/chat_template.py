"""Conversations and replies as token ids with the mask of what is trained on.

Owns: where the chat template is applied (here, once) and which tokens count as the assistant's. Does not know: files of
prompts, models, caches.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from draftsmith.data.between_turns import around_reply
from draftsmith.data.chats.messages import Message, is_blank_system
from draftsmith.data.chats.reply_marks import ReplyMarks
from draftsmith.data.chats.token_kinds import EVERYTHING, Kind, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample, numbered
from draftsmith.data.reply_mask import Encoded, Span, reply_mask
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.target.prompt_template import (
    NO_OPTIONS,
    PromptTemplate,
    TemplateOptions,
    encoded,
)
from draftsmith.models.target.template_fields import RENDERING_ERRORS, TemplateRefusal, refusal

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")


class ChatTemplate(PromptTemplate):
    """Turns whole conversations into samples for one tokenizer; see `PromptTemplate` for its arguments and errors."""

    @functools.cached_property
    def marks(self) -> ReplyMarks:
        """The marks by which thoughts and tool calls are found in token ids."""
        return ReplyMarks(self)

    @property
    def mask_recipe(self) -> str:
        """How the loss mask of a data set's own conversation is found: for the cache's manifest."""
        if self.text is None:
            return "plain text"
        return "generation block" if self._has_blocks else "rendered prefixes"

    @property
    def _has_blocks(self) -> bool:
        return self.text is not None and _GENERATION_BLOCK.search(self.text) is not None

    def conversation(self, sample_id: str, messages: Sequence[Message]) -> TokenizedSample:
        """The last of a conversation's `samples`: the only one, unless the template rewrites earlier turns.

        Args:
            sample_id: the conversation's id.
            messages: with its assistant turns.

        Returns:
            The sample.

        Raises:
            ValueError: as `samples`.
        """
        return self.samples(sample_id, messages)[-1]

    def samples(
        self, sample_id: str, messages: Sequence[Message], trained_on: TrainedOn = EVERYTHING
    ) -> list[TokenizedSample]:
        """Encode a data set's own conversation, assistant turns included, with the mask of the assistant's tokens.

        A reply's tokens are those of its text as the template shows it, and the end token behind it. Where the template has
        `{% generation %}` blocks, only what lies in one counts. What the template writes before a reply, such as an empty thought, is no
        part of it. Turns with `train` False are not learned from.

        Some templates write an earlier turn otherwise once more turns follow. They give a sample for each reply, which reads what the
        target reads before that reply. The first one has the conversation's id, the others `ID#1`, `ID#2`, ...

        Args:
            sample_id: the conversation's id.
            messages: with its assistant turns.
            trained_on: what of the assistant's turns is trained on; the rest of them is read.

        Returns:
            One sample, or one for each reply.

        Raises:
            ValueError: the template fails, or shows a reply not exactly once.
        """
        self._check_turns(messages)
        learned = _learned(messages, trained_on)
        if self.text is None:
            return [self._plain_conversation(sample_id, messages, learned, trained_on)]
        replies = [self._shown(messages[: number + 1], number in learned) for number in _assistants(messages)]
        whole = self.render(messages, add_generation_prompt=False)
        if not learned or all(whole.startswith(reply.settled_text) for reply in replies):
            return [self._sample(sample_id, whole, replies if learned else [], trained_on)]
        to_learn = [reply for reply in replies if reply.is_learned]
        return numbered([self._sample(sample_id, reply.text, [reply], trained_on) for reply in to_learn])

    def _check_turns(self, messages: Sequence[Message]) -> None:
        """Check that each turn would be learned as a whole.

        Raises:
            ValueError: a turn holds what the template does not show, or a reply has an end mark in it.
        """
        self.fields.shown(messages)
        self.check_shown_roles(messages)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            inside = next((mark for mark in self._end_marks if mark in message["content"]), None)
            if inside is not None:
                raise ValueError(f"turn {number} has the end token {inside!r} in its text, where a reply would end")

    def document(self, sample_id: str, text: str) -> TokenizedSample:
        """Encode a plain document, every token after the first one trained on.

        Args:
            sample_id: the sample's id.
            text: the document.

        Returns:
            The sample.
        """
        ids = self.plain_ids(text)
        return TokenizedSample(sample_id, ids, [index > 0 for index in range(len(ids))])

    def _sample(
        self, sample_id: str, text: str, replies: Sequence["_ShownReply"], trained_on: TrainedOn
    ) -> TokenizedSample:
        ids, offsets = self.ids_and_offsets(text)
        encoded = Encoded(text, ids, offsets)
        kinds, mask = bytearray(len(ids)), [False] * len(ids)
        for reply in replies:
            for index, own in enumerate(reply_mask(encoded, reply.spans, self.eos_ids)):
                if own:
                    kinds[index] = kind = reply.kind_at(offsets[index][1] - 1)
                    mask[index] = reply.is_learned and kind in trained_on.kinds
        return TokenizedSample(sample_id, ids, mask, bytes(kinds), "tools" in self._args)

    def _shown(self, messages: Sequence[Message], is_learned: bool) -> "_ShownReply":
        """The last message's reply as the template shows it at the end of a conversation."""
        text, blocks = self._render_with_blocks(messages)
        head, tail = around_reply(self, messages[:-1])
        stop = len(text) - (len(tail) if text.endswith(tail) else _num_shared(reversed(text), reversed(tail)))
        start = self._reply_start(messages, text, head)
        spans = [Span(start, stop)] if blocks is None else _shared_parts(Span(start, stop), blocks)
        end_mark = self._end_mark_pattern.match(text, stop)
        settled = text[: end_mark.end() if end_mark else stop]
        if is_learned:
            self._check_shown(messages, text, Span(start, stop))
        words = self._words_start(messages, text, Span(start, stop))
        calls = self._calls_start(messages, text, Span(words, stop), tail)
        return _ShownReply(text, spans, settled, is_learned, words, calls)

    def _check_shown(self, messages: Sequence[Message], text: str, reply: Span) -> None:
        """Check that the template has left nothing of a reply out.

        Raises:
            ValueError: it hides a thought or removes it from the words, hides one of its calls, or the words beside them.
        """
        last, place = messages[-1], f"turn {len(messages) - 1}"
        remedy = "make replies with `draftsmith data respond`, or give another with --template"
        end, words = self.marks.thought_end, last["content"]
        if end and end in words:
            thought, _, words = words.partition(end)
            asked = _num_shared(text, self.render(messages[:-1], add_generation_prompt=False))
            # What the prompt opens is before the reply.
            if thought.strip().removeprefix(self.marks.thought_start).strip() not in text[asked : reply.stop]:
                raise ValueError(f"{place} has a thought in its words, which the chat template removes; {remedy}")
        shown = text[reply.start : reply.stop]
        if not _holds(shown, last.get("reasoning_content", "")):
            raise ValueError(f"{place} has a thought, which the chat template does not show; {remedy}")
        if "tool_calls" not in last:
            return
        if not _holds(shown, words):
            raise ValueError(
                f"{place} has words beside its tool calls, which the chat template does not show; {remedy}"
            )
        for call in last["tool_calls"]:
            name = call["function"]["name"]
            if name not in shown:
                raise ValueError(f"{place} calls {name!r:.80}, which the chat template does not show; {remedy}")
        hidden = self._hidden_call(messages, text)
        if hidden is not None:
            name = last["tool_calls"][hidden]["function"]["name"]
            raise ValueError(
                f"{place} has {len(last['tool_calls'])} calls, and the chat template does not show call {hidden}, of {name!r:.80}; {remedy}"
            )

    def _hidden_call(self, messages: Sequence[Message], text: str) -> int | None:
        """The number of a call, of several in the last message, without which the template writes the same text."""
        last = messages[-1]
        calls = last["tool_calls"]
        for number in range(len(calls) if len(calls) > 1 else 0):
            without = cast(Message, {**last, "tool_calls": calls[:number] + calls[number + 1 :]})
            with contextlib.suppress(TemplateRefusal):
                if self.render([*messages[:-1], without], add_generation_prompt=False) == text:
                    return number
        return None

    def _words_start(self, messages: Sequence[Message], text: str, reply: Span) -> int:
        """Where the words of a reply begin: behind its thought, in a field of its own or in the words, and what is written around it."""
        if "reasoning_content" not in messages[-1]:
            return reply.start + self.marks.thought_length(text[reply.start : reply.stop], text[: reply.start])
        head, _ = around_reply(self, messages[:-1], thought=messages[-1]["reasoning_content"])
        return max(reply.start, _num_shared(text, head))

    def _calls_start(self, messages: Sequence[Message], text: str, words: Span, tail: str) -> int:
        """Where the tool calls of a reply begin: behind what the template writes for the same reply without them, or at their mark."""
        if "tool_calls" not in messages[-1]:
            return self._written_call(messages, text, words)
        without = Message(role="assistant", content=messages[-1]["content"])
        if "reasoning_content" in messages[-1]:
            without["reasoning_content"] = messages[-1]["reasoning_content"]
        with contextlib.suppress(TemplateRefusal):
            body = self.render([*messages[:-1], without], add_generation_prompt=False).removesuffix(tail)
            return max(words.start, _num_shared(text, body))
        return words.start

    def _written_call(self, messages: Sequence[Message], text: str, words: Span) -> int:
        """Where a call begins that the words of a reply hold; the text's end where there is none.

        Only a conversation with tools has one: it defines or calls them, one of them has answered, or the system's words show the mark.
        Elsewhere a mark is text like any other. One that words may begin with by chance needs the name of a defined tool behind it.
        """
        names = [tool.get("function", tool)["name"] for tool in self._args.get("tools") or ()]
        marks = self.marks
        in_use = names or any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages)
        shown = any(turn["role"] == "system" and marks.call_start in turn["content"] for turn in messages)
        if not (names or (marks.is_sure and (in_use or shown))):
            return len(text)
        call = marks.call_place(text[: words.stop], words.start, names)
        return len(text) if call < 0 else call

    def _reply_start(self, messages: Sequence[Message], text: str, head: str) -> int:
        """Where a reply begins: behind what the template writes before any content, and behind what the target reads before it replies.

        A thought replaces what the template writes for none: then only the prompt is known. A prompt may supply what the content repeats,
        such as an empty thought: then it reaches further.
        """
        before = [head]
        with contextlib.suppress(TemplateRefusal):  # a conversation that the assistant begins has no prompt
            before.append(self.render(messages[:-1], add_generation_prompt=True))
        starts = [len(known) for known in before if text.startswith(known)]
        return max(starts, default=_num_shared(text, head))

    @functools.cached_property
    def _end_marks(self) -> list[str]:
        """The end tokens' texts; ids that the tokenizer lacks have none."""
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.eos_ids))
        return [mark for mark in tokens if mark]

    @functools.cached_property
    def _end_mark_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, self._end_marks))})" if self._end_marks else r"(?!)")

    def _render_with_blocks(self, messages: Sequence[Message]) -> tuple[str, list[Span] | None]:
        """The rendered conversation, and its `{% generation %}` blocks; None where the template has none."""
        if not self._has_blocks:
            return self.render(messages, add_generation_prompt=False), None
        try:
            rendered = render_jinja_template(
                [self.fields.shown(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._args},
            )
        except RENDERING_ERRORS as error:
            raise refusal(messages, error) from error
        # Its annotation says str.
        [text], [blocks] = cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)
        return text, [Span(start, stop) for start, stop in blocks]

    def _plain_conversation(
        self, sample_id: str, messages: Sequence[Message], learned: Sequence[int], trained_on: TrainedOn
    ) -> TokenizedSample:
        ids: list[int] = []
        kinds, mask = bytearray(), []
        spoken = [(number, message) for number, message in enumerate(messages) if not is_blank_system(message)]
        for place, (number, message) in enumerate(spoken):
            between = encoded(self.tokenizer, "\n", special=False) if place else []
            own = (
                encoded(self.tokenizer, message["content"], special=False)
                if place
                else self.plain_ids(message["content"])
            )
            kind = Kind.REPLY if message["role"] == "assistant" else Kind.ASKED
            ids += between + own
            kinds += bytes(len(between)) + bytes([kind]) * len(own)
            mask += [False] * len(between) + [number in learned and kind in trained_on.kinds] * len(own)
        return TokenizedSample(sample_id, ids, mask, bytes(kinds))


@dataclass(frozen=True)
class _ShownReply:
    """A rendered conversation that ends with a reply.

    Attributes:
        text: the rendered conversation.
        spans: the reply's place in it; of a template with generation blocks, the parts that lie in one.
        settled_text: the text up to the reply's end mark, which no later turn should change.
        is_learned: whether the reply is to be learned from.
        words_start: where its thought ends.
        calls_start: where its tool calls begin.
    """

    text: str
    spans: list[Span]
    settled_text: str
    is_learned: bool
    words_start: int
    calls_start: int

    def kind_at(self, place: int) -> Kind:
        """The kind of a character of the reply; its end token is of the kind before it."""
        if place < self.words_start:
            return Kind.THOUGHT
        return Kind.REPLY if place < self.calls_start else Kind.TOOL_CALL


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _learned(messages: Sequence[Message], trained_on: TrainedOn) -> list[int]:
    """The numbers of the assistant's turns that are learned from: none where only the last one counts, and that has weight 0."""
    chosen = _assistants(messages)[-1:] if trained_on.last_turn_only else _assistants(messages)
    return [number for number in chosen if messages[number].get("train", True)]


def _holds(text: str, words: str) -> bool:
    """Whether a text holds some words, whatever their spacing."""
    return " ".join(words.split()) in " ".join(text.split())


def _num_shared(first: Iterable[str], second: Iterable[str]) -> int:
    """How many characters two texts begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _shared_parts(reply: Span, blocks: Sequence[Span]) -> list[Span]:
    """The parts of a reply that lie in a block."""
    parts = [Span(max(reply.start, block.start), min(reply.stop, block.stop)) for block in blocks]
    return [part for part in parts if part.start < part.stop]


def chat_of(
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    options: TemplateOptions = NO_OPTIONS,
) -> ChatTemplate:
    """Make the chat template of a target, with the tokens that end its replies.

    Args:
        target: path or hub id.
        tokenizer: the target's.
        template: the path of a Jinja file, or "none"; None for the tokenizer's own.
        revision: the hub's revision.
        trust_remote_code: whether Python files that come with the target may run.
        options: the template's name and its variables.

    Returns:
        The template.

    Raises:
        ValueError: as `ChatTemplate`.
    """
    ends = read_end_tokens(target, revision, tokenizer, trust_remote_code)
    return ChatTemplate(tokenizer, template, ends, options)


def no_labels(sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase) -> ValueError:
    """Make the error for a data set whose labelled fraction is 0, with the sample that shows why.

    Args:
        sample: of the data set.
        tokenizer: the target's.

    Returns:
        The error, to be raised.
    """
    text = str(tokenizer.decode(sample.input_ids))
    shown = text if len(text) <= 600 else text[:400] + " [...] " + text[-200:]
    return ValueError(
        "no token of the data set is trained on (labelled fraction 0): no sample has an assistant turn, or the chat "
        f"template hides it. Sample {sample.id}, {len(sample.input_ids)} tokens, all masked, reads: {shown!r}. "
        "Make replies with `draftsmith data respond`, or give a template with a {% generation %} block"
    )
