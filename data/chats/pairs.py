"""Conversations whose entries are a question with its answer, rather than turns, made into turns.

Owns: the names of such pairs' fields. Does not know: fields of turns, templates.
"""

from collections.abc import Mapping
from typing import Any

from draftsmith.data.chats.messages import ROLE_FIELDS, objects
from draftsmith.data.chats.tool_calls import says_nothing

# XTuner's names, Firefly's and BELLE's, and others that data sets use.
_PAIRS = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("question", "answer"),
    ("prompt", "response"),
)
_IS_TRAINED = "output_with_loss"  # of XTuner


def turns_of_pairs(conversation: Any) -> Any:
    """Make the turns of a conversation of pairs.

    Example: `[{"system": "Be brief.", "input": "Sure?", "output": "Yes."}]` gives a turn of the system, one of the user and one of the
    assistant.

    Args:
        conversation: of a row.

    Returns:
        The turns; the conversation as it is where its entries are no pairs.
    """
    entries = objects(conversation)
    names = next((names for names in _PAIRS if entries and all(_is_pair(entry, names) for entry in entries)), None)
    if names is None:
        return conversation
    turns: list[dict[str, Any]] = []
    for entry in entries:
        if not says_nothing(entry.get("system")):
            turns.append({"role": "system", "content": entry["system"]})
        turns.append({"role": "user", "content": entry[names[0]]})
        if entry.get(names[1]) is not None:
            turns.append({"role": "assistant", "content": entry[names[1]], "train": entry.get(_IS_TRAINED)})
    return turns


def _is_pair(entry: Mapping[str, Any], names: tuple[str, str]) -> bool:
    """Whether an entry has the fields of a pair, and no role; of the last one, the answer may be absent."""
    return (
        entry.get(names[0]) is not None and names[1] in entry and all(entry.get(name) is None for name in ROLE_FIELDS)
    )
