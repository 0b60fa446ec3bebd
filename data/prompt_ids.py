"""A prompt of a prompt file as the ids that a target reads before its first reply: the same ones for every command.

Owns when a template is needed, and how much of a document is its prompt. Does not know: replies, models.
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from draftsmith.data.between_turns import check_turns
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.prompts import Prompt
from draftsmith.models.target.prompt_template import NO_OPTIONS, NO_TEMPLATE, TemplateOptions


def chat_for(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    eos_ids: Iterable[int] = (),
    options: TemplateOptions = NO_OPTIONS,
) -> ChatTemplate:
    """Make what renders these prompts. Plain documents alone need no template, so a base model's tokenizer may have none.

    Args:
        prompts: all that will be rendered.
        tokenizer: the target's.
        template: the path of a Jinja file, or "none"; None for the tokenizer's own.
        eos_ids: tokens that end a reply.
        options: the template's name and its variables.

    Returns:
        The template.

    Raises:
        ValueError: as `ChatTemplate`; or options are given and no prompt is rendered.
    """
    if any(prompt.text is None for prompt in prompts):
        return ChatTemplate(tokenizer, template, eos_ids, options)
    if options != NO_OPTIONS:
        raise ValueError(
            "template_name and template_args are for chat templates, but all prompts are plain documents; leave them out"
        )
    return ChatTemplate(tokenizer, NO_TEMPLATE, eos_ids)


def first_prompt_ids(prompt: Prompt, chat: ChatTemplate) -> list[int]:
    """Encode what the target reads before its first reply: the rendered first turn, or a document's first words.

    Args:
        prompt: of a prompt file.
        chat: what `chat_for` made.

    Returns:
        Token ids.

    Raises:
        TemplateRefusal: the template fails on the turn.
    """
    if prompt.text is not None:
        return chat.document_prompt_ids(prompt.text, prompt.prefix_words)
    return chat_of_prompt(prompt, chat).first_prompt_ids(prompt.user_turns()[0])


def chat_of_prompt(prompt: Prompt, chat: ChatTemplate) -> ChatTemplate:
    """Give the template what one prompt says of it: its tools and its variables.

    Args:
        prompt: of a prompt file.
        chat: what `chat_for` made.

    Returns:
        The template that renders this prompt.

    Raises:
        TemplateRefusal: the template does not read them.
    """
    return chat.for_row(prompt.tools, prompt.chat_template_kwargs)


def check_prompt(prompt: Prompt, chat: ChatTemplate) -> None:
    """Check that the template writes all turns of a prompt, whose replies are not there yet.

    Args:
        prompt: of a prompt file.
        chat: what `chat_for` made.

    Raises:
        ValueError: as `check_turns`.
    """
    if prompt.text is None:
        check_turns(chat_of_prompt(prompt, chat), prompt.user_turns())
