"""The command `draftsmith label rows`: labelled answers as token rows of one target.

Owns how an answer becomes a row: prompt by the chat template, labels by characters. Owns what happens where labels of one answer disagree,
and which answers are left out. Knows nothing of caches and training.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT
from draftsmith.data.chat_template import ChatTemplate, chat_of
from draftsmith.data.prompts import say_dropped
from draftsmith.escapes import visible
from draftsmith.json_rows import Dropped, summary
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.distinct import Distinct
from draftsmith.label.row_checks import SILENT, UNPLACED, UNTOUCHED, LeftOut, RowChecks
from draftsmith.label.schema import Answer, deciding
from draftsmith.label.store.database import database_file
from draftsmith.label.store.store import Store
from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG, token_labels, tokenize
from draftsmith.label.token_rows import LabelledRow, write_rows
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config
from draftsmith.models.target.context import context_of
from draftsmith.models.target.options import OWN_FILES, TokenizerOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.ownership import check_output_file

# As in token_labels, which jsonargparse cannot look behind.
After = Literal["ignored", "wrong"]
StepRule = Literal["whole", "first-number", "last-token"]


@dataclass
class MadeRows:
    """Rows, and what became of other answers.

    Attributes:
        rows: of answers with labels.
        left_out: answers left out, each with its reason.
        num_realigned: answers that were labelled on another tokenizer's tokens.
        num_disputed: answers whose labels contradict each other.
    """

    rows: list[LabelledRow] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    num_realigned: int = 0
    num_disputed: int = 0


@dataclass(frozen=True)
class _Outcome:
    """What became of one answer.

    Attributes:
        row: None where the answer is left out.
        left_out: why; None where there is a row.
        is_realigned: it was labelled on another tokenizer's tokens.
        is_disputed: its labels contradict each other.
    """

    row: LabelledRow | None
    left_out: LeftOut | None = None
    is_realigned: bool = False
    is_disputed: bool = False


def rows(
    target: str,
    out: Path,
    store: str | None = None,
    answers: Path | None = None,
    after: After = "ignored",
    step: StepRule = "whole",
    one_class: bool = False,
    max_length: int | None = None,
    where: Annotated[TokenizerOptions, FLAT] = OWN_FILES,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Writes labelled answers as rows of token ids with one label a token: what a judge is trained on.

    The prompt goes through the target's chat template, and labels go by characters, so that labels made on another tokenizer's tokens
    fit too. The file is also a source for `draftsmith data extract`, which caches the states that the labels belong to.

    Args:
        target: path or hub id of the target whose tokenizer and template are used.
        out: the file to write; replaced as a whole when it exists.
        store: a store of labels (path, or an SQLAlchemy URL).
        answers: a file of labelled answers, instead of a store.
        after: what the tokens behind the first error are.
        step: what of an error is wrong that is a whole line, as in imported sets of steps: all of it, its first number or its last token.
            The rest of the line is ignored.
        one_class: write the rows even where all tokens are correct, or all wrong; a judge then needs other rows beside them.
        max_length: leave out rows of more tokens; default: the target's context.
        where: How the target's files are read; see `TokenizerOptions`.
        rendering: The chat template; see `TemplateChoice`.

    Raises:
        ValueError: settings that do not work together, or labels of one class only.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"max_length is {max_length}; it counts tokens: give at least 1, or nothing for the target's context"
        )
    if (store is None) == (answers is None):
        raise ValueError("give either a store (--store) or a file of answers (--answers), and not both")
    check_output_file(out, filter(None, [Path(target), answers, None if store is None else database_file(store)]))
    with contextlib.ExitStack() as opened:
        groups = _groups_of(store, answers, opened)
        revision, trust = where.revision, where.trust_remote_code
        tokenizer = where.tokenizer(target)
        length = max_length or context_of(read_config(resolve(target, revision), trust))
        chat = chat_of(target, tokenizer, rendering.template, revision, trust, rendering.options)
        counts = _RowCounts(opened.enter_context(Distinct()), None if one_class else store or str(answers))
        write_rows(out, counts.rows(_outcomes(groups, RowChecks(tokenizer, chat, length), after, step)))
    counts.tell(out)


def make_rows(
    answers: Iterable[Answer],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate,
    after: After = "ignored",
    max_length: int | None = None,
    step: StepRule = "whole",
) -> MadeRows:
    """One row an answer, in the order of the answers. Several labels of one answer are one row (see merged_labels).

    A label that another one replaces does not count (see `schema.deciding`).

    Args:
        answers: with labels.
        tokenizer: the target's.
        chat: the target's chat template.
        after: what the tokens behind the first error are.
        max_length: leave out rows of more tokens; None keeps all.
        step: what of a wrong step is wrong; see :func:`~draftsmith.label.token_labels.token_labels`.

    Raises:
        ValueError: two answers have one id.
    """
    made = MadeRows()
    for outcome in _outcomes(_by_id(answers), RowChecks(tokenizer, chat, max_length), after, step):
        if outcome.row is not None:
            made.rows.append(outcome.row)
        if outcome.left_out is not None:
            made.left_out.append((outcome.left_out.detail, outcome.left_out.reason))
        made.num_realigned += outcome.is_realigned
        made.num_disputed += outcome.is_disputed
    return made


def _by_id(answers: Iterable[Answer]) -> Iterable[list[Answer]]:
    """The labelled answers of each id, wherever they stand.

    Raises:
        ValueError: two answers have one id.
    """
    by_id: dict[str, list[Answer]] = {}
    for answer in answers:
        group = by_id.setdefault(answer.id, [])
        if group and (group[0].messages, group[0].response) != (answer.messages, answer.response):
            raise ValueError(f"{answer.id}: two answers have this id; give each an id of its own, or none")
        if answer.label is not None:
            group.append(answer)
    return filter(None, by_id.values())


def _outcomes(
    groups: Iterable[Sequence[Answer]], checks: RowChecks, after: After, step: StepRule
) -> Iterator[_Outcome]:
    """What becomes of each answer, which is one group of labels."""
    for group in groups:
        try:
            yield _row_of(deciding(group), checks, after, step)
        except LeftOut as reason:
            yield _Outcome(None, reason)


def merged_labels(several: Sequence[Sequence[int]]) -> tuple[list[int], bool]:
    """Labels of the same tokens by several people as one.

    A label that one person gives and the others leave open is kept. From the first token that two people disagree on, all labels are
    ignored: what follows continues from a mistake, or not.

    Worked example: 1 1 0 - - and 1 1 1 1 - give 1 1 - - -, disagreed; 1 - - and - - 0 give 1 - 0.

    Args:
        several: the labels of each person, as many as there are tokens.

    Returns:
        the labels, and whether people disagreed.
    """
    merged: list[int] = []
    for column in zip(*several, strict=True):
        said = set(column) - {IGNORED}
        if len(said) > 1:
            return merged + [IGNORED] * (len(several[0]) - len(merged)), True
        merged.append(said.pop() if said else IGNORED)
    return merged, False


def _row_of(group: Sequence[Answer], checks: RowChecks, after: After, step: StepRule) -> _Outcome:
    """The row of an answer.

    Raises:
        LeftOut: it gives none.
    """
    first = group[0]
    placed = [answer for answer in group if answer.label is not None and answer.label.verdict != "unplaced"]
    # One who finds no error does not place the error of another.
    if len(placed) < len(group) and not any(answer.label is not None and answer.label.error for answer in placed):
        raise LeftOut(first.id, UNPLACED)
    tokens = tokenize(first.response, checks.tokenizer)
    try:
        labels, disputed = merged_labels([token_labels(answer, tokens.offsets, after, step) for answer in placed])
    except ValueError as error:
        raise LeftOut(first.id, UNTOUCHED, str(error)) from error
    prompt_ids, reply_ids = checks.token_ids(first)
    if set(labels) <= {IGNORED}:
        raise LeftOut(first.id, SILENT)
    realigned = any(answer.tokens is not None and answer.tokens.tokenizer != tokens.tokenizer for answer in placed)
    how = "+".join(sorted({answer.label.how for answer in placed if answer.label is not None}))
    row = LabelledRow(first.id, first.question(), first.source, how, prompt_ids, reply_ids, labels)
    return _Outcome(row, None, realigned, disputed)


def _groups_of(store: str | None, answers: Path | None, opened: contextlib.ExitStack) -> Iterable[Sequence[Answer]]:
    """The labels of each answer: of a store, one answer after the other; of a file, in which they may stand anywhere, all at once."""
    if store is not None:
        streamed = opened.enter_context(Store(store)).stream()
        return (list(group) for _, group in itertools.groupby(streamed, key=lambda answer: answer.id))
    assert answers is not None
    dropped: list[Dropped] = []
    labelled = list(read_answers(answers, dropped))
    if not labelled:
        raise ValueError(f"no line of {answers} is an answer; {summary(dropped)}")
    say_dropped(dropped)
    return _by_id(labelled)


class _RowCounts:
    """Counts what became of answers on their way into a file.

    Args:
        questions: counts the different questions.
        both_in: the source whose rows must have both classes of tokens; None where one class is enough.
    """

    def __init__(self, questions: Distinct, both_in: str | None) -> None:
        self._questions = questions
        self._both_in = both_in
        self._num_rows = self._num_realigned = self._num_disputed = 0
        self._labels: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._example = ""

    def rows(self, outcomes: Iterable[_Outcome]) -> Iterator[LabelledRow]:
        """Counts outcomes.

        Args:
            outcomes: of all answers.

        Yields:
            the rows.

        Raises:
            ValueError: behind the last row, where they have one class of tokens and need both.
        """
        for outcome in outcomes:
            self._num_realigned += outcome.is_realigned
            self._num_disputed += outcome.is_disputed
            if outcome.left_out is not None:
                self._example = self._example or f"{outcome.left_out.detail}: {outcome.left_out.reason}"
                self._reasons[outcome.left_out.reason] += 1
            if outcome.row is not None:
                self._num_rows += 1
                self._questions.add(outcome.row.question)
                self._labels.update(outcome.row.labels)
                yield outcome.row
        if self._both_in is not None and not (self._labels[CORRECT] and self._labels[WRONG]):
            left_out = f" ({self._all_reasons()})" if self._reasons else ""
            raise ValueError(
                f"{self._both_in} gives {self._labels[CORRECT]} correct and {self._labels[WRONG]} wrong tokens, "
                f"{self._reasons.total()} answers left out{left_out}; a judge learns from both kinds; label more answers"
            )

    def _all_reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())

    def tell(self, out: Path) -> None:
        """Prints the counts.

        Args:
            out: the file of the rows.
        """
        print(
            f"{self._num_rows} rows of {self._questions.count} questions in {out}: {self._labels[CORRECT]} correct, "
            f"{self._labels[WRONG]} wrong and {self._labels[IGNORED]} ignored tokens"
        )
        if self._num_realigned:
            print(
                f"{self._num_realigned} answers were labelled on another tokenizer's tokens; their labels were placed by characters"
            )
        if self._num_disputed:
            print(
                f"{self._num_disputed} answers have labels that contradict each other; their tokens are ignored from there on"
            )
        if self._reasons:
            print(visible(f"{self._reasons.total()} answers left out: {self._all_reasons()} (first: {self._example})"))
