"""What lies beside the turns of a row and belongs to its conversation: the system's words, tools, variables of the template.

Owns: the names of these fields, and which of them may not occur together. Does not know: formats, fields of turns, templates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import Message, is_blank_system, read_content
from draftsmith.data.chats.tool_calls import read_tools
from draftsmith.json_rows import UnusableRow, parse_object

_SYSTEM_FIELDS = ("system", "system_prompt")


def with_system(row: Mapping[str, Any], turns: Sequence[Message]) -> tuple[Message, ...]:
    """Put the system's text that lies beside the turns before them.

    Args:
        row: of a data set.
        turns: of its conversation.

    Returns:
        The turns.

    Raises:
        UnusableRow: it is no text, the turns begin with another, or two fields differ.
    """
    texts = {name: _system_text(row[name], name) for name in _SYSTEM_FIELDS if _says_something(row.get(name))}
    texts = {name: text for name, text in texts.items() if text.strip()}
    if len({text.strip() for text in texts.values()}) > 1:
        raise UnusableRow(f"the row has two different texts in {' and '.join(texts)}; one of them is enough")
    for name, text in texts.items():
        if not turns or turns[0]["role"] != "system" or is_blank_system(turns[0]):
            own = Message(role="system", content=text)
            return (own, *turns[1:]) if turns and is_blank_system(turns[0]) else (own, *turns)
        if turns[0]["content"].strip() != text.strip():
            raise UnusableRow(f"the row has {name} and another system turn; one of them is enough")
    return tuple(turns)


def _says_something(value: Any) -> bool:
    """Whether a field of a system's text is in use; a flag or an empty value is not."""
    return bool(value) and not isinstance(value, bool)


def _system_text(value: Any, name: str) -> str:
    text, parts = read_content(value, name)
    if parts is not None:
        kind = next(part["type"] for part in parts if part["type"] != "text")
        raise UnusableRow(f"{name} has a part of the type {kind!r}; beside the turns, a system's words are text")
    return text


def without_tools(turns: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """Take the tools that a system's turn defines out of it. A turn that defines them and says nothing is no turn.

    Args:
        turns: of a conversation.

    Returns:
        The turns, and the tools.

    Raises:
        UnusableRow: two turns define tools.
    """
    given = [turn["tools"] for turn in turns if "tools" in turn]
    if len(given) > 1:
        raise UnusableRow("two turns of the system have tools; put all of them beside the turns")
    kept: list[Message] = []
    for turn in turns:
        rest = turn.copy()
        if rest.pop("tools", None) is None or not is_blank_system(rest):
            kept.append(rest)
    return tuple(kept), next(iter(given), ())


def tools_and_variables(
    row: Mapping[str, Any], of_turns: tuple[dict[str, Any], ...]
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Read the tools of a row, which may lie in a system's turn or among its template's variables, and the other variables.

    Args:
        row: of a data set.
        of_turns: the tools that a turn of its conversation defines.

    Returns:
        The tools and the variables.

    Raises:
        UnusableRow: it has different tools in two places, or what is none of either.
    """
    variables = _variables(row)
    places = {
        "tools": read_tools(row),
        "others in the system's turn": of_turns,
        "others in chat_template_kwargs": read_tools({"tools": variables.pop("tools", None)}),
    }
    given = {place: tools for place, tools in places.items() if tools}
    for place, tools in given.items():
        if tools != next(iter(given.values())):
            raise UnusableRow(f"the row has tools, and {place}; one of them is enough")
    return next(iter(given.values()), ()), variables


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables of one row, as TRL and Transformers name them; null ones count as absent."""
    value = row.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        value = parse_object(value.encode(errors="surrogatepass"))
    if value in (None, ""):
        return {}
    if not isinstance(value, Mapping):
        raise UnusableRow(f"chat_template_kwargs is {type(value).__name__}, not an object")
    return {name: entry for name, entry in value.items() if entry is not None}


def unwanted(row: Mapping[str, Any]) -> str | None:
    """Say why the answer of a row is none to learn from: TRL and LLaMA-Factory mark answers that people did not want.

    Args:
        row: of a data set.

    Returns:
        The reason; None where there is none.
    """
    weight = row.get("weight")
    if row.get("messages") is not None and isinstance(weight, int | float) and weight == 0:
        return "the row has weight 0"
    is_trl = row.get("completion") is not None and _is_false(row.get("label"))
    name = "label" if is_trl else "kto_tag" if _is_false(row.get("kto_tag")) else None
    return None if name is None else f"the answer is one that people did not want ({name} false)"


def _is_false(value: Any) -> bool:
    """Whether a mark is false; tables of texts write it as a word or a number."""
    is_number = isinstance(value, int | float) and value == 0
    return is_number or (isinstance(value, str) and value.strip().lower() in ("false", "0"))
