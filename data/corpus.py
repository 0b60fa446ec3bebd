"""Tokenized samples from any file this project writes or reads: replies with token ids, conversations, documents.

Owns: which kind a row is, how it becomes a sample, and where each sample lies in its file. Does not know: caches,
targets, how processes share the work (`shared_survey.py`).
"""

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.data.formats import Message
from draftsmith.data.prompts import PROMPT_FILE, Prompt
from draftsmith.data.tokens import ChatTemplate, TokenizedSample, Turn, cut, from_turns, no_labels
from draftsmith.files import sha256_file

RESPONSE_GLOB = "responses*.jsonl"
IDS_AS_GENERATED = "token ids as generated"
_PART_LINES, _PART_BYTES = 4096, 2**25


@dataclass(frozen=True)
class Skipped:
    """A sample that is not trained on, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Part:
    """Consecutive lines of one of a corpus's files: the first one's number (from 1) and first byte, and how many."""

    file: int
    first_line: int
    first_byte: int
    num_lines: int


@dataclass(frozen=True)
class Survey:
    """What a corpus, or a part of it, holds once it is cut to a length.

    Of each sample kept, in order: its tokens (`lengths`), and the file, line and byte where its row begins. `mask` says
    how loss masks were found. The columns are arrays, since a corpus may have ten million samples.
    """

    lengths: array = field(default_factory=lambda: array("i"))
    files: array = field(default_factory=lambda: array("i"))
    lines: array = field(default_factory=lambda: array("q"))
    places: array = field(default_factory=lambda: array("q"))
    num_rows: int = 0
    num_labelled: int = 0
    num_cut: int = 0
    mask: str = IDS_AS_GENERATED
    skipped: Sequence[Skipped] = ()


class Corpus:
    """All samples of a source, read anew in each pass so that a large one need not fit in memory.

    Reading all of it takes a pass over every token. A survey remembers where each sample lies, so that `samples` reads
    and tokenizes those of one shard and no other row.

    Args:
        source: a JSONL file, or a folder that `data respond` or `data prompts` wrote.
        chat: makes the template when a row needs one; rows with token ids never do.
        split: keep the rows of this split only.
        max_length: samples are cut to this many tokens.

    Raises ValueError for a missing path, and later, with file and line, for rows that cannot be read.
    """

    def __init__(self, source: Path, chat: Callable[[], ChatTemplate], split: str | None, max_length: int) -> None:
        self.source = source
        self.files = source_files(source)
        self.split = split
        self.max_length = max_length
        self._make_chat = chat
        self._chat: ChatTemplate | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the files' contents, in order."""
        return hashlib.sha256("".join(sha256_file(file) for file in self.files).encode()).hexdigest()

    @property
    def mask_recipe(self) -> str:
        """How masks were found in the rows read so far."""
        return IDS_AS_GENERATED if self._chat is None else self._chat.mask_recipe

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuses replies in another tokenizer's ids. Raises ValueError naming both."""
        for file in self.files:
            own = (_run_settings(file) or {}).get("tokenizer_fingerprint", fingerprint)
            if own != fingerprint:
                raise ValueError(
                    f"{file} holds token ids of the tokenizer {own[:16]}, this target's is {fingerprint[:16]}; "
                    "make replies with this target"
                )

    def __iter__(self) -> Iterator[TokenizedSample]:
        """Samples that have something to train on, cut to `max_length`."""
        short = (cut(sample, self.max_length) for sample in self.all_samples())
        return (sample for sample in short if sample.num_labelled)

    def survey(self) -> Survey:
        """Reads everything once.

        Raises ValueError when the split is empty or no token at all is trained on, showing the first sample.
        """
        return self.joined([self.survey_part(part) for part in self.parts])

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The corpus in parts of some thousand lines, found without parsing a row: the same for whoever asks.

        Raises ValueError for an empty file.
        """
        return list(self._parts())

    def _parts(self) -> Iterator[Part]:
        return (part for number, file in enumerate(self.files) for part in _parts_of(number, file))

    def survey_part(self, part: Part) -> Survey:
        """Reads one part. Raises ValueError, with file and line, for rows that cannot be read."""
        lengths, files, lines, places = array("i"), array("i"), array("q"), array("q")
        skipped: list[Skipped] = []
        num_rows = num_labelled = num_cut = 0
        for line, place, row in self._rows(part):
            sample = self._sample(row, part.file, line)
            short = cut(sample, self.max_length)
            num_rows += 1
            num_cut += short is not sample
            if short.num_labelled:
                for column, value in zip(
                    (lengths, files, lines, places), (len(short.input_ids), part.file, line, place), strict=True
                ):
                    column.append(value)
                num_labelled += short.num_labelled
            else:
                skipped.append(Skipped(sample.id, _why_unlabelled(sample, self.max_length)))
        return Survey(lengths, files, lines, places, num_rows, num_labelled, num_cut, self.mask_recipe, skipped)

    def joined(self, surveys: Sequence[Survey]) -> Survey:
        """The survey of the whole corpus, of those of all its parts in order.

        Raises ValueError when the split is empty or no token at all is trained on, showing the first sample.
        """
        lengths, files, lines, places = array("i"), array("i"), array("q"), array("q")
        for survey in surveys:
            lengths += survey.lengths
            files += survey.files
            lines += survey.lines
            places += survey.places
        skipped = [row for survey in surveys for row in survey.skipped]
        if not any(survey.num_rows for survey in surveys):
            raise ValueError(f"{self.files[0]} has no row in split {self.split!r}")
        if not lengths and skipped[0].reason.startswith("no token"):
            raise no_labels(next(self.all_samples()), self.chat.tokenizer)
        if not lengths:
            raise ValueError(f"no sample is left of {self.files[0]}: {skipped[0].id}: {skipped[0].reason}")
        return Survey(
            lengths,
            files,
            lines,
            places,
            num_rows=sum(survey.num_rows for survey in surveys),
            num_labelled=sum(survey.num_labelled for survey in surveys),
            num_cut=sum(survey.num_cut for survey in surveys),
            mask=next((survey.mask for survey in surveys if survey.mask != IDS_AS_GENERATED), IDS_AS_GENERATED),
            skipped=skipped,
        )

    def samples(self, survey: Survey, first: int, stop: int) -> list[TokenizedSample]:
        """The kept samples number `first` to `stop - 1`, cut: no other row is parsed or tokenized.

        Raises ValueError when one is not as long as its survey says: the file was changed meanwhile.
        """
        found = []
        for number in range(first, stop):
            path, line = self.files[survey.files[number]], survey.lines[number]
            with open(path, "rb") as file:
                file.seek(survey.places[number])
                row = _row(path, line, file.readline())
            sample = cut(self._sample(row, survey.files[number], line), self.max_length)
            if len(sample.input_ids) != survey.lengths[number]:
                raise ValueError(f"{path}:{line} was changed while it was read; run the same command again")
            found.append(sample)
        return found

    @property
    def chat(self) -> ChatTemplate:
        """The template, made at its first use."""
        if self._chat is None:
            self._chat = self._make_chat()
        return self._chat

    def all_samples(self) -> Iterator[TokenizedSample]:
        """Every sample of the split, whole, whether it has something to train on or not."""
        for part in self._parts():
            for line, _, row in self._rows(part):
                yield self._sample(row, part.file, line)

    def _rows(self, part: Part) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Line, first byte and content of the part's rows in the split."""
        path, place = self.files[part.file], part.first_byte
        with open(path, "rb") as file:
            file.seek(place)
            for line in range(part.first_line, part.first_line + part.num_lines):
                content = file.readline()
                row = _row(path, line, content) if content.strip() else None
                if row is not None and (self.split is None or row.get("split") == self.split):
                    yield line, place, row
                place += len(content)

    def _sample(self, row: Mapping[str, Any], file: int, line: int) -> TokenizedSample:
        place = f"{self.files[file]}:{line}"
        sample_id = str(row.get("id", f"{self.files[file].stem}-{line}"))
        try:
            turns = turns_of(row)
            if turns is not None:
                return from_turns(sample_id, turns)
            if isinstance(row.get("text"), str):
                return self.chat.document(sample_id, row["text"])
            return self.chat.conversation(sample_id, conversation_of(row))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place}: neither replies with token ids nor a conversation ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _parts_of(number: int, path: Path) -> Iterator[Part]:
    """A file in parts. Raises ValueError when it has no row."""
    line, first_line, first_byte, place, empty = 0, 1, 0, 0, True
    with open(path, "rb") as file:
        for line, content in enumerate(file, start=1):
            empty = empty and not content.strip()
            place += len(content)
            if line - first_line + 1 == _PART_LINES or place - first_byte >= _PART_BYTES:
                yield Part(number, first_line, first_byte, line - first_line + 1)
                first_line, first_byte = line + 1, place
    if empty:
        raise ValueError(f"{path} is empty; one JSON object a line is expected")
    if line >= first_line:
        yield Part(number, first_line, first_byte, line - first_line + 1)


def _row(path: Path, line: int, content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{line}: not valid JSON: {error}; mend or delete the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{line}: not a JSON object but {type(row).__name__}; one object a line is expected")
    return row


def template_digest(template: str | None) -> str | None:
    """sha256 of a template that stands in for the tokenizer's own: of the file's content, or of the word; None for none."""
    if template is None:
        return None
    path = Path(template)
    return hashlib.sha256(path.read_bytes() if path.is_file() else template.encode()).hexdigest()


def source_files(source: Path) -> list[Path]:
    """The files that a source stands for, without those of ranks that had nothing to answer. Raises ValueError when there is none."""
    if source.is_dir():
        files = sorted(source.glob(RESPONSE_GLOB)) or sorted(source.glob(PROMPT_FILE))
        if not files:
            raise ValueError(
                f"{source} has neither {RESPONSE_GLOB} nor {PROMPT_FILE}; run `draftsmith data respond` first"
            )
        for file in files:
            _check_finished(file)
        _check_all_ranks(files)
        written = [file for file in files if (_run_settings(file) or {}).get("num_rows") != 0]
        if not written:
            raise ValueError(
                f"{source} has no reply: no rank had a prompt that could be answered; see its dropped*.jsonl"
            )
        return written
    if not source.is_file():
        raise ValueError(f"no such file: {source}; check the path")
    return [source]


def _run_settings(file: Path) -> dict[str, Any] | None:
    """What `data respond` wrote beside its replies; None for any other file."""
    settings = file.with_name(file.name.replace("responses", "settings").replace(".jsonl", ".json"))
    if settings == file or not settings.is_file():
        return None
    found: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    return found


def _check_finished(file: Path) -> None:
    """Refuses replies of a run that was stopped, whose rows are fewer than it set out to write."""
    settings = _run_settings(file)
    if settings is None:
        return
    planned = settings["num_rows"]
    with open(file, "rb") as lines:
        there = sum(1 for _ in lines)
    if there < planned:
        raise ValueError(
            f"{file} has {there} of {planned} replies; run the same `draftsmith data respond` again to finish it"
        )


def _check_all_ranks(files: list[Path]) -> None:
    """Refuses a folder to which some ranks have not written."""
    ranked = [file.stem.rpartition("-of-") for file in files if "-of-" in file.stem]
    if ranked and len(ranked) < int(ranked[0][2]):
        raise ValueError(
            f"{files[0].parent} has the replies of {len(ranked)} of {int(ranked[0][2])} ranks; run the others too"
        )


def turns_of(row: Mapping[str, Any]) -> list[Turn] | None:
    """Exchanges in token ids: `turns`, or one `prompt_ids` and `reply_ids`; None for a row without ids."""
    if "prompt_ids" in row and "reply_ids" in row:
        return [Turn(list(row["prompt_ids"]), list(row["reply_ids"]), str(row.get("finish", "")))]
    turns = row.get("turns")
    if not turns or not isinstance(turns[0], Mapping) or "reply_ids" not in turns[0]:
        return None
    return [Turn(list(t["prompt_ids"]), list(t["reply_ids"]), str(t["finish"])) for t in turns]


def conversation_of(row: Mapping[str, Any]) -> list[Message]:
    """A data set's own conversation: `messages` with assistant turns, or user turns and `reference` answers."""
    messages = [Message(role=str(m["role"]), content=str(m["content"])) for m in row["messages"]]
    if "reference" not in row:
        return messages
    prompt = Prompt(id="", messages=tuple(messages), split="", source="")
    conversation: list[Message] = []
    for turn, answer in zip(prompt.user_turns(), row["reference"], strict=False):
        conversation += [*turn, Message(role="assistant", content=str(answer))]
    return conversation or messages


def _why_unlabelled(sample: TokenizedSample, max_length: int) -> str:
    if sample.num_labelled:
        first = sample.loss_mask.index(True)
        return f"the assistant's first token is at {first}, past the {max_length} tokens a sample may have"
    return "no token is trained on"
