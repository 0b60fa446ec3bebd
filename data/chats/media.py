"""Pictures, sounds and videos that lie beside the turns of a row, put into the places that the turns mark for them.

Owns: the names of these fields, and the marks. Does not know: the parts' own fields, templates.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import Message
from draftsmith.data.chats.tool_calls import says_nothing
from draftsmith.json_rows import UnusableRow

_KINDS = {
    "images": "image",
    "image": "image",
    "videos": "video",
    "video": "video",
    "audios": "audio",
    "audio": "audio",
}


def place_media(row: Mapping[str, Any], turns: Sequence[Message]) -> tuple[Message, ...]:
    """Make the marks of ShareGPT's form, such as `<image>`, the parts of their turns.

    Args:
        row: of a data set.
        turns: of its conversation.

    Returns:
        The turns; as they are where no field holds a picture, or one of them has parts already.

    Raises:
        UnusableRow: the turns have neither parts nor as many marks as there are pictures.
    """
    fields = [name for name in _KINDS if not says_nothing(row.get(name))]
    if not fields or any("parts" in turn for turn in turns):
        return tuple(turns)
    given: dict[str, list[Any]] = {}
    for name in fields:
        value = row[name]
        given.setdefault(_KINDS[name], []).extend(value if isinstance(value, list | tuple) else [value])
        kind = _KINDS[name]
        marks = sum(turn["content"].count(f"<{kind}>") for turn in turns if turn["role"] != "assistant")
        if marks != len(given[kind]):
            raise UnusableRow(
                f"the row has {name}, and no turn has a part for them; there are {len(given[kind])} of them, and the mark <{kind}> is in "
                f"the user's turns {marks} times"
            )
    left = {kind: iter(entries) for kind, entries in given.items()}
    mark = re.compile(rf"<({'|'.join(given)})>")
    return tuple(turn if turn["role"] == "assistant" else _with_parts(turn, mark, left) for turn in turns)


def _with_parts(turn: Message, mark: re.Pattern[str], left: Mapping[str, Any]) -> Message:
    if not mark.search(turn["content"]):
        return turn
    parts: list[dict[str, Any]] = []
    # Texts and the kinds between them, in turn.
    for number, piece in enumerate(mark.split(turn["content"])):
        if number % 2:
            value = next(left[piece])
            # Only the template's placeholder is read, so bytes stay behind.
            parts.append({"type": piece, piece: value} if isinstance(value, str) else {"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    placed = turn.copy()
    placed["parts"] = parts
    placed["content"] = "".join(part["text"] for part in parts if part["type"] == "text")
    return placed
