"""Rows whose fields have other names than the formats know: traces, Cohere's, questions with their answers, answers that people compared.

Owns: these names, and how such a row becomes one of a known format. Does not know: fields of turns, requests, templates.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import listed, objects
from draftsmith.data.chats.spellings import ROLE_FIELDS, is_whole, plain_turns, role_of
from draftsmith.data.chats.tool_calls import says_nothing
from draftsmith.json_rows import UnusableRow

# Fields that a format is known by; a row with one of them keeps its names.
_KNOWN = ("messages", "conversations", "conversation", "instruction", "contents", "turns", "prompt")
_TURNS = ("messages", "conversations", "conversation", "contents")
_QUESTIONS = ("question", "query", "problem", "inputs", "text_input", "input_text", "input")
_ANSWERS = (
    *("response", "chosen", "output", "outputs", "target", "targets", "output_text", "generated_text"),
    *("generated_solution", "solution"),
)
_CONVERSATIONS = ("data", "dialog", "dialogue", "thread", "chat_messages", "fncall_messages", "history")
# Two answers to one question, and what says which of them people preferred.
_PAIRS = (
    ("conversation_a", "conversation_b"),
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
)
_ENDINGS = ("finish_reason", "stop_reason", "done_reason")
_STRENGTHS = ("preference_strength", "overall_preference")  # of HelpSteer, below 0 for the first
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# What traces call the turns asked, the reply, the system's words and the tools: OpenTelemetry, OpenLLMetry, OpenInference.
_TRACES = (
    ("gen_ai.input.messages", "gen_ai.output.messages"),
    ("gen_ai.prompt", "gen_ai.completion"),
    ("llm.input_messages", "llm.output_messages"),
)
_TRACE_SYSTEM, _TRACE_TOOLS = "gen_ai.system_instructions", "gen_ai.tool.definitions"
# Fields of rows that are no conversation, with what such a row is.
_PIECES = {
    ("parentUuid", "sessionId"): "one event of a session's log (Claude Code)",
    ("payload", "type"): "one event of a session's log (Codex)",
    ("parent_id", "message_id"): "one message of a tree (OpenAssistant)",
    ("message_id", "role"): "one message of a tree (OpenAssistant)",
    ("message_tree_id",): "a tree of messages (OpenAssistant)",
    ("mapping", "current_node"): "a tree of messages (an export of ChatGPT)",
    ("resourceSpans",): "a batch of spans (OpenTelemetry)",
    ("segments",): "a text in segments that each have a label (Axolotl's input_output)",
    ("custom_id", "result"): "a response without its request (a batch of Anthropic's)",
}
# A setting of the model, which some rows have where others have a thought.
_SETTINGS = ("on", "off", "none", "minimal", "low", "medium", "high", "auto", "true", "false", "yes", "no", "xhigh")
# A conversation in one text, as Anthropic's first API and data sets of its time have it.
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
# XTuner's names, Firefly's and BELLE's, and others that data sets use.
_TURN_PAIRS = (
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
    names = next((names for names in _TURN_PAIRS if entries and all(_is_pair(entry, names) for entry in entries)), None)
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


def check_whole(row: Mapping[str, Any]) -> None:
    """Check that a row is no piece of a conversation, though it may have the words of a document.

    Args:
        row: of a data set, which has no field that a conversation is known by.

    Raises:
        UnusableRow: it is a piece, or a tree.
    """
    is_asked = any(isinstance(row.get(name), str | list | tuple) for name in ("prompt", "question", "turns", "input"))
    names = next((names for names in _PIECES if all(name in row for name in names)), None)
    if is_asked:
        return
    if names is not None:
        raise UnusableRow(
            f"the row is {_PIECES[names]}, by its {' and '.join(names)}; write each conversation as one row with `messages`, "
            "a list of turns with `role` and `content`"
        )
    if role_of(row.get("role")) and any(isinstance(row.get(name), str) for name in ("text", "content")):
        raise UnusableRow(
            "the row is a single turn, by its role; write each conversation as one row with `messages`, a list of turns"
        )


def usual(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Give a row the names of fields that the formats know.

    Example: `{"query": "Is it warm?", "response": "No."}` becomes `{"prompt": "Is it warm?", "response": "No."}`.

    Args:
        row: of a data set.

    Returns:
        The row, as it is where it has these names; and why its answer cannot be learned from.

    Raises:
        UnusableRow: a trace holds several replies.
    """
    inputs, outputs = row.get("inputs"), row.get("outputs")
    if isinstance(inputs, Mapping) and isinstance(outputs, Mapping) and not {"messages", "contents"} & inputs.keys():
        row = {**{name: value for name, value in row.items() if name not in ("inputs", "outputs")}, **inputs, **outputs}
    if any("message" in choice for choice in objects(row.get("output"))):
        row = {**{name: value for name, value in row.items() if name != "output"}, "choices": row["output"]}
    traced = _of_trace(row)
    if traced is not None:
        return traced
    if isinstance(row.get("message"), str) and isinstance(row.get("chat_history"), list | tuple):
        return _of_cohere(row), None
    preferred = _of_pair(row)
    if preferred is not None:
        return preferred
    return _renamed(row), _cut_turn(row)


def _cut_turn(row: Mapping[str, Any]) -> str | None:
    """Why a reply of LangChain's is not whole, by the server's reason that it keeps."""
    for turn in objects(row.get("messages")):
        fields = next((turn[name] for name in ("data", "kwargs") if isinstance(turn.get(name), Mapping)), turn)
        said = fields.get("response_metadata")
        for name, value in said.items() if isinstance(said, Mapping) else ():
            if name in _ENDINGS and isinstance(value, str) and not is_whole(value):
                return f"the reply was cut ({name} {value!r:.80})"
    return None


def _renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    thought, answer = thought_beside(row), _first_text(row, ("answer", "response", "completion"))
    if objects(row.get("messages")) and answer is not None and says_nothing(row.get("reference")):
        # A gold answer without a thought is no reply.
        is_reply = answer != "answer" or thought is not None
        last = plain_turns(objects(row["messages"])[-1])[-1]
        if is_reply and isinstance(last, Mapping) and role_of(last.get("role")) in ("user", "tool"):
            reply = {"role": "assistant", "content": row[answer], "reasoning_content": thought}
            own = (answer, *_THOUGHTS)
            rest = {name: value for name, value in row.items() if name not in own}
            return rest | {"messages": [*objects(row["messages"]), reply]}
    if all(says_nothing(row.get(name)) for name in _TURNS) and (spoken := _of_transcript(row)):
        return spoken
    if any(not says_nothing(row.get(name)) for name in _KNOWN):
        return row
    for name in _CONVERSATIONS:
        turns = _turns(row.get(name), takes_texts=name != "history")
        if turns:
            return {**{field: value for field, value in row.items() if field != name}, "messages": turns}
    question, answer = _first_text(row, _QUESTIONS), _first_text(row, _ANSWERS)
    is_known = isinstance(row.get("text"), str) or (question == "question" and row.get("answer") is not None)
    if is_known or question is None or answer is None or (question, answer[:6]) == ("input", "output"):
        return row
    rest = {name: value for name, value in row.items() if name not in (question, answer)}
    if isinstance(row.get("history"), list | tuple):
        return rest | {"instruction": row[question], "output": row[answer]}
    return rest | {"prompt": row[question], "response": row[answer]}


def _of_transcript(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row whose turns are one text, behind `Human:` and `Assistant:`, as a row with turns; None where it is none."""
    name = _first_text(row, ("prompt", "chosen"))
    answer = _first_text(row, ("completion", "response")) if name == "prompt" else None
    pieces = _SPEAKER.split(row[name]) if name is not None else []
    if len(pieces) < 4 or pieces[0] or pieces[1] != "Human":
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if not turns[-1]["content"]:
        turns.pop()
        turns += [] if answer is None else [{"role": "assistant", "content": row[answer].strip()}]
    flat = {field: value for field, value in row.items() if field not in (name, answer, "chosen", "rejected")}
    return flat | {"messages": turns}


def _first_text(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(row.get(name), str) and row[name].strip()), None)


def _turns(value: Any, *, takes_texts: bool) -> list[Any]:
    """The turns of a list of turns, or of texts that user and assistant say in turn; none where it is neither."""
    given = objects(value)
    if given and all(_is_turn(turn) for turn in given):
        return list(given)
    is_texts = takes_texts and isinstance(value, list | tuple) and len(value) > 1
    return _alternating(value) if is_texts and all(isinstance(text, str) for text in value) else []


def _is_turn(turn: Mapping[str, Any]) -> bool:
    plain = plain_turns(turn)
    return all(any(role_of(each.get(name)) for name in ("role", "from")) for each in plain)


def _alternating(texts: Sequence[Any]) -> list[Any]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def thought_beside(row: Mapping[str, Any]) -> str | None:
    """Read the thought that lies beside an answer, in a field of its own.

    Args:
        row: of a data set.

    Returns:
        The thought; None where there is none, or the field only says how the model was set, such as `on` or `high`.
    """
    for name in _THOUGHTS:
        value = row.get(name)
        if isinstance(value, str) and value.strip() and value.strip().lower() not in _SETTINGS:
            return value
    return None


def _of_cohere(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cohere's first API: the earlier turns, the question apart from them, and the reply in `text`."""
    turns: list[Any] = [*row["chat_history"], {"role": "user", "content": row["message"]}]
    if isinstance(row.get("text"), str):
        turns.append({"role": "assistant", "content": row["text"]})
    own = ("message", "chat_history", "text", "preamble")
    flat = {name: value for name, value in row.items() if name not in own} | {"messages": turns}
    return flat if says_nothing(row.get("preamble")) else flat | {"system": row["preamble"]}


def _of_pair(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None] | None:
    """A row with two answers, as a row with the better one; None where it has no two, or no verdict."""
    scored = objects(row.get("completions"))
    if "contents" in row and scored and all(isinstance(each.get("score"), int | float) for each in scored):
        best = max(scored, key=lambda each: float(each["score"]))  # Gemini's preferences
        flat = {name: value for name, value in row.items() if name != "completions"}
        return flat | {"candidates": [{"content": best.get("completion")}]}, None
    names = next((names for names in _PAIRS if all(not says_nothing(row.get(name)) for name in names)), None)
    verdict = _verdict(row)
    if names is None or verdict is None:
        return None
    better, question = row[names[max(verdict, 0)]], row.get("prompt")
    question = row.get("context") if question is None else question
    flat = {name: value for name, value in row.items() if name not in (*names, "prompt", "context")}
    flaw = "both answers are ones that people did not want" if verdict < 0 else None
    if names[0] == "conversation_a":
        return flat | {"messages": better}, flaw
    texts = [listed(value, "the prompt") for value in (question, better)]
    if all(isinstance(value, list | tuple) for value in texts):
        if len(texts[0]) != len(texts[1]) or not all(isinstance(text, str) for text in (*texts[0], *texts[1])):
            raise UnusableRow(
                "the row has a list of questions and a list of answers that do not pair; give each question one text"
            )
        return flat | {"messages": _alternating([text for pair in zip(*texts, strict=True) for text in pair])}, flaw
    return flat | {"prompt": question, "response": better}, flaw


def _verdict(row: Mapping[str, Any]) -> int | None:
    """Which of two answers people preferred, 0 or 1; 0 where they liked both alike, -1 where neither."""
    winner = row.get("winner")
    if isinstance(winner, str):
        word = winner.strip().lower()
        verdicts = {"model_a": 0, "a": 0, "tie": 0, "model_b": 1, "b": 1}
        return -1 if "bad" in word else verdicts.get(word)
    for number, name in enumerate(("winner_model_a", "winner_model_b", "winner_tie")):
        if str(row.get(name)) in ("1", "1.0", "True", "true"):
            return number % 2
    better = row.get("better_response_id")
    if better in (0, 1):
        return int(better)
    for name in _STRENGTHS:
        if isinstance(row.get(name), int | float):
            return int(row[name] > 0)
    return None


def _of_trace(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None] | None:
    """A span's attributes as a conversation; None where the row has none."""
    attributes = row.get("attributes")
    if isinstance(attributes, list | tuple):  # as OTLP writes them
        attributes = {each.get("key"): _of_otlp(each.get("value")) for each in objects(attributes)}
    fields = _nested({**row, **(attributes if isinstance(attributes, Mapping) else {})})
    for asked, answered in _TRACES:
        turns, replies = (listed(_at(fields, path), path) for path in (asked, answered))
        if not objects(turns):
            continue
        if len(objects(replies)) > 1:
            raise UnusableRow(f"{answered} has {len(objects(replies))} replies; a conversation has one")
        flat: dict[str, Any] = {"messages": [*turns, *objects(replies)]}
        system, tools = _at(fields, _TRACE_SYSTEM), _at(fields, _TRACE_TOOLS)
        system = listed(system, _TRACE_SYSTEM)
        flat |= {} if says_nothing(system) else {"system": system}
        flat |= {} if says_nothing(tools) else {"tools": tools}
        finish = next((reply.get("finish_reason") for reply in objects(replies)), None)
        return {"id": row.get("id"), **flat}, None if is_whole(
            finish
        ) else f"the reply was cut (finish_reason {finish!r:.80})"
    return None


def _of_otlp(value: Any) -> Any:
    """A value of an attribute, which lies in a field of its type; a list is one of such values."""
    inner = next(iter(value.values()), None) if isinstance(value, Mapping) else value
    if isinstance(inner, Mapping) and isinstance(inner.get("values"), list):
        return [_of_otlp(each) for each in inner["values"]]
    return inner


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields whose names are paths, such as `gen_ai.prompt.0.role`, as objects in each other."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or not name.startswith(("gen_ai", "llm")):
            continue
        *path, last = name.split(".")
        inner = nested
        for step in path:
            inner = inner.setdefault(step, {}) if isinstance(inner.get(step, {}), dict) else {}
        inner[last] = value
    return nested


def _at(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a path; objects whose names are numbers are a list."""
    value: Any = fields
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return _as_list(value)


def _as_list(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value and all(isinstance(name, str) and name.isdigit() for name in value):
        return [_as_list(value[name]) for name in sorted(value, key=int)]
    return {name: _as_list(entry) for name, entry in value.items()}
