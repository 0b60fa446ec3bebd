"""Prompts: rows of any known format in, `{id, messages, split, source}` out, with a record of what was dropped.

Owns: ids, splits, duplicates, the prompt file. Does not know: the formats (`formats.py`), tokenizers, models.
"""

import hashlib
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from draftsmith import provenance
from draftsmith.data.benchmark_fields import benchmark_fields
from draftsmith.data.chats.messages import Message, as_row, check_askable, is_blank_system, is_plain
from draftsmith.data.formats import Conversation, Format, detect_format, row_id, text_field, to_conversation
from draftsmith.data.sources import Row, read_rows, source_name
from draftsmith.files import atomic_directory, read_jsonl, sha256_file
from draftsmith.json_rows import DROPPED_FILE, Dropped, UnusableRow, dropped_lines, shown_row, summary
from draftsmith.json_text import json_text
from draftsmith.ownership import check_replaceable

SPLITS = ("train", "validation", "test")
PROMPT_FILE = "prompts.jsonl"
STAGE = "draftsmith data prompts"
DOCUMENT_PREFIX = 8
"""Words of a document that are its prompt, unless somebody asks for another number."""


@dataclass(frozen=True)
class Prompt:
    """One thing to ask a target.

    Attributes:
        id: its own, or made from its text.
        messages: the user's turns, after an optional system turn; calls that the data set made, and what tools gave back, in between.
        split: train, validation, test, or a name of the data set's own.
        source: the data set.
        reference: `reference[i]` is the data set's own answer to user turn i (possibly fewer, possibly none): the text that the target's
            own replies are compared with.
        text: of a base model's prompt, a whole document.
        prefix_words: how many of the document's first words are the prompt.
        category: of a benchmark's prompt, by which reports are split; None elsewhere.
        sub_category: a part of the category, if the benchmark names one.
        difficulty: if the benchmark names one.
        tools: definitions of the tools that may be called.
        chat_template_kwargs: variables of the chat template, for this prompt alone.
        place: where it was read (`FILE:LINE`), for messages; it is no part of the prompt.
    """

    id: str
    messages: tuple[Message, ...]
    split: str
    source: str
    reference: tuple[str, ...] = ()
    text: str | None = None
    prefix_words: int | None = None
    category: str | None = None
    sub_category: str | None = None
    difficulty: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    def fields(self) -> dict[str, Any]:
        """Everything but the place: what is written, and what a run's identity depends on.

        Returns:
            The fields by name; `tools` and `chat_template_kwargs` only where the prompt has them.
        """
        fields = asdict(self) | {"messages": tuple(as_row(message) for message in self.messages)}
        empty = [name for name in ("tools", "chat_template_kwargs") if not fields[name]]
        for name in ("place", *empty):
            del fields[name]
        return fields

    def user_turns(self) -> list[list[Message]]:
        """The messages that come before each reply: turn 0 includes the system turn.

        A turn that begins with an assistant's message follows a tool's answer: that call takes the place of the target's own reply. The
        system's turns come before the question behind them, and those at the end before the last reply.

        Returns:
            A list for each reply.
        """
        turns: list[list[Message]] = []
        waiting: list[Message] = []
        following = [message["role"] for message in self.messages[1:]]
        for message, next_role in itertools.zip_longest(self.messages, following):
            waiting.append(message)
            if message["role"] == "user" or (message["role"] == "tool" and next_role != "tool"):
                turns.append(waiting)
                waiting = []
        if turns:
            turns[-1] += waiting
        return turns


@dataclass(frozen=True, kw_only=True)
class PromptSelection:
    """Which prompts of a file are taken.

    Args:
        split: Take only the prompts of this split.
        limit: Take only the first so many prompts; null for all.

    Raises:
        ValueError: a limit below 1.
    """

    split: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1; raise it, or leave it out")


ALL_PROMPTS = PromptSelection()


def prompts(
    source: str,
    out: Path,
    format: Format = "auto",
    validation: float = 0.05,
    test: float = 0.05,
    seed: int = 0,
    limit: int | None = None,
    prefix_words: int = DOCUMENT_PREFIX,
    hub_config: str | None = None,
    hub_split: str = "train",
) -> None:
    """Turns a prompt set into this project's prompt file.

    Reads JSONL, JSON, CSV, Parquet and plain text files, or a hub id. Writes OUT/prompts.jsonl, OUT/dropped.jsonl (each
    row left out, with the reason) and OUT/provenance.json. The same text always gets the same id and split.

    Args:
        source: A file (.jsonl, .json, .csv, .parquet, .txt) or the id of a data set on the hub.
        out: The folder to write; an earlier result of this command there is replaced as a whole, nothing else is.
        format: How a row is read; `auto` decides for each row from its fields.
        validation: Share of the prompts for the validation split.
        test: Share of the prompts for the test split.
        seed: Another seed gives another split.
        limit: Stop after this many prompts.
        prefix_words: Words of a plain document that serve as its prompt.
        hub_config: Configuration name, for a hub id.
        hub_split: Split to read, for a hub id.

    Raises:
        ValueError: an option is out of range, the source cannot be read or has no usable prompt, or the folder holds something else.
    """
    check_replaceable(out, STAGE, [Path(source)])
    _check_shares(validation, test)
    if prefix_words < 1:
        raise ValueError(f"prefix_words is {prefix_words}; a document's prompt needs at least one word")
    read = _ReadPrompts(format)
    for place, row in read_rows(source, hub_config=hub_config, hub_split=hub_split, dropped=read.dropped):
        if limit is not None and len(read.prompts) >= limit:
            break
        split = _given_split(row) or partial(_hashed_split, validation=validation, test=test, seed=seed)
        read.add(place, row, source, split, prefix_words)
    if not read.prompts:
        raise ValueError(f"no usable prompt in {source}: {summary(read.dropped)}; name the format with --format")
    config = {
        "source": source,
        "out": out,
        "format": read.formats,
        "validation": validation,
        "test": test,
        "seed": seed,
    }
    config |= {"limit": limit, "prefix_words": prefix_words, "hub_config": hub_config, "hub_split": hub_split}
    _write(out, read.prompts, read.dropped, config, source)
    if read.unanswered:
        print(summary(read.unanswered, "kept as a prompt, without its answers"))
    formats = f"formats {read.formats}; " if read.is_mixed else ""
    print(f"{len(read.prompts)} prompts in {out} ({_split_counts(read.prompts)}); {formats}{summary(read.dropped)}")


@dataclass
class _ReadPrompts:
    """Prompts and the rows that were dropped. Where the format is `auto`, the fields of each row settle its own."""

    format: Format
    prompts: list[Prompt] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    unanswered: list[Dropped] = field(default_factory=list)
    _formats: set[str] = field(default_factory=set)
    _seen: dict[str, str] = field(default_factory=dict)

    @property
    def formats(self) -> str:
        """The formats of the prompts, for a record."""
        return ", ".join(sorted(self._formats))

    @property
    def is_mixed(self) -> bool:
        """Whether the prompts come from several formats."""
        return len(self._formats) > 1

    def add(
        self, place: str, row: Row, source: str, split: str | Callable[[Conversation], str], prefix_words: int
    ) -> None:
        """Take the prompt of a row.

        Args:
            place: where the row was read.
            row: as it was read.
            source: the data set.
            split: the row's own, or a function that gives that of a conversation.
            prefix_words: words of a document that are its prompt.
        """
        try:
            own_format = detect_format(row) if self.format == "auto" else self.format
            conversation = to_conversation(row, own_format)
            check_askable(conversation.turns)
            _check_new(conversation, place, self._seen)
        except UnusableRow as error:
            self.dropped.append(Dropped(place, str(error), shown_row(row)))
            return
        self._formats.add(own_format)
        if conversation.no_reference:
            self.unanswered.append(Dropped(place, conversation.no_reference))
        chosen = split if isinstance(split, str) else split(conversation)
        self.prompts.append(_prompt(conversation, row, source, chosen, prefix_words))


def read_prompts(path: Path, split: str | None = None, dropped: list[Dropped] | None = None) -> list[Prompt]:
    """Read a prompt file, or the one in a folder that `prompts` wrote.

    Args:
        path: the file or folder.
        split: keep only the prompts of this split.
        dropped: takes the record of each row that is no prompt. None: they are counted on standard error.

    Returns:
        The prompts, in the order of the file.

    Raises:
        ValueError: no row is a prompt, or the split holds none.
    """
    file = path / PROMPT_FILE if path.is_dir() else path
    left_out: list[Dropped] = [] if dropped is None else dropped
    by_id: dict[str, Prompt] = {}
    for line, row in read_jsonl(file, left_out):
        place = f"{file}:{line}"
        try:
            _add_new(_parse(place, row), by_id)
        except UnusableRow as error:
            left_out.append(Dropped(place, str(error), shown_row(row)))
    if not by_id:
        raise ValueError(f"no prompt in {file}: {summary(left_out)}; make the file with `draftsmith data prompts`")
    if dropped is None:
        say_dropped(left_out)
    chosen = [prompt for prompt in by_id.values() if split is None or prompt.split == split]
    if not chosen:
        raise ValueError(f"{file} has no prompt in split {split!r}; it has {_split_counts(list(by_id.values()))}")
    return chosen


def read_question_set(path: Path, split: str | None = None, dropped: list[Dropped] | None = None) -> list[Prompt]:
    """Read a public prompt set as it is, such as a file of Spec-Bench or SPEED-Bench; `prompts` would make the same prompts of it.

    Args:
        path: a JSONL, JSON or Parquet file.
        split: keep only the rows whose own split this is; a row without one is in `test`.
        dropped: takes the record of each row that is no prompt. None: they are counted on standard error.

    Returns:
        The prompts, in the order of the file.

    Raises:
        ValueError: the file cannot be read, no row is a prompt, or the split holds none.
    """
    read = _ReadPrompts("auto", dropped=[] if dropped is None else dropped)
    for place, row in read_rows(str(path), dropped=read.dropped):
        read.add(place, row, str(path), _given_split(row) or "test", DOCUMENT_PREFIX)
    if not read.prompts:
        raise ValueError(f"no usable prompt in {path}: {summary(read.dropped)}")
    if dropped is None:
        say_dropped(read.dropped)
    chosen = [prompt for prompt in read.prompts if split is None or prompt.split == split]
    if not chosen:
        raise ValueError(f"{path} has no prompt in split {split!r}; it has {_split_counts(read.prompts)}")
    return chosen


def _add_new(prompt: Prompt, by_id: dict[str, Prompt]) -> None:
    """Add a prompt to those read so far.

    Raises:
        UnusableRow: an earlier prompt has its id.
    """
    first = by_id.setdefault(prompt.id, prompt)
    if first is not prompt:
        raise UnusableRow(f"the id {prompt.id!r:.80} as in {first.place}")


def say_dropped(dropped: list[Dropped]) -> None:
    """Count the rows that were dropped on standard error, where there are any: for commands that write no `dropped.jsonl`.

    Args:
        dropped: their records.
    """
    if dropped:
        print(summary(dropped), file=sys.stderr)


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """Write prompts as JSONL, one a line, without the fields that are empty.

    Args:
        path: of the file.
        prompts: the prompts.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "w", encoding="utf-8") as file:
        for prompt in prompts:
            row = {key: value for key, value in prompt.fields().items() if value not in (None, ()) or key == "messages"}
            file.write(json_text(row) + "\n")


def _parse(place: str, row: Row) -> Prompt:
    missing = [key for key in ("id", "messages", "split", "source") if row.get(key) is None]
    if missing:
        raise UnusableRow(f"a prompt row needs {missing}")
    if row["messages"] and row.get("text") is not None:
        raise UnusableRow("messages and text; one of them is the prompt")
    conversation = to_conversation(row, detect_format(row))
    if len(conversation.messages) < len(conversation.turns) and row.get("reference") is None:
        raise UnusableRow("an assistant turn, which belongs into 'reference'")
    prefix_words = row.get("prefix_words")
    if prefix_words is not None and (type(prefix_words) is not int or prefix_words < 1):
        raise UnusableRow(f"prefix_words is {prefix_words!r:.80}, not a whole number of 1 or more")
    return Prompt(
        id=row_id(row, ""),
        messages=conversation.messages,
        split=text_field(row, "split"),
        source=text_field(row, "source"),
        reference=conversation.reference,
        text=conversation.text,
        prefix_words=prefix_words,
        tools=conversation.tools,
        chat_template_kwargs=conversation.variables,
        place=place,
        **benchmark_fields(row),
    )


def _prompt(conversation: Conversation, row: Row, source: str, split: str, prefix_words: int) -> Prompt:
    name = source_name(source)
    category = row.get("category")
    own = row.get("source")
    label = own if isinstance(own, str) and own else f"{name}/{category}" if isinstance(category, str) else name
    digest = hashlib.sha256(_normalised(conversation).encode()).hexdigest()[:16]
    words = prefix_words if conversation.text is not None else None
    given = (f"{name}-{digest}", conversation.messages, split, label, conversation.reference)
    prompt = Prompt(*given, text=conversation.text, prefix_words=words, **benchmark_fields(row))
    return replace(prompt, tools=conversation.tools, chat_template_kwargs=conversation.variables)


def _normalised(conversation: Conversation) -> str:
    """What two prompts share when they ask the same: case, width variants, spacing and an empty system turn do not count."""
    said = [message["content"] for message in conversation.messages if not is_blank_system(message)]
    parts = [conversation.text] if conversation.text is not None else said
    parts += [json_text(as_row(message)) for message in conversation.messages if not is_plain(message)]
    parts += [json_text(given) for given in (conversation.tools, conversation.variables) if given]
    text = unicodedata.normalize("NFKC", "\0".join(part or "" for part in parts)).casefold()
    return re.sub(r"[^\S\0]+", " ", text).strip()


def _check_new(conversation: Conversation, place: str, seen: dict[str, str]) -> None:
    key = _normalised(conversation)
    first = seen.setdefault(key, place)
    if first != place:
        raise UnusableRow(f"the same prompt as {first}")


def _check_shares(validation: float, test: float) -> None:
    if not (0 <= validation <= 1 and 0 <= test <= 1 and validation + test <= 1):
        raise ValueError(
            f"validation {validation} and test {test} are shares of all prompts: 0 to 1, together at most 1"
        )


def _given_split(row: Row) -> str | None:
    split = row.get("split")
    return split if isinstance(split, str) and split in SPLITS else None


def _hashed_split(conversation: Conversation, validation: float, test: float, seed: int) -> str:
    """Split by the text's hash, so that adding rows never moves one from training to test."""
    digest = hashlib.sha256(f"{seed}\0{_normalised(conversation)}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


def _write(out: Path, prompts: list[Prompt], dropped: list[Dropped], config: dict[str, Any], source: str) -> None:
    fingerprint = sha256_file(Path(source)) if Path(source).is_file() else "hub"
    with atomic_directory(out, STAGE) as folder:
        write_prompts(folder / PROMPT_FILE, prompts)
        (folder / DROPPED_FILE).write_text(dropped_lines(dropped), encoding="utf-8")
        provenance.write(folder, provenance.record("data prompts", config, {source: fingerprint}))


def _split_counts(prompts: list[Prompt]) -> str:
    return ", ".join(f"{count} {split}" for split, count in Counter(prompt.split for prompt in prompts).items())
