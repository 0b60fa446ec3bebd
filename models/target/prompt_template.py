"""What a target reads before it replies: messages through its chat template, or plain text, as token ids.

Owns which template counts, the variables that it takes, and how a prompt is rendered and encoded: here, once, for every command. Does
not know: replies, masks, files of prompts.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from draftsmith.models.files.end_tokens import end_tokens
from draftsmith.models.files.fingerprint import template_fingerprint
from draftsmith.models.target.template_fields import PROBE, RENDERING_ERRORS, TemplateFields, TemplateRefusal, refusal

NO_TEMPLATE = "none"
_DEFAULT_NAME = "default"
# Variables that templates read and that are also named in the signature of `apply_chat_template`.
_PASSED_ON = frozenset({"tools", "documents"})
_RESERVED = {"messages"} | inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - _PASSED_ON


@dataclass(frozen=True)
class TemplateOptions:
    """What a chat template is given beside the messages.

    Args:
        template_name: Which of a tokenizer's several chat templates to use; default: the one called default.
        template_args: Variables of the chat template as JSON, such as {"enable_thinking": false}; or one each, as in
            --template_args.enable_thinking=false.

    Raises:
        ValueError: a name that is no variable of a template, or a value that JSON cannot hold.
    """

    template_name: str | None = None
    template_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, value in (self.template_args or {}).items():
            if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
                raise ValueError(
                    f"template_args names {name!r}, which is no variable of a chat template; give names that your template reads, "
                    "such as enable_thinking"
                )
            if name == "tools":
                _check_tools(value)
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"template_args.{name} is {value!r:.80}, which JSON cannot hold ({error}); give text, numbers, true, false, "
                    "null, lists or mappings"
                ) from error

    @property
    def as_text(self) -> str | None:
        """The variables as JSON in one order, for manifests and records; None where there are none."""
        return json.dumps(self.template_args, sort_keys=True, ensure_ascii=False) if self.template_args else None


NO_OPTIONS = TemplateOptions()


@dataclass(frozen=True)
class TemplateChoice(TemplateOptions):
    """Which chat template turns messages into text, and what it is given beside them.

    Args:
        template: Jinja file with a chat template, or "none" for plain text (base models); default: the tokenizer's own.
    """

    template: str | None = field(default=None, kw_only=True)

    @property
    def options(self) -> TemplateOptions:
        """The template's name and variables alone."""
        return TemplateOptions(self.template_name, self.template_args)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a run's settings hold of the options: nothing where none are given."""
        return {} if self.options == NO_OPTIONS else asdict(self.options)


OWN_TEMPLATE = TemplateChoice()


class PromptTemplate:
    """Turns what is asked into token ids for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        template: None for the tokenizer's own template, the path of a Jinja file, or "none" for plain text. Base models read plain text:
            the texts one after the other, a newline between them, without a system turn that is empty.
        eos_ids: tokens that end a reply; the tokenizer's own end token when empty.
        options: the template's name and its variables.

    Raises:
        ValueError: the tokenizer has no such template and none is given, options go with plain text, or the template does not read a
            variable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        eos_ids: Iterable[int] = (),
        options: TemplateOptions = NO_OPTIONS,
    ) -> None:
        self.tokenizer = tokenizer
        self.text = _template_text(tokenizer, template, options.template_name)
        self.eos_ids = frozenset(eos_ids) or frozenset(end_tokens(tokenizer=tokenizer))
        self._args = dict(options.template_args or {})
        if self._args.get("tools"):
            self._args["tools"] = [_as_tool(tool) for tool in self._args["tools"]]
        self.fields = TemplateFields(self.text, self._fill)
        self._check_args()

    @property
    def digest(self) -> str:
        """sha256 (hex) of the template's text and its variables: prompts that are rendered alike have one digest."""
        content = self.text or ""
        if self._args:
            content += "\0" + json.dumps(self._args, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def _check_args(self) -> None:
        if self.text is None and self._args:
            raise ValueError(f"template_args is {self._args!r:.80}, but plain text has no template; leave it out")
        for name in self._args:
            if not self.fields.reads_variable(name):
                raise ValueError(
                    f"template_args names {name!r}, which does not occur in the chat template; correct the name, or leave it out"
                )

    def first_prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Encode what the target reads before its first reply.

        Args:
            messages: with ``role`` and ``content`` each.

        Returns:
            Token ids.

        Raises:
            TemplateRefusal: the template fails on these messages.
        """
        if self.text is None:
            texts = [(m["role"], str(m["content"])) for m in self.fields.shown(messages)]
            return self.plain_ids("\n".join(text for role, text in texts if role != "system" or text.strip()))
        return self.rendered_ids(self.render(messages, add_generation_prompt=True))

    def plain_ids(self, text: str) -> list[int]:
        """Encode a plain text with the tokenizer's own first token, if any, and no end token.

        Args:
            text: as it is.

        Returns:
            Token ids.
        """
        ids = encoded(self.tokenizer, text, special=True)
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def document_prompt_ids(self, text: str, num_words: int | None = None) -> list[int]:
        """Encode the beginning of a plain document.

        Args:
            text: the document.
            num_words: how many words of it; None for all of it.

        Returns:
            Token ids.
        """
        return self.plain_ids(first_words(text, num_words))

    def for_row(self, tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Self:
        """Give the template what one row says of it beside its messages.

        Args:
            tools: definitions of the tools that may be called.
            variables: of the template; they come before those of the command.

        Returns:
            The template with both; itself where there is neither.

        Raises:
            TemplateRefusal: the template does not read them.
        """
        given = dict(variables) | ({"tools": list(tools)} if tools else {})
        for name in given:
            if name in _RESERVED or not self.fields.reads_variable(name):
                what = "tools" if name == "tools" else f"the variable {name!r} in chat_template_kwargs"
                raise TemplateRefusal(f"the row has {what}, and {self.fields.reader} does not read {name}")
        if not given:
            return self
        row = copy.copy(self)
        row._args = self._args | given
        return row

    def check_shown_roles(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Check that the template shows what tools gave back, and what the system says behind the first turn.

        Args:
            messages: of a conversation.

        Raises:
            TemplateRefusal: it writes the same whatever the tool or the system said, or fails.
        """
        if self.text is None:
            return
        speaking = [number for number, message in enumerate(messages) if message["content"].strip()]
        tools = [number for number in speaking if messages[number]["role"] == "tool"]
        if tools and self._hides(messages, tools):
            raise TemplateRefusal("the chat template does not show the turns of a tool; give another with --template")
        for number in speaking:
            if number and messages[number]["role"] == "system" and self._hides(messages, [number]):
                raise TemplateRefusal(
                    f"turn {number} is the system's, and the chat template does not show it there; put its words into turn 0, or give "
                    "another with --template"
                )

    def _hides(self, messages: Sequence[Mapping[str, Any]], numbers: Collection[int]) -> bool:
        """Whether the template writes the same with other words in some turns."""
        others = [_with_probe(message) if number in numbers else message for number, message in enumerate(messages)]
        return self.render(messages, False) == self.render(others, False)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Render messages as text, special tokens included.

        Args:
            messages: with ``role`` and ``content`` each.
            add_generation_prompt: whether what the template writes before a reply ends the text.

        Returns:
            The text.

        Raises:
            TemplateRefusal: the template fails, or does not show what a message holds.
        """
        return self._fill(self.fields.shown(messages), add_generation_prompt)

    def _fill(self, shown: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                shown,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._args,
            )
        except RENDERING_ERRORS as error:
            raise refusal(shown, error) from error
        return str(rendered)

    def rendered_ids(self, rendered: str) -> list[int]:
        """Encode a rendered text.

        Args:
            rendered: with its special tokens in it.

        Returns:
            Token ids; the tokenizer adds none of its own.
        """
        return encoded(self.tokenizer, rendered, special=False)

    def ids_and_offsets(self, rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a rendered text, and say which characters each token covers.

        Args:
            rendered: with its special tokens in it.

        Returns:
            Token ids, and for each its first character and the one behind its last.
        """
        encoding = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoding["input_ids"]), list(encoding["offset_mapping"])

    def ids_from(self, rendered: str, place: int) -> list[int]:
        """Encode a rendered text from a character on, as in the whole text; encoded apart where a token reaches over that place.

        Args:
            rendered: with its special tokens in it.
            place: number of the character.

        Returns:
            Token ids.
        """
        ids, offsets = self.ids_and_offsets(rendered)
        first = next(
            (number for number, (start, stop) in enumerate(offsets) if max(start, stop - 1) >= place), len(ids)
        )
        whole = first == len(ids) or offsets[first][0] >= place
        return ids[first:] if whole else self.rendered_ids(rendered[place:])


def _check_tools(tools: Any) -> None:
    """Check the tools among the variables of a command.

    Raises:
        ValueError: they are no list of functions.
    """
    if tools is None:
        return
    for number, tool in enumerate(tools if isinstance(tools, list | tuple) else [None]):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            place, value = (f"[{number}]", tool) if isinstance(tools, list | tuple) else ("", tools)
            raise ValueError(
                f"template_args.tools{place} is {value!r:.80}, which is no {'function' if place else 'list'}; give a list of functions, "
                'such as [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
            )


def _as_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as rows give theirs to the template; a bare function gets its type."""
    if "function" in tool:
        return dict(tool)
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _with_probe(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with another text, and its other parts as they are."""
    if "parts" not in message:
        return {**message, "content": PROBE}
    kept = [part for part in message["parts"] if part["type"] != "text"]
    return {**message, "content": PROBE, "parts": [{"type": "text", "text": PROBE}, *kept]}


def first_words(text: str, count: int | None) -> str:
    """The first words of a text with their own spacing.

    Args:
        text: the text.
        count: how many words; None is the whole text.

    Returns:
        The beginning of the text.
    """
    if count is None:
        return text
    end = 0
    for word in text.split()[:count]:
        end = text.index(word, end) + len(word)
    return text[:end]


def template_digest(template: str | None) -> str | None:
    """Hash a template that replaces the tokenizer's own: the file's content, or the word.

    Args:
        template: the path of a Jinja file, or "none"; None for the tokenizer's own.

    Returns:
        sha256 (hex); None for the tokenizer's own.
    """
    if template is None:
        return None
    path = Path(template)
    return hashlib.sha256(path.read_bytes() if path.is_file() else template.encode()).hexdigest()


def rendering_fingerprint(
    tokenizer: PreTrainedTokenizerBase, template: str | None, options: TemplateOptions = NO_OPTIONS
) -> str:
    """Hash what turns messages into text: the template in use, its name and its variables.

    Args:
        tokenizer: the target's.
        template: the path of a Jinja file, or "none"; None for the tokenizer's own.
        options: the template's name and its variables.

    Returns:
        sha256 (hex); empty for no template.
    """
    own = template_digest(template) or template_fingerprint(tokenizer)
    if options == NO_OPTIONS:
        return own
    return hashlib.sha256(json.dumps([own, options.template_name, options.as_text]).encode()).hexdigest()


def template_in_use(
    tokenizer: PreTrainedTokenizerBase, template: str | None, options: TemplateOptions = NO_OPTIONS
) -> PromptTemplate:
    """Make the template that messages are rendered with: plain text where neither the tokenizer nor `template` has one.

    Args:
        tokenizer: the target's.
        template: the path of a Jinja file, or "none"; None for the tokenizer's own.
        options: the template's name and its variables.

    Returns:
        The template; its end tokens are the tokenizer's own.

    Raises:
        ValueError: as :class:`PromptTemplate`.
    """
    chosen = NO_TEMPLATE if template is None and not tokenizer.chat_template else template
    return PromptTemplate(tokenizer, chosen, options=options)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Encode a text.

    Args:
        tokenizer: of any kind.
        text: the text.
        special: whether the tokenizer adds its own first and last tokens.

    Returns:
        Token ids.
    """
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=special)]


def _template_text(tokenizer: PreTrainedTokenizerBase, template: str | None, name: str | None) -> str | None:
    if template is not None and name is not None:
        raise ValueError(f"template_name is {name!r} and template {template!r}; give one of the two")
    if template == NO_TEMPLATE:
        return None
    if template is not None:
        path = Path(template)
        if not path.is_file():
            raise ValueError(f"template {template!r} is no file; give a Jinja file, or {NO_TEMPLATE!r} for plain text")
        return path.read_text(encoding="utf-8")
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        return _named(own, name or _DEFAULT_NAME, tokenizer)
    if not isinstance(own, str):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; give one with --template FILE.jinja, "
            f"or --template {NO_TEMPLATE} for a base model"
        )
    if name is not None:
        raise ValueError(
            f"template_name is {name!r}, but the tokenizer {tokenizer.name_or_path!r} has one chat template, without a name; leave it out"
        )
    return own


def _named(templates: Mapping[str, str], name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name not in templates:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template called {name!r}; choose one of {', '.join(sorted(templates))} "
            "with --template_name"
        )
    return templates[name]
