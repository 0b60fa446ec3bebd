"""The modes of a conversation: thinking or not, with tools, long. A drafter trained in one of them may gain little in another.

Owns: the names of modes, and which ones a sample or a prompt is in. Does not know: drafters, measures.
"""

from collections.abc import Sequence

from draftsmith.data.chats.token_kinds import Kind
from draftsmith.data.chats.tokenized_samples import TokenizedSample

THINKING, NOT_THINKING, TOOLS, LONG = "thinking", "not thinking", "tools", "long"
MODES = (THINKING, NOT_THINKING, TOOLS, LONG)
LONG_TOKENS = 4096
"""Tokens from which on a text is long."""


def modes(thinking: bool, has_tools: bool, num_tokens: int) -> tuple[str, ...]:
    """Name the modes of a conversation: it thinks or does not, and it may have tools and be long as well.

    Args:
        thinking: whether the reply has a thought.
        has_tools: whether tools can be called.
        num_tokens: of the text, prompt and reply.

    Returns:
        The modes, in the order of `MODES`.
    """
    own = [THINKING if thinking else NOT_THINKING]
    return (*own, *[TOOLS] * has_tools, *[LONG] * (num_tokens >= LONG_TOKENS))


def modes_of_sample(sample: TokenizedSample) -> tuple[str, ...]:
    """Name the modes of a sample by the kinds of its tokens.

    Args:
        sample: in token ids.

    Returns:
        The modes.
    """
    has_tools = sample.has_tools or Kind.TOOL_CALL in sample.kinds
    return modes(Kind.THOUGHT in sample.kinds, has_tools, len(sample.input_ids))


def modes_of_reply(kinds: Sequence[int], has_tools: bool, num_prompt_tokens: int) -> tuple[str, ...]:
    """Name the modes of a prompt by the kinds of its reply's tokens.

    Args:
        kinds: of the reply's tokens.
        has_tools: whether tools can be called.
        num_prompt_tokens: length of the prompt.

    Returns:
        The modes.
    """
    return modes(Kind.THOUGHT in kinds, has_tools or Kind.TOOL_CALL in kinds, num_prompt_tokens + len(kinds))
