"""Rows whose fields have other names than the formats know: traces, Cohere's, questions with their answers, answers that people compared.

Owns: these names, and how such a row becomes one of a known format. Does not know: fields of turns, requests, templates.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import listed, objects
from draftsmith.data.chats.spellings import ROLE_FIELDS, is_whole, plain_turns, role_of
from draftsmith.data.chats.tool_calls import says_nothing
from draftsmith.json_rows import UnusableRow, parse_object

# Fields that a format is known by; a row with one of them keeps its names.
_KNOWN = ("messages", "conversations", "conversation", "instruction", "contents", "turns", "prompt")
_FORMED = (*_KNOWN, "text", "question", "chosen")
_BENCHMARK = ("question_id", "multiturn")
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
# A message of a tree has a text, as documents have.
_WITH_TEXT = (("parent_id", "message_id"), ("message_id", "role"), ("message_tree_id",))
_SPEAKERS = ("system", "user", "human", "prompter", "assistant", "gpt")
# What a question may need, at a place in its words that no field tells.
_BESIDE_QUESTION = ("context", "passage", "definition", "history")
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
    asked = ("prompt", "question", "turns", "input", "chosen")
    if any(isinstance(row.get(name), str | list | tuple) for name in asked):
        return
    pieces = _PIECES
    if isinstance(row.get("text"), str):  # documents may have segments, or the number of a mail
        is_turn = row.get("role") in _SPEAKERS
        pieces = {names: what for names, what in _PIECES.items() if is_turn and names in _WITH_TEXT}
    names = next((names for names in pieces if all(name in row for name in names)), None)
    if names is not None:
        raise UnusableRow(
            f"the row is {_PIECES[names]}, by its {' and '.join(names)}; write each conversation as one row with `messages`, "
            "a list of turns with `role` and `content`"
        )
    if row.get("role") in _SPEAKERS and any(isinstance(row.get(name), str) for name in ("text", "content")):
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
    row = _of_run(row)
    if any("message" in choice for choice in objects(row.get("output"))):
        row = {**{name: value for name, value in row.items() if name != "output"}, "choices": row["output"]}
    traced = _of_trace(row)
    if traced is not None:
        return traced
    if _is_cohere(row):
        return _of_cohere(row), None
    row, flaw = _of_pair(row)
    return _renamed(row), flaw or _cut_turn(row)


def _has(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether one of some fields says something."""
    return any(not says_nothing(row.get(name)) for name in names)


def _of_run(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run of LangSmith's, whose inputs and outputs are objects, as a row of their fields; another row as it is.

    A chain calls its answer `text`, which elsewhere is a document.
    """
    inputs, outputs = row.get("inputs"), row.get("outputs")
    is_own = _has(row, (*_FORMED, "input", "request", "body", "response"))
    if is_own or not isinstance(inputs, Mapping) or not isinstance(outputs, Mapping) or "messages" in inputs:
        return row
    if "contents" in inputs:
        return row
    asked, said = dict(inputs), dict(outputs)
    if isinstance(asked.get("text"), str):
        asked["prompt" if _first_text(asked, ("prompt", *_QUESTIONS)) is None else "context"] = asked.pop("text")
    if isinstance(said.get("text"), str):
        said["response"] = said.pop("text")
    return {**{name: value for name, value in row.items() if name not in ("inputs", "outputs")}, **asked, **said}


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
    if objects(row.get("messages")):
        return _with_reply(row)
    if all(says_nothing(row.get(name)) for name in _TURNS) and (spoken := _of_transcript(row)):
        return spoken
    question, answer = _first_text(row, _QUESTIONS), _first_text(row, _ANSWERS)
    is_known = (question == "question" and row.get("answer") is not None) or (
        _first_text(row, ("input",)) is not None and row.get("output") is not None
    )
    if is_known or _has(row, (*_KNOWN, "text")):
        return row
    is_other = question is not None or _has(row, ("chosen", "input", "request", "body"))
    for name in () if is_other else _CONVERSATIONS:
        turns = _turns(row.get(name), takes_texts=name != "history")
        if turns:
            return {**{field: value for field, value in row.items() if field != name}, "messages": turns}
    if question is None or answer is None:
        return row
    rest = {name: value for name, value in row.items() if name not in (question, answer)}
    history = row.get("history")
    if turns := _turns(history, takes_texts=False):
        own = [{"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]}]
        return {name: value for name, value in rest.items() if name != "history"} | {"messages": [*turns, *own]}
    if isinstance(history, list | tuple) or (isinstance(history, str) and history.lstrip().startswith("[")):
        return rest | {"instruction": row[question], "output": row[answer]}
    if (question, answer) != ("question", "response"):
        _check_alone(question, row)
    return rest | {"prompt": row[question], "response": row[answer]}


def _check_alone(question: str, row: Mapping[str, Any]) -> None:
    """Check that no text lies beside a question that may need it."""
    name = _first_text(row, _BESIDE_QUESTION)
    if name is not None:
        raise UnusableRow(
            f"the row has {name} beside {question}, and no field says where it belongs in the prompt; put it into {question}, or remove it"
        )


def _with_reply(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with turns that a reply beside them answers, as one with all turns; as it is where they are prompts, or have the answer.

    An `answer` without a thought is a gold answer.
    """
    thoughts = {name: row[name] for name in _THOUGHTS if _is_thought(row.get(name))}
    answer = _first_text(row, ("response", "completion", *(("answer",) if thoughts else ())))
    is_prompt = _has(row, ("reference", *_BENCHMARK)) or {"id", "split", "source"} <= row.keys()
    if answer is None or is_prompt or _is_response(row[answer]):
        return row
    turns = objects(row["messages"])
    last = plain_turns(turns[-1])[-1]
    if not isinstance(last, Mapping) or role_of(last.get("role")) not in ("user", "tool"):
        return row
    rest = {name: value for name, value in row.items() if name not in (answer, *_THOUGHTS)}
    return rest | {"messages": [*turns, {"role": "assistant", "content": row[answer], **thoughts}]}


def _is_response(text: str) -> bool:
    """Whether a text is the JSON of a server's response, which a log's reader takes apart."""
    with contextlib.suppress(UnusableRow):  # then it is words
        return bool(
            {"choices", "candidates", "output", "role", "message"}
            & parse_object(text.encode(errors="surrogatepass")).keys()
        )
    return False


def _of_transcript(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row whose `prompt` or `chosen` is one text of turns, behind `Human:` and `Assistant:`, with a list of turns there; else None.

    Such a prompt ends where the assistant has to speak, and such a chosen text with its words; other texts only show turns.
    """
    if not says_nothing(row.get("prompt")):
        name = "prompt"
    elif not _has(row, (*_KNOWN, "text", *_QUESTIONS)):
        name = "chosen"
    else:
        return None
    text = row.get(name)
    turns = _spoken_turns(text) if isinstance(text, str) else []
    is_open = bool(turns) and len(turns) % 2 == 0 and not turns[-1]["content"]
    turns = turns[:-1] if is_open else turns
    if len(turns) < (1 if is_open else 2) or not all(turn["content"] for turn in turns):
        return None
    if is_open != (name == "prompt") or (name == "chosen" and len(turns) % 2):
        return None
    spoken = {field: value for field, value in row.items() if field != "prompt"} | {name: turns}
    for field in ("completion", "response", "chosen") if name == "prompt" else ():
        if isinstance(row.get(field), str):
            spoken[field] = row[field].removeprefix(text).strip()
    return spoken


def _spoken_turns(text: str) -> list[dict[str, str]]:
    """The turns of a text in which the human begins and both speak in turn; none of another text."""
    pieces = _SPEAKER.split(text)
    roles = [{"Human": "user", "Assistant": "assistant"}[speaker] for speaker in pieces[1::2]]
    if (
        pieces[0]
        or len(roles) < 2
        or any(role != ("user", "assistant")[number % 2] for number, role in enumerate(roles))
    ):
        return []
    return [{"role": role, "content": words.strip()} for role, words in zip(roles, pieces[2::2], strict=True)]


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
        The thought; None where there is none, the field only says how the model was set, such as `on` or `high`, or it may tell why people
        preferred an answer.

    Raises:
        UnusableRow: two fields have different thoughts.
    """
    thoughts = {name: row[name] for name in _THOUGHTS if _is_thought(row.get(name))}
    if row.get("rejected") is not None or not thoughts:
        return None
    if len({thought.strip() for thought in thoughts.values()}) > 1:
        raise UnusableRow(f"the row has two different thoughts, {' and '.join(thoughts)}; one of them is enough")
    return next(iter(thoughts.values()))


def _is_thought(value: Any) -> bool:
    """Whether a value is more than one word, or the JSON text of an object: those are settings, or name a kind of question."""
    return (
        isinstance(value, str)
        and not value.lstrip().startswith("{")
        and (len(value.split(None, 1)) > 1 or not value.isascii())
    )


def _is_cohere(row: Mapping[str, Any]) -> bool:
    """Whether a row has the question and the earlier turns apart, and no format of its own."""
    has_both = isinstance(row.get("message"), str) and isinstance(row.get("chat_history"), list | tuple)
    return has_both and not _has(row, (*_KNOWN, "question", "chosen", "input"))


def _of_cohere(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cohere's first API: the earlier turns, the question apart from them, and the reply in `text`."""
    turns: list[Any] = [*row["chat_history"], {"role": "user", "content": row["message"]}]
    answer = _first_text(row, ("text", "response", "completion", "output"))
    if answer is not None:
        turns.append({"role": "assistant", "content": row[answer]})
    own = ("message", "chat_history", answer, "preamble")
    flat = {name: value for name, value in row.items() if name not in own} | {"messages": turns}
    return flat if says_nothing(row.get("preamble")) else flat | {"system": row["preamble"]}


def _of_pair(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """A row with two answers, as a row with the better one; as it is where it has no two, no verdict, or an answer of its own."""
    scored = objects(row.get("completions"))
    is_open = bool(contents := objects(row.get("contents"))) and contents[-1].get("role") != "model"
    if is_open and scored and all(isinstance(each.get("score"), int | float) for each in scored):
        best = max(scored, key=lambda each: float(each["score"]))  # Gemini's preferences
        flat = {name: value for name, value in row.items() if name != "completions"}
        return flat | {"candidates": [{"content": best.get("completion")}]}, None
    names = next((names for names in _PAIRS if all(not says_nothing(row.get(name)) for name in names)), None)
    verdict = _verdict(row)
    if names is None or verdict is None or _has(row, ("completion", "response", "chosen", "output", "answer")):
        return row, None
    flaw = "both answers are ones that people did not want" if verdict < 0 else None
    # What is thought beside two answers is the judge's.
    flat = {name: value for name, value in row.items() if name not in (*names, *_THOUGHTS)}
    better = row[names[max(verdict, 0)]]
    if names[0] == "conversation_a":
        return (row, None) if _has(row, _TURNS) else (flat | {"messages": better}, flaw)
    question = _first_text(row, _QUESTIONS)
    if question is not None and not _has(row, _KNOWN):
        _check_alone(question, row)
    elif row.get("context") is not None and not _has(row, _KNOWN):
        flat["prompt"] = flat.pop("context")
    asked, said = _texts_of(flat.get("prompt")), _texts_of(better)
    if asked and said:
        if len(asked) != len(said):
            raise UnusableRow(
                "the row has a list of questions and a list of answers that do not pair; give each question one text"
            )
        del flat["prompt"]
        turns = _alternating([text for pair in zip(asked, said, strict=True) for text in pair])
        return flat | {"messages": turns}, flaw
    return flat | {"response": better}, flaw


def _texts_of(value: Any) -> list[str]:
    """The texts of a list, which may be JSON text; none where it is anything else."""
    with contextlib.suppress(UnusableRow):  # then it is words
        value = listed(value, "the list")
    is_texts = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
    return list(value) if is_texts else []


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
        if isinstance(row.get(name), int | float) and not math.isnan(row[name]):
            return int(row[name] > 0)
    return None


def _of_trace(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None] | None:
    """A span's attributes as a conversation; None where the row has none, or a format of its own."""
    if _has(row, _FORMED):
        return None
    attributes = row.get("attributes")
    if isinstance(attributes, list | tuple):  # as OTLP writes them
        attributes = {str(each.get("key")): _of_otlp(each.get("value")) for each in objects(attributes)}
    fields = _nested({**row, **(attributes if isinstance(attributes, Mapping) else {})})
    for asked, answered in _TRACES:
        turns, said = objects(_at(fields, asked)), _at(fields, answered)
        if not turns:
            continue
        replies = objects(said)
        if not replies and not says_nothing(said):
            if not isinstance(said, str):
                raise UnusableRow(f"{answered} is {type(said).__name__}, neither a list of turns nor text")
            replies = [{"role": "assistant", "content": said}]
        if len(replies) > 1:
            raise UnusableRow(f"{answered} has {len(replies)} replies; a conversation has one")
        flat: dict[str, Any] = {"messages": [*turns, *replies]}
        system, tools = _at(fields, _TRACE_SYSTEM), _at(fields, _TRACE_TOOLS)
        flat |= {} if says_nothing(system) else {"system": objects(system) or system}
        flat |= {} if says_nothing(tools) else {"tools": tools}
        finish = next((reply.get("finish_reason") for reply in replies), None)
        flaw = None if is_whole(finish) else f"the reply was cut (finish_reason {finish!r:.80})"
        return {"id": row.get("id"), **flat}, flaw
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
    if value and all(isinstance(name, str) and name.isdecimal() for name in value):
        return [_as_list(value[name]) for name in sorted(value, key=int)]
    return {name: _as_list(entry) for name, entry in value.items()}
