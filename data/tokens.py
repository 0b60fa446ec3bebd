"""Conversations and replies as token ids with the mask of what is trained on.

Owns: where the chat template is applied (here, once) and which tokens count as the assistant's. Does not know: files of
prompts, models, caches.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from draftsmith.data.formats import Message
from draftsmith.data.reply_spans import Encoded, Span, reply_mask
from draftsmith.data.seams import Seams, around_reply
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.target.prompt_template import (
    NO_OPTIONS,
    NO_TEMPLATE,
    RENDERING_ERRORS,
    PromptTemplate,
    TemplateOptions,
    TemplateRefusal,
    encoded,
    refusal,
    shown_fields,
)

__all__ = ["NO_TEMPLATE", "ChatTemplate", "TokenizedSample", "Turn"]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class TokenizedSample:
    """One sample. Both lists have the same length.

    Attributes:
        id: the conversation's, or `ID#1`, `ID#2`, ... for its further samples.
        input_ids: token ids.
        loss_mask: True for the tokens that are trained on.

    Raises:
        ValueError: the lists have different lengths.
    """

    id: str
    input_ids: list[int]
    loss_mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.loss_mask):
            raise ValueError(f"sample {self.id}: {len(self.input_ids)} ids but {len(self.loss_mask)} mask entries")

    @property
    def num_labelled(self) -> int:
        """Number of tokens that are trained on."""
        return sum(self.loss_mask)


@dataclass(frozen=True)
class Turn:
    """One exchange in token ids.

    Attributes:
        prompt_ids: everything the target had read. Those of a later turn begin with the earlier turn's `prompt_ids + reply_ids`.
        reply_ids: what it replied.
        finish: "eos", "stop", "length" (the token budget ended) or "context" (the model's context ended).
    """

    prompt_ids: list[int]
    reply_ids: list[int]
    finish: str


class ChatTemplate(PromptTemplate):
    """Turns whole conversations into samples for one tokenizer; see `PromptTemplate` for its arguments and errors."""

    @property
    def mask_recipe(self) -> str:
        """How the loss mask of a data set's own conversation is found: for the cache's manifest."""
        if self.text is None:
            return "plain text"
        return "generation block" if self._has_blocks else "rendered prefixes"

    @property
    def _has_blocks(self) -> bool:
        return self.text is not None and _GENERATION_BLOCK.search(self.text) is not None

    def next_turn_ids(self, messages: Sequence[Message], reply_ids: Sequence[int]) -> list[int]:
        """Encode what lies between an earlier reply and the next one; see `seams.py` for the rule.

        A reply is never encoded again: its own ids stay as they were generated.

        Args:
            messages: the user's new turn.
            reply_ids: the earlier reply, its end token included.

        Returns:
            Token ids.

        Raises:
            ValueError: the template shows a reply not exactly once, or fails.
        """
        return Seams(self).ids([Message(role="user", content="-")], reply_ids, messages)

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

    def samples(self, sample_id: str, messages: Sequence[Message]) -> list[TokenizedSample]:
        """Encode a data set's own conversation, assistant turns included, with the mask of the assistant's tokens.

        A reply's tokens are those of its text as the template shows it, and the end token behind it. Where the template has
        `{% generation %}` blocks, only what lies in one counts. What the template writes before a reply, such as an empty thought, is no
        part of it. Turns with `train` False are not learned from.

        Some templates write an earlier turn otherwise once more turns follow. They give a sample for each reply, which reads what the
        target reads before that reply. The first one has the conversation's id, the others `ID#1`, `ID#2`, ...

        Args:
            sample_id: the conversation's id.
            messages: with its assistant turns.

        Returns:
            One sample, or one for each reply.

        Raises:
            ValueError: the template fails, or shows a reply not exactly once.
        """
        self._check_turns(messages)
        if self.text is None:
            return [self._plain_conversation(sample_id, messages)]
        replies = [
            (messages[: index + 1], message.get("train", True))
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        shown = [(self._shown(until), learned) for until, learned in replies]
        whole = self._render(messages, add_generation_prompt=False)
        to_learn = [reply for reply, learned in shown if learned]
        if not to_learn or all(whole.startswith(reply.settled_text) for reply, _ in shown):
            return [self._sample(sample_id, whole, [span for reply in to_learn for span in reply.spans])]
        return _numbered([self._sample(sample_id, reply.text, reply.spans) for reply in to_learn])

    def _check_turns(self, messages: Sequence[Message]) -> None:
        """Check that each turn would be learned as a whole.

        Raises:
            ValueError: a thought that the template does not read, or an end mark in a reply.
        """
        for number, message in enumerate(messages):
            if "reasoning_content" in message and "reasoning_content" not in (self.text or ""):
                raise ValueError(f"turn {number} has a thought, and the chat template does not read reasoning_content")
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

    def _sample(self, sample_id: str, text: str, spans: Sequence[Span]) -> TokenizedSample:
        ids, offsets = self.ids_and_offsets(text)
        return TokenizedSample(sample_id, ids, reply_mask(Encoded(text, ids, offsets), spans, self.eos_ids))

    def _shown(self, messages: Sequence[Message]) -> "_ShownReply":
        """The last message's reply as the template shows it at the end of a conversation."""
        text, blocks = self._render_with_blocks(messages)
        head, tail = around_reply(self, messages[:-1])
        stop = len(text) - (len(tail) if text.endswith(tail) else _num_shared(reversed(text), reversed(tail)))
        start = self._reply_start(messages, text, head)
        learned = [Span(start, stop)] if blocks is None else _shared_parts(Span(start, stop), blocks)
        end_mark = self._end_mark_pattern.match(text, stop)
        return _ShownReply(text, learned, text[: end_mark.end() if end_mark else stop])

    def _reply_start(self, messages: Sequence[Message], text: str, head: str) -> int:
        """Where a reply begins: behind what the template writes before any content, and behind what the target reads before it replies.

        A thought replaces what the template writes for none: then only the prompt is known. A prompt may supply what the content repeats,
        such as an empty thought: then it reaches further.
        """
        before = [head]
        with contextlib.suppress(TemplateRefusal):  # a conversation that the assistant begins has no prompt
            before.append(self._render(messages[:-1], add_generation_prompt=True))
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
            return self._render(messages, add_generation_prompt=False), None
        try:
            rendered = render_jinja_template(
                [shown_fields(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._args},
            )
        except RENDERING_ERRORS as error:
            raise refusal(messages, error) from error
        # Its annotation says str.
        [text], [blocks] = cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)
        return text, [Span(start, stop) for start, stop in blocks]

    def _plain_conversation(self, sample_id: str, messages: Sequence[Message]) -> TokenizedSample:
        ids: list[int] = []
        mask: list[bool] = []
        for number, message in enumerate(messages):
            between = encoded(self.tokenizer, "\n", special=False) if number else []
            own = (
                encoded(self.tokenizer, message["content"], special=False)
                if number
                else self.plain_ids(message["content"])
            )
            learned = message["role"] == "assistant" and bool(message.get("train", True))
            ids += between + own
            mask += [False] * len(between) + [learned] * len(own)
        return TokenizedSample(sample_id, ids, mask)


@dataclass(frozen=True)
class _ShownReply:
    """A rendered conversation that ends with a reply.

    Attributes:
        text: the rendered conversation.
        spans: the reply's place in it; of a template with generation blocks, the parts that lie in one.
        settled_text: the text up to the reply's end mark, which no later turn should change.
    """

    text: str
    spans: list[Span]
    settled_text: str


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


def from_turns(sample_id: str, turns: Sequence[Turn]) -> TokenizedSample:
    """Make a sample from ids as they were read and generated, nothing encoded again.

    Example: turns `([1, 2], [3])` and `([1, 2, 3, 4], [5, 6])` give ids `[1, 2, 3, 4, 5, 6]` and the mask `001011`.

    Args:
        sample_id: the sample's id.
        turns: of one conversation.

    Returns:
        The sample; the replies are trained on.

    Raises:
        ValueError: a turn's prompt does not continue the turn before it.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for number, turn in enumerate(turns):
        if turn.prompt_ids[: len(ids)] != ids:
            raise ValueError(f"sample {sample_id}: the prompt of turn {number} does not begin with the turns before it")
        new = len(turn.prompt_ids) - len(ids)
        ids = turn.prompt_ids + turn.reply_ids
        mask += [False] * new + [True] * len(turn.reply_ids)
    return TokenizedSample(sample_id, ids, mask)


def samples_from_turns(
    sample_id: str, turns: Sequence[Turn], begun_anew: Collection[int] = ()
) -> list[TokenizedSample]:
    """As `from_turns`, with a new sample at each turn of `begun_anew`, whose prompt need not continue the turn before it.

    The first one has the conversation's id, the others `ID#1`, `ID#2`, ...

    Args:
        sample_id: the conversation's id.
        turns: of the conversation.
        begun_anew: numbers of turns, from 0.

    Returns:
        The samples.

    Raises:
        ValueError: another turn's prompt does not continue the turn before it.
    """
    groups: list[list[Turn]] = []
    for number, turn in enumerate(turns):
        if number in begun_anew or not groups:
            groups.append([])
        groups[-1].append(turn)
    return _numbered([from_turns(sample_id, group) for group in groups])


def _numbered(samples: Sequence[TokenizedSample]) -> list[TokenizedSample]:
    """Samples of one conversation, each with an id of its own."""
    return [
        replace(sample, id=f"{sample.id}#{number}" if number else sample.id) for number, sample in enumerate(samples)
    ]


def cut(sample: TokenizedSample, max_length: int) -> TokenizedSample:
    """Cut a sample to a length.

    Args:
        sample: whole.
        max_length: in tokens.

    Returns:
        Its first `max_length` tokens.
    """
    if len(sample.input_ids) <= max_length:
        return sample
    return replace(sample, input_ids=sample.input_ids[:max_length], loss_mask=sample.loss_mask[:max_length])


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
