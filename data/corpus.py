"""Tokenized samples from any file this project writes or reads: replies with token ids, conversations, documents.

Owns: which kind a row is, how it becomes a sample, and where each sample lies in its file. Does not know: which fields hold
token ids (`rows_of_ids.py`), caches, targets, how processes share the work (`shared_survey.py`).
"""

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from draftsmith.data.chat_template import ChatTemplate, no_labels
from draftsmith.data.chats.messages import Message
from draftsmith.data.chats.modes import modes_of_sample
from draftsmith.data.chats.reply_marks import ReplyMarks
from draftsmith.data.chats.token_kinds import EVERYTHING, KindCounts, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample, cut, samples_from_turns
from draftsmith.data.chats.tool_calls import read_tools
from draftsmith.data.corpus_survey import COLUMNS, IDS_AS_GENERATED, Survey, begun_anew
from draftsmith.data.formats import Conversation, detect_format, row_id, to_conversation
from draftsmith.data.progress import progress
from draftsmith.data.prompts import PROMPT_FILE, say_dropped
from draftsmith.data.rows_of_ids import sample_of_ids, turns_begun_anew, turns_of
from draftsmith.escapes import one_line
from draftsmith.files import sha256_file
from draftsmith.json_rows import Dropped, UnusableRow, check_lines, check_values, is_blank, parse_object, shown, summary
from draftsmith.json_text import parse_json_object

RESPONSE_GLOB = "responses*.jsonl"
_PART_LINES, _PART_BYTES = 4096, 2**25
_NO_TOKEN = "no token is trained on"
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Part:
    """Consecutive lines of one of a corpus's files.

    Attributes:
        file: which file, counted from 0.
        first_line: number of the first line, from 1.
        first_byte: where that line begins.
        num_lines: how many lines.
    """

    file: int
    first_line: int
    first_byte: int
    num_lines: int


class Corpus:
    """All samples of a source, read anew in each pass so that a large one need not fit in memory.

    Reading all of it takes a pass over every token. A survey remembers where each sample lies, so that `samples` reads
    and tokenizes those of one shard and no other row. A row that cannot be read is left out of every pass alike.

    Args:
        source: a JSONL file, or a folder that `data respond` or `data prompts` wrote.
        chat: makes the template when a row needs one; rows with token ids never do.
        split: keep the rows of this split only.
        max_length: samples are cut to this many tokens.
        vocab_size: rows with token ids that are not below this are left out; None: only those that no model has.
        trained_on: what of the assistant's turns is trained on.

    Raises:
        ValueError: the path is missing, or its replies are not finished.
    """

    def __init__(
        self,
        source: Path,
        chat: Callable[[], ChatTemplate],
        split: str | None,
        max_length: int,
        vocab_size: int | None = None,
        trained_on: TrainedOn = EVERYTHING,
    ) -> None:
        self.source = source
        self.files = source_files(source)
        self.split = split
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.trained_on = trained_on
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
        """Check that replies are in the target's token ids.

        Args:
            fingerprint: of the target's tokenizer.

        Raises:
            ValueError: they are in another tokenizer's; the message names both.
        """
        for file in self.files:
            own = (_run_settings(file) or {}).get("tokenizer_fingerprint", fingerprint)
            if own != fingerprint:
                raise ValueError(
                    f"{file} holds token ids of the tokenizer {str(own)[:16]}, this target's is {fingerprint[:16]}; "
                    "make replies with this target"
                )

    def __iter__(self) -> Iterator[TokenizedSample]:
        """Samples that have something to train on, cut to `max_length`."""
        short = (cut(sample, self.max_length) for sample in self.all_samples())
        return (sample for sample in short if sample.num_labelled)

    def survey(self) -> Survey:
        """Read everything once.

        Returns:
            Where each sample lies, and how long it is.

        Raises:
            ValueError: no row can be read, the split is empty, or no token at all is trained on; the message shows the first sample.
        """
        surveys = []
        num_lines = sum(part.num_lines for part in self.parts)
        with progress(f"tokenize {self.source}", num_lines, "lines", brief=True) as advance:
            for part in self.parts:
                surveys.append(self.survey_part(part))
                advance(part.num_lines)
        return self.joined(surveys)

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The corpus in parts of some thousand lines, found without parsing a row: the same for whoever asks.

        Raises:
            ValueError: a file is empty.
        """
        return list(self._parts())

    def _parts(self) -> Iterator[Part]:
        return (part for number, file in enumerate(self.files) for part in _parts_of(number, file))

    def survey_part(self, part: Part) -> Survey:
        """Read one part.

        Args:
            part: one of `parts`.

        Returns:
            The survey of its samples.
        """
        survey, dropped = Survey(), []
        num_rows = num_labelled = num_cut = num_begun_anew = 0
        counts, modes = KindCounts(), Counter[str]()
        for line, place, samples in self._read(part):
            if isinstance(samples, Dropped):
                dropped.append(samples)
                continue
            num_begun_anew += len(samples) > 1
            for number, sample in enumerate(samples):
                short = cut(sample, self.max_length)
                num_rows += 1
                num_cut += short is not sample
                num_labelled += short.num_labelled
                if not short.num_labelled:
                    reason = why_unlabelled(sample, self.max_length)
                    dropped.append(Dropped(self._place(part.file, line), reason, id=sample.id))
                    continue
                counts.add(short.counts)
                modes.update(dict.fromkeys(modes_of_sample(short), short.num_labelled))
                for name, value in zip(COLUMNS, (len(short.input_ids), part.file, line, place, number), strict=True):
                    getattr(survey, name).append(value)
        return replace(
            survey,
            num_rows=num_rows,
            num_labelled=num_labelled,
            num_cut=num_cut,
            num_begun_anew=num_begun_anew,
            trained_tokens=counts.trained,
            read_tokens=counts.read,
            modes=dict(modes),
            mask=self.mask_recipe,
            dropped=dropped,
        )

    def joined(self, surveys: Sequence[Survey]) -> Survey:
        """Join the surveys of all parts.

        Args:
            surveys: of all parts, in order.

        Returns:
            The survey of the whole corpus.

        Raises:
            ValueError: no row can be read, the split is empty, or no token at all is trained on; the message shows the first sample.
        """
        whole = Survey.joined(surveys)
        if not whole.lengths:
            self._check_any(whole.dropped, whole.num_rows)
        return whole

    def _check_any(self, dropped: Sequence[Dropped], num_rows: int) -> None:
        """Say why no sample is left.

        Raises:
            ValueError: always.
        """
        if not num_rows and not dropped:
            raise ValueError(f"{self.files[0]} has no row in split {self.split!r}")
        if num_rows and all(row.reason == _NO_TOKEN for row in dropped):
            raise no_labels(next(self.all_samples([])), self.chat.tokenizer)
        where = "" if self.split is None else f" in split {self.split!r}"
        raise ValueError(f"no sample is left of {self.files[0]}{where}: {summary(dropped)}")

    def samples(self, survey: Survey, first: int, stop: int) -> list[TokenizedSample]:
        """Read some of the samples that a survey kept; no other row is parsed or tokenized.

        Args:
            survey: of this corpus.
            first: number of the first sample.
            stop: one more than the number of the last.

        Returns:
            The samples, cut to `max_length`.

        Raises:
            ValueError: one is not as long as its survey says: the file was changed meanwhile.
        """
        samples: list[TokenizedSample] = []
        row: tuple[int, int] | None = None
        own: Sequence[TokenizedSample] = ()
        for number in range(first, stop):
            file, line, place = survey.files[number], survey.lines[number], survey.places[number]
            if row != (file, place):
                row, own = (file, place), self._samples_at(file, line, place)
            which = survey.numbers[number]
            short = cut(own[which], self.max_length) if which < len(own) else None
            if short is None or len(short.input_ids) != survey.lengths[number]:
                raise ValueError(f"{self._place(file, line)} was changed while it was read; run the same command again")
            samples.append(short)
        return samples

    def _samples_at(self, file: int, line: int, place: int) -> Sequence[TokenizedSample]:
        """The samples of the row that begins at a byte; none where it cannot be read any more."""
        with open(self.files[file], "rb") as lines:
            lines.seek(place)
            outcome = self._outcome(lines.readline(), file, line)
        return outcome if isinstance(outcome, list) else ()

    @property
    def chat(self) -> ChatTemplate:
        """The template, made at its first use."""
        if self._chat is None:
            self._chat = self._make_chat()
        return self._chat

    def all_samples(self, dropped: list[Dropped] | None = None) -> Iterator[TokenizedSample]:
        """Read every sample of the split, whole, whether it has something to train on or not.

        Args:
            dropped: takes the record of each row that is no sample; without it they are counted on standard error at the end.

        Yields:
            Samples, in the order of the rows.
        """
        left_out: list[Dropped] = [] if dropped is None else dropped
        for outcome in self.read():
            if isinstance(outcome, Dropped):
                left_out.append(outcome)
            else:
                yield outcome
        if dropped is None:
            say_dropped(left_out)

    def read(self) -> Iterator[TokenizedSample | Dropped]:
        """Read every row of the split in order. Says at the end, on standard error, how many rows have several samples.

        Yields:
            Whole samples, or why a row has none.
        """
        num_begun_anew = 0
        for part in self._parts():
            for _, _, outcome in self._read(part):
                if isinstance(outcome, Dropped):
                    yield outcome
                else:
                    num_begun_anew += len(outcome) > 1
                    yield from outcome
        if num_begun_anew:
            print(begun_anew(num_begun_anew), file=sys.stderr)

    def _read(self, part: Part) -> Iterator[tuple[int, int, list[TokenizedSample] | Dropped]]:
        """Line, first byte and samples of the part's rows in the split. A row that cannot be parsed is in every split."""
        place = part.first_byte
        with open(self.files[part.file], "rb") as file:
            file.seek(place)
            for line in range(part.first_line, part.first_line + part.num_lines):
                content = file.readline()
                outcome = None if is_blank(content) else self._outcome(content, part.file, line)
                if outcome is not None:
                    yield line, place, outcome
                place += len(content)

    def _place(self, file: int, line: int) -> str:
        return f"{self.files[file]}:{line}"

    def _outcome(self, content: bytes, file: int, line: int) -> list[TokenizedSample] | Dropped | None:
        """The samples of one row, or why it has none; None for a row of another split."""
        row: Mapping[str, Any] = {}
        try:
            row = parse_object(content, any_text=True)
            if self.split is not None and row.get("split") != self.split:
                return None
            return self._samples(row, file, line)
        except UnusableRow as error:
            own_id = row.get("id")
            name = own_id if isinstance(own_id, str) else ""
            return Dropped(self._place(file, line), str(error), shown(content), name)

    def _samples(self, row: Mapping[str, Any], file: int, line: int) -> list[TokenizedSample]:
        """The samples of a row.

        Raises:
            UnusableRow: the row holds no sample, or the template fails on it.
        """
        check_values({"id": row.get("id")})
        sample_id = row_id(row, f"{one_line(self.files[file].stem)}-{line}")
        if row.get("input_ids") is not None:
            return [sample_of_ids(row, sample_id, self.vocab_size)]
        turns = turns_of(row, self.vocab_size)
        if turns is not None:
            anew = turns_begun_anew(row)
            kinds = None if self._marks is None else self._marks.kinds
            make = partial(samples_from_turns, begun_anew=anew, trained_on=self.trained_on, reply_kinds=kinds)
            has_tools = bool(read_tools(row))
            return [replace(sample, has_tools=has_tools) for sample in _or_unusable(make, sample_id, turns)]
        check_values(row)
        conversation = to_conversation(row, detect_format(row))
        if conversation.text is not None:
            return [_or_unusable(self.chat.document, sample_id, conversation.text)]
        return _or_unusable(partial(self._learned, conversation), sample_id, conversation.to_learn_from())

    def _learned(self, conversation: Conversation, sample_id: str, turns: Sequence[Message]) -> list[TokenizedSample]:
        """The samples of a conversation, rendered with its own tools and variables."""
        chat = self.chat.for_row(conversation.tools, conversation.variables)
        return chat.samples(sample_id, turns, self.trained_on)

    @functools.cached_property
    def _marks(self) -> ReplyMarks | None:
        """The marks by which thoughts and tool calls are found in token ids; None for a tokenizer without a template.

        Raises:
            ValueError: there is no template, and only some kinds of tokens are trained on.
        """
        try:
            return self._make_chat().marks
        except ValueError:
            if self.trained_on.kinds != EVERYTHING.kinds:
                raise
            return None


def _or_unusable(make: Callable[[str, T], R], sample_id: str, content: T) -> R:
    try:
        return make(sample_id, content)
    except ValueError as error:
        raise UnusableRow(str(error)) from error


def _parts_of(number: int, path: Path) -> Iterator[Part]:
    """A file in parts.

    Raises:
        ValueError: it has no row.
    """
    line, first_line, first_byte, place, empty = 0, 1, 0, 0, True
    with open(path, "rb") as file:
        for line, content in enumerate(file, start=1):
            if line == 1:
                check_lines(path, content)
            empty = empty and is_blank(content)
            place += len(content)
            if line - first_line + 1 == _PART_LINES or place - first_byte >= _PART_BYTES:
                yield Part(number, first_line, first_byte, line - first_line + 1)
                first_line, first_byte = line + 1, place
    if empty:
        raise ValueError(f"{path} is empty; one JSON object a line is expected")
    if line >= first_line:
        yield Part(number, first_line, first_byte, line - first_line + 1)


def source_files(source: Path) -> list[Path]:
    """List the files of a source, without those of ranks that had nothing to answer.

    Args:
        source: a JSONL file, or a folder that `data respond` or `data prompts` wrote.

    Returns:
        The files, sorted by name.

    Raises:
        ValueError: there is none, a run of replies is not finished, or a rank's replies are missing.
    """
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
    """What `data respond` wrote beside its replies; None for any other file, whatever lies beside it."""
    settings = file.with_name(file.name.replace("responses", "settings", 1).replace(".jsonl", ".json"))
    if not file.match(RESPONSE_GLOB) or not settings.is_file():
        return None
    return parse_json_object(settings.read_bytes(), str(settings), "copy the replies again, with all their files")


def _check_finished(file: Path) -> None:
    """Refuses replies of a run that was stopped, whose rows are fewer than it set out to write."""
    settings = _run_settings(file)
    if settings is None:
        return
    planned = settings.get("num_rows")
    if type(planned) is not int:
        raise ValueError(
            f"the settings beside {file} do not say num_rows; copy the replies again, with all their files"
        )
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


def why_unlabelled(sample: TokenizedSample, max_length: int) -> str:
    """Say why nothing is learned from a sample once it is cut to a length.

    Args:
        sample: whole.
        max_length: in tokens.

    Returns:
        The reason, for a record of dropped rows.
    """
    if sample.num_labelled:
        first = sample.loss_mask.index(True)
        return f"the assistant's first token is at {first}, past the {max_length} tokens a sample may have"
    return _NO_TOKEN
