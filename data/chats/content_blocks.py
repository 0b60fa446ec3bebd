"""Turns whose content is a list of blocks, as Anthropic's and Mistral's clients write them, spread into turns with fields.

Owns: which blocks are thoughts, calls and results, and the order that they may come in. Does not know: fields of turns, templates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from draftsmith.data.chats.spellings import CALL as _CALL
from draftsmith.data.chats.spellings import RESULT as _RESULT
from draftsmith.data.chats.spellings import STEP as _STEP
from draftsmith.data.chats.spellings import THOUGHT, plain_blocks, role_of
from draftsmith.data.chats.tool_calls import CALL_FIELDS, parsed_list, says_nothing
from draftsmith.json_rows import UnusableRow

_BLOCKS = (THOUGHT, _CALL, _RESULT, _STEP)
# In which order a reply can be rendered: a template shows one thought, then words, then calls.
_RANK = {THOUGHT: 0, _CALL: 2}
_WORDS_RANK = 1
_ORDER = "a thought, words, calls"


def spread(turn: Any, place: str) -> list[Any]:
    """Make the blocks of a turn its fields: thoughts, calls, and a turn of its own for each result of a tool.

    Args:
        turn: of a row.
        place: what errors call it.

    Returns:
        The turns; the turn itself where no block is more than a part of its words.

    Raises:
        UnusableRow: a block lacks its value, blocks come in an order that no template shows, or a thought lies in a field as well.
    """
    name = next((name for name in ("content", "value") if isinstance(turn, Mapping) and _is_list(turn.get(name))), None)
    if name is None:
        return [turn]
    blocks = plain_blocks(turn[name])
    if not any(_kind(block) in _BLOCKS for block in blocks):
        return [turn]
    replies = _replies(blocks) if role_of(turn.get("role")) == "assistant" else []
    if len(replies) > 1:
        later = {field: value for field, value in turn.items() if field not in (*CALL_FIELDS, "reasoning_content")}
        bases = [turn, *[later] * (len(replies) - 1)]
        return [
            each
            for fields, reply in zip(bases, replies, strict=True)
            for each in spread({**fields, name: reply}, place)
        ]
    blocks = replies[0] if replies else blocks
    rest = [block for block in blocks if _kind(block) not in _BLOCKS]
    if any(_kind(block) == _RESULT for block in blocks):
        results = [_result(block, place) for block in blocks if _kind(block) == _RESULT]
        if any(_kind(block) in (THOUGHT, _CALL) for block in blocks):
            raise UnusableRow(
                f"{place} has results of a tool beside a thought or a call; give results a turn of their own"
            )
        if any(not _is_blank_text(block) for block in rest):
            raise UnusableRow(
                f"{place} has words beside results of a tool, and the assistant speaks next; put them into a turn behind its reply, or "
                "into the result"
            )
        return results
    ranks = [_RANK.get(_kind(block), _WORDS_RANK) for block in blocks]
    if ranks != sorted(ranks):
        raise UnusableRow(
            f"{place} has blocks in another order than {_ORDER}, which no chat template shows; give each a turn"
        )
    fields: dict[str, Any] = {**turn, name: rest}
    thoughts = [thought_text(block, place) for block in blocks if _kind(block) == THOUGHT]
    if thoughts:
        fields["reasoning_content"] = _only_thought(turn.get("reasoning_content"), "\n\n".join(thoughts), place)
    calls = [_call(block) for block in blocks if _kind(block) == _CALL]
    if calls:
        given = _given_calls(turn, place)
        own_ids = [call.get("id") for call in given if isinstance(call, Mapping)]
        # LangChain has the calls of the blocks in the field as well.
        fields["tool_calls"] = [*given, *(call for call in calls if call["id"] is None or call["id"] not in own_ids)]
    return [fields]


def _replies(blocks: Sequence[Any]) -> list[list[Any]]:
    """The blocks of an assistant's turn by reply and results of tools, where a client writes a whole round as one turn.

    Example: a thought, a call, its result and words are the thought with the call, the result, and the words.
    """
    kinds = [_kind(block) for block in blocks]
    if _RESULT in kinds and _CALL not in kinds[: kinds.index(_RESULT)]:
        return []
    steps: list[list[Any]] = [[]]
    for kind, block in zip(kinds, blocks, strict=True):
        has_results = any(_kind(each) == _RESULT for each in steps[-1])
        if kind == _STEP or (has_results and kind not in (_CALL, _RESULT)):
            steps.append([])
        if kind != _STEP:
            steps[-1].append(block)
    parts: list[list[Any]] = []
    for step in steps:
        parts += [[block for block in step if (_kind(block) == _RESULT) is is_result] for is_result in (False, True)]
    return [part for part in parts if part]


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _kind(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, Mapping) else None
    return kind if isinstance(kind, str) else None


def _given_calls(turn: Mapping[str, Any], place: str) -> Sequence[Any]:
    """The calls in the field beside the blocks, which may be JSON text or say nothing."""
    given = turn.get("tool_calls")
    if says_nothing(given):
        return ()
    given = parsed_list(given, f"{place}: tool_calls") if isinstance(given, str) else given
    return given if _is_list(given) else (given,)


def thought_text(block: Mapping[str, Any], place: str) -> str:
    """Read a block that is a thought: a text, or Mistral's list of texts.

    Args:
        block: of a turn.
        place: what errors call the turn.

    Returns:
        The thought.

    Raises:
        UnusableRow: there is no text.
    """
    value = block.get(THOUGHT)
    parts = value if _is_list(value) else [value]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    words = [text for text in texts if isinstance(text, str)]
    if len(words) < len(texts):
        raise UnusableRow(f"{place}: a part of the type {THOUGHT!r} has no text in its field {THOUGHT!r}")
    return "".join(words)


def _only_thought(given: Any, thought: str, place: str) -> str:
    """The thought of the blocks, which a field beside them may repeat; a field that is null or blank counts as absent."""
    if given is None or (isinstance(given, str) and given.strip() in ("", thought.strip())):
        return thought
    raise UnusableRow(f"{place} has two different thoughts, reasoning_content and a part of the type {THOUGHT!r}")


def _is_blank_text(block: Any) -> bool:
    return _kind(block) == "text" and not str(block.get("text") or "").strip()


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": block.get("id"), "name": block.get("name"), "arguments": block.get("input")}


def _result(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a tool gave back; Anthropic leaves the content out where there is none."""
    if block.get("is_error") not in (None, False, True):
        raise UnusableRow(f"{place}: is_error is {block['is_error']!r:.80}, neither true nor false")
    content = block.get("content")
    fields = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": "" if content is None else content}
    return fields if block.get("name") is None else fields | {"name": block["name"]}
