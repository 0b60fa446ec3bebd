"""The commands `draftsmith label import`, `export` and `stats`.

Owns their options and what they print. Knows nothing of how rows are read or kept.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

from draftsmith.arguments import FLAT
from draftsmith.data.progress import progress
from draftsmith.data.sources import source_name
from draftsmith.escapes import one_line, visible
from draftsmith.files import atomic_file
from draftsmith.hub_options import OWN_FILES, HubOptions
from draftsmith.label.answer_rows import write_answers
from draftsmith.label.commands.entry_options import UNNAMED, EntryOptions
from draftsmith.label.distinct import Distinct
from draftsmith.label.formats import label_studio
from draftsmith.label.formats.counting import FirstStep
from draftsmith.label.formats.detection import Format
from draftsmith.label.formats.importers import LabelledFile, RefusedFile
from draftsmith.label.schema import Answer, How, deciding
from draftsmith.label.store.database import database_file
from draftsmith.label.store.label_source import LabelSource
from draftsmith.label.store.store import Store
from draftsmith.ownership import check_output_file

ExportFormat = Literal["answers", "label-studio"]
After = Literal["ignored", "wrong"]

_SHOWN = 5
_SHOWN_ANSWERS = 1000
_TOKEN_KINDS = ("correct", "wrong", "ignored")


def import_answers(
    source: Path,
    store: str,
    format: Format = "auto",
    model: str | None = None,
    labelled_by: str | None = None,
    how: How | None = None,
    first_step: FirstStep = "auto",
    left_out: Path | None = None,
    entry: Annotated[EntryOptions, FLAT] = UNNAMED,
) -> None:
    """Adds the labelled answers of a file to a store, all of them or none.

    The file may have millions of rows: they are read and added a batch at a time. Importing a file again adds nothing. What is in the store
    is never changed: another label by the same author is one more entry of the log.

    Args:
        source: a JSON, JSON-lines, CSV or Parquet file.
        store: path of the store (SQLite, made when absent), or an SQLAlchemy URL.
        format: how a row is read; `auto` decides from the fields of the first usable row, and from all rows where formats share a field.
        model: the model that wrote the answers, where the file does not say it; default: unknown.
        labelled_by: who labelled, where the file does not say it; default: the name of the file without its suffix.
        how: who or what found the labels: person, rule or mined; default: as the format says.
        first_step: the number of the first step, in formats that name the wrong step by its number; `auto` decides by the rows.
        left_out: a file for the list of all rows that are left out, with the reasons; also written where they stop the import.
        entry: licence of the source, and who imports; see `EntryOptions`.

    Raises:
        RefusedFile: no row can be used, or more rows contradict themselves than name a wrong step without that.
        ValueError: the file or the store cannot be read.
    """
    if left_out is not None:
        check_output_file(left_out, filter(None, [source, database_file(store)]))
    name = source_name(str(source))
    origin = LabelSource(name, labelled_by or name, entry.licence, model, how)
    file = LabelledFile(source, format, origin, first_step, shown=True)
    verdicts: Counter[str] = Counter()
    with _LeftOut(left_out) as unused:
        answers = _counted(file.answers(unused.add), verdicts)
        # Before a store is made: a file of which no row can be used makes none.
        first = list(itertools.islice(answers, 1))
        if not first:
            reason = f"; the first: {unused.shown[0]}" if unused.shown else ""
            raise RefusedFile(f"no row of {source} gives an answer, {unused.count} are left out{reason}")
        with Store(store, create=True, with_first_rows=True) as opened:
            with progress("import", None, "answers", brief=True) as advance:
                coming = _shown(itertools.chain(first, answers), advance)
                added = opened.add(coming, entry.adder())
            print(
                f"{verdicts.total()} answers in {source} ({file.format}): {added.items} new answers and {added.labels} "
                f"new labels in {opened.name}, {added.known_labels} labels known already; {unused.count} rows left out"
            )
    print(f"labels: {_counts(verdicts)}")
    for note in file.notes:
        print(visible(f"note: {note}"))
    for reason in unused.shown:
        print(visible(f"left out: {reason}"))
    if unused.count > _SHOWN:
        where = "; --left_out FILE lists all" if left_out is None else f"; all are in {left_out}"
        print(visible(f"left out: {unused.count - _SHOWN} more{where}"))


class _LeftOut(contextlib.ExitStack):
    """Rows that are left out: how many, the first few, and all of them in a file.

    The file appears when the block ends well, and when all rows were read and none can be used.

    Attributes:
        count: of them.
        shown: the first few.
    """

    def __init__(self, file: Path | None) -> None:
        super().__init__()
        self.count = 0
        self.shown: list[str] = []
        self._lines = None if file is None else self.enter_context(atomic_file(file))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool:
        if not isinstance(error, RefusedFile):
            return bool(super().__exit__(kind, error, trace))
        super().__exit__(None, None, None)
        return False

    def add(self, reason: str) -> None:
        """Takes the place of a row, with the reason."""
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(reason)
        if self._lines is not None:
            self._lines.write(f"{one_line(reason)}\n".encode())


def _counted(answers: Iterable[Answer], verdicts: Counter[str]) -> Iterator[Answer]:
    for answer in answers:
        verdicts[_verdict(answer)] += 1
        yield answer


def _shown(answers: Iterable[Answer], advance: Callable[[int], None]) -> Iterator[Answer]:
    for count, answer in enumerate(answers, start=1):
        yield answer
        if not count % _SHOWN_ANSWERS:
            advance(_SHOWN_ANSWERS)


def export_answers(
    store: str,
    out: Path,
    format: ExportFormat = "answers",
    unlabelled: bool = False,
    decided: bool = False,
    target: str | None = None,
    where: Annotated[HubOptions, FLAT] = OWN_FILES,
) -> None:
    """Writes the answers of a store with the labels that stand, one line for each author's label of each answer.

    Args:
        store: path of the store, or an SQLAlchemy URL.
        out: the file to write; replaced as a whole when it exists.
        format: this project's JSON lines, or Label Studio's JSON.
        unlabelled: write answers without a label too.
        decided: leave out labels that another one replaces: a step that somebody refined, marks between which a third label decides.
        target: path or hub id of a target: each line then holds the character offsets of its tokenizer's tokens.
        where: how the target's files are read; see `HubOptions`.

    Raises:
        ValueError: settings that do not work together, or a store without labelled answers.
    """
    if target is not None and format == "label-studio":
        raise ValueError("label-studio's JSON has no place for tokens; leave --target out, or export answers")
    check_output_file(out, filter(None, [database_file(store)]))
    tally = _Tally()
    with Store(store) as opened:
        answers = opened.stream(unlabelled)
        if decided:
            answers = _decided(answers)
        if target is not None:
            answers = _tokenized(answers, target, where)
        # Before a file is begun: a store without answers writes none.
        first = list(itertools.islice(answers, 1))
        if not first:
            raise ValueError(f"{store} has no labelled answer; import or label some first, or add --unlabelled true")
        coming = tally.counting(itertools.chain(first, answers))
        if format == "answers":
            write_answers(out, coming)
        else:
            label_studio.write_tasks(out, coming)
    print(f"{tally.verdicts.total()} lines of {tally.num_items} answers in {out}: {_counts(tally.verdicts)}")


class _Tally:
    """Counts answers that come by, those of one id together: lines by verdict, ids, and verdicts by source, model and annotator.

    Attributes:
        verdicts: of the lines.
        num_items: different answers.
        groups: the verdicts of each source, model and annotator, by what it is.
    """

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.num_items = 0
        self.groups: dict[str, dict[str, Counter[str]]] = {"source": {}, "model": {}, "labelled by": {}}

    def counting(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Counts answers on their way.

        Args:
            answers: those of one id together.

        Yields:
            each of them.
        """
        last = None
        for answer in answers:
            self.num_items += answer.id != last
            last = answer.id
            verdict = _verdict(answer)
            self.verdicts[verdict] += 1
            label = answer.label
            by = "nobody" if label is None else f"{label.labelled_by} ({label.how})"
            names = (f"{answer.source} ({answer.licence})", answer.model, by)
            for group, name in zip(self.groups.values(), names, strict=True):
                group.setdefault(name, Counter())[verdict] += 1
            yield answer


def _decided(answers: Iterable[Answer]) -> Iterator[Answer]:
    for _, labelled in itertools.groupby(answers, key=lambda answer: answer.id):
        yield from deciding(list(labelled))


def stats(
    store: str,
    target: str | None = None,
    after: After = "ignored",
    where: Annotated[HubOptions, FLAT] = OWN_FILES,
) -> None:
    """Counts what a store holds: by source, model and who labelled, and with a target the labelled tokens.

    Args:
        store: path of the store, or an SQLAlchemy URL.
        target: path or hub id of a target whose tokenizer's tokens are counted.
        after: what the tokens behind the first error count as.
        where: how the target's files are read; see `HubOptions`.
    """
    tally, tokens = _Tally(), Counter[str]()
    with Store(store) as opened, Distinct() as questions:
        num_entries = opened.num_entries()
        answers = tally.counting(opened.stream(unlabelled=True))
        if target is not None:
            answers = _with_token_counts(answers, target, after, where, tokens)
        for answer in answers:
            questions.add(answer.question())
    size = f"{tally.num_items} answers to {questions.count} questions, {num_entries} entries in the log"
    print(f"{size}: {_counts(tally.verdicts)}")
    for title, names in tally.groups.items():
        for name, verdicts in sorted(names.items()):
            print(visible(f"{title} {name}: {_counts(verdicts)}"))
    if target is not None:
        print(f"tokens of {target}: {', '.join(f'{tokens[name]} {name}' for name in _TOKEN_KINDS)}")


def _verdict(answer: Answer) -> str:
    return "unlabelled" if answer.label is None else answer.label.verdict


def _counts(verdicts: Counter[str]) -> str:
    order = ("correct", "wrong", "unplaced", "unlabelled")
    return ", ".join(f"{verdicts[name]} {name}" for name in order if verdicts[name]) or "none"


def _tokenized(answers: Iterable[Answer], target: str, where: HubOptions) -> Iterator[Answer]:
    # Only here: these imports bring torch, which the other ways do not need.
    from draftsmith.label.token_labels import tokenize
    from draftsmith.models.files.loading import load_tokenizer

    tokenizer = load_tokenizer(target, where.revision, where.trust_remote_code)
    for answer in answers:
        yield replace(answer, tokens=tokenize(answer.response, tokenizer))


def _with_token_counts(
    answers: Iterable[Answer], target: str, after: After, where: HubOptions, counts: Counter[str]
) -> Iterator[Answer]:
    """Counts the labelled tokens of answers on their way."""
    from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG, token_labels

    names = dict(zip((CORRECT, WRONG, IGNORED), _TOKEN_KINDS, strict=True))
    for answer in _tokenized(answers, target, where):
        assert answer.tokens is not None
        counts.update(names[label] for label in token_labels(answer, answer.tokens.offsets, after))
        yield answer
