"""Conversations and replies as token ids with the mask of what is trained on.

Owns: where the chat template is applied (here, once) and which tokens count as the assistant's. Does not know: files of
prompts, models, caches.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from transformers import BatchEncoding, PreTrainedTokenizerBase

from draftsmith.data.formats import Message
from draftsmith.models.end_tokens import end_tokens, read_end_tokens

NO_TEMPLATE = "none"
# Stands for the earlier reply while the next turn is rendered; plain letters, which no template trims or escapes.
_SENTINEL = "draftsmithreplygoeshere"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class TokenizedSample:
    """One sample: `input_ids[i]` is trained on where `loss_mask[i]` is True. The two lists have the same length."""

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
    """One exchange in token ids: everything the target had read, and what it replied.

    `prompt_ids` of a later turn begin with the earlier turn's `prompt_ids + reply_ids`. `finish` is "eos", "stop",
    "length" (the token budget ended) or "context" (the model's context ended).
    """

    prompt_ids: list[int]
    reply_ids: list[int]
    finish: str


class ChatTemplate:
    """Turns messages into token ids for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        template: None for the tokenizer's own template, the path of a Jinja file, or "none" for plain text
            (base models: the texts one after the other, a newline between them).
        eos_ids: tokens that end a reply; the tokenizer's own end token when empty.

    Raises ValueError when the tokenizer has no template and none is given, or when a template does not render.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, eos_ids: Iterable[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.text = _template_text(tokenizer, template)
        self.eos_ids = frozenset(eos_ids) or frozenset(end_tokens(tokenizer=tokenizer))

    @property
    def mask_recipe(self) -> str:
        """How the loss mask of a data set's own conversation is found: for the cache's manifest."""
        if self.text is None:
            return "plain text"
        return "generation block" if _GENERATION_BLOCK.search(self.text) else "rendered prefixes"

    def first_prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that the target reads before its first reply.

        Raises ValueError when the template fails on these messages.
        """
        if self.text is None:
            return self.plain_ids("\n".join(m["content"] for m in messages) + "\n")
        return self._encode(self._render(messages, add_generation_prompt=True))

    def next_turn_ids(self, messages: Sequence[Message], reply_ids: Sequence[int]) -> list[int]:
        """Ids between an earlier reply and the next one, `messages` being the user's new turn.

        They are the difference of two renderings, found by a sentinel in the reply's place, because a reply is
        never encoded again: its own ids stay as they were generated.
        """
        if self.text is None:
            return self.tokenizer.encode(
                "\n" + "\n".join(m["content"] for m in messages) + "\n", add_special_tokens=False
            )
        history = [Message(role="user", content="-"), Message(role="assistant", content=_SENTINEL)]
        rendered = self._render([*history, *messages], add_generation_prompt=True)
        if rendered.count(_SENTINEL) != 1:
            raise ValueError(
                "the chat template does not show an assistant turn exactly once; give another with --template"
            )
        ids = self._encode(rendered.split(_SENTINEL)[1])
        ended = bool(reply_ids) and reply_ids[-1] in self.eos_ids
        # The template closes the turn with the end token, which a finished reply already brought along.
        return ids[1:] if ended and ids and ids[0] == reply_ids[-1] else ids

    def conversation(self, sample_id: str, messages: Sequence[Message]) -> TokenizedSample:
        """A data set's own conversation, assistant turns included, with the mask of the assistant's tokens.

        The mask comes from the template's `{% generation %}` block where it has one, else from the difference of
        rendered prefixes. The end token after a reply counts as the assistant's.

        Raises ValueError when the template fails, or rewrites earlier turns so that prefixes do not match.
        """
        if self.text is None:
            return self._plain_conversation(sample_id, messages)
        if _GENERATION_BLOCK.search(self.text):
            ids, mask = self._mask_from_generation_block(messages)
        else:
            ids, mask = self._mask_from_prefixes(sample_id, messages)
        return TokenizedSample(sample_id, ids, _with_end_tokens(ids, mask, self.eos_ids))

    def document(self, sample_id: str, text: str) -> TokenizedSample:
        """A plain document, every token after the first one trained on."""
        ids = self.plain_ids(text)
        return TokenizedSample(sample_id, ids, [index > 0 for index in range(len(ids))])

    def plain_ids(self, text: str) -> list[int]:
        """A plain text's ids with the tokenizer's own first token, if any, and no end token."""
        ids = _encoded(self.tokenizer, text, special=True)
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                _plain(messages), chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise _template_failure(messages, error) from error
        return str(rendered)

    def _encode(self, rendered: str) -> list[int]:
        """Special tokens are in the rendered text already."""
        return _encoded(self.tokenizer, rendered, special=False)

    def _mask_from_generation_block(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                _plain(messages),
                chat_template=self.text,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise _template_failure(messages, error) from error
        if not isinstance(encoded, BatchEncoding):
            raise TypeError(f"the tokenizer gave {type(encoded).__name__} where a BatchEncoding was asked for")
        return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]

    def _mask_from_prefixes(self, sample_id: str, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        whole = self._render(messages, add_generation_prompt=False)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], add_generation_prompt=True)
                after = self._render(messages[: index + 1], add_generation_prompt=False)
                if not (after.startswith(before) and whole.startswith(after.rstrip())):
                    raise ValueError(
                        f"sample {sample_id}: the chat template renders turn {index} differently once more follow, "
                        "so the assistant's part cannot be told apart; give a template with a {% generation %} block"
                    )
                spans.append((len(before), len(after)))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        mask = [any(a <= start < end <= b for a, b in spans) for start, end in offsets]
        return ids, _without_tails(ids, mask, self.eos_ids)

    def _plain_conversation(self, sample_id: str, messages: Sequence[Message]) -> TokenizedSample:
        ids: list[int] = []
        mask: list[bool] = []
        for number, message in enumerate(messages):
            replying = message["role"] == "assistant"
            after_reply = number > 0 and messages[number - 1]["role"] == "assistant"
            text = message["content"] if replying else ("\n" if after_reply else "") + message["content"] + "\n"
            part = _encoded(self.tokenizer, text, special=False) if ids else self.plain_ids(text)
            ids += part
            mask += [replying] * len(part)
        return TokenizedSample(sample_id, ids, mask)


def chat_of(
    target: str, tokenizer: PreTrainedTokenizerBase, template: str | None = None, revision: str | None = None
) -> ChatTemplate:
    """The chat template of a target, with the tokens that end its replies. Raises what `ChatTemplate` raises."""
    return ChatTemplate(tokenizer, template, read_end_tokens(target, revision, tokenizer))


def from_turns(sample_id: str, turns: Sequence[Turn]) -> TokenizedSample:
    """A sample from ids as they were read and generated, nothing encoded again.

    Example: turns `([1, 2], [3])` and `([1, 2, 3, 4], [5, 6])` give ids `[1, 2, 3, 4, 5, 6]` and the mask `001011`.

    Raises ValueError when a turn's prompt does not continue the turn before it.
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


def cut(sample: TokenizedSample, max_length: int) -> TokenizedSample:
    """The first `max_length` tokens of a sample."""
    if len(sample.input_ids) <= max_length:
        return sample
    return replace(sample, input_ids=sample.input_ids[:max_length], loss_mask=sample.loss_mask[:max_length])


def no_labels(sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase) -> ValueError:
    """The error for a data set whose labelled fraction is 0, with the sample that shows why."""
    text = str(tokenizer.decode(sample.input_ids))
    shown = text if len(text) <= 600 else text[:400] + " [...] " + text[-200:]
    return ValueError(
        "no token of the data set is trained on (labelled fraction 0): no sample has an assistant turn, or the chat "
        f"template hides it. Sample {sample.id}, {len(sample.input_ids)} tokens, all masked, reads: {shown!r}. "
        "Make replies with `draftsmith data respond`, or give a template with a {% generation %} block"
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=special)]


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _template_text(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    if template == NO_TEMPLATE:
        return None
    if template is not None:
        path = Path(template)
        if not path.is_file():
            raise ValueError(f"template {template!r} is no file; give a Jinja file, or {NO_TEMPLATE!r} for plain text")
        return path.read_text(encoding="utf-8")
    own = getattr(tokenizer, "chat_template", None)
    if not isinstance(own, str):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; give one with --template FILE.jinja, "
            f"or --template {NO_TEMPLATE} for a base model"
        )
    return own


def _template_failure(messages: Sequence[Message], error: Exception) -> ValueError:
    roles = [message["role"] for message in messages]
    return ValueError(
        f"the chat template fails on turns {roles}: {error}; change the data or give another with --template"
    )


def _with_end_tokens(ids: list[int], mask: list[bool], eos_ids: frozenset[int]) -> list[bool]:
    """Some templates close a turn outside their generation block: the end token right after a reply is the reply's."""
    return [kept or (index > 0 and mask[index - 1] and ids[index] in eos_ids) for index, kept in enumerate(mask)]


def _without_tails(ids: list[int], mask: list[bool], eos_ids: frozenset[int]) -> list[bool]:
    """Unlabels what a template writes after a turn's end token (often a newline): the target never generates that."""
    result = list(mask)
    for index in range(1, len(ids)):
        after_end = ids[index - 1] in eos_ids or not result[index - 1]
        if mask[index] and mask[index - 1] and after_end:
            result[index] = False
    return result
