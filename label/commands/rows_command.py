"""The command `draftsmith label rows`: labelled answers as token rows of one target.

Owns how an answer becomes a row: prompt by the chat template, labels by characters. Owns what happens where labels of one answer disagree,
and which answers are left out. Knows nothing of caches and training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT
from draftsmith.data.prompts import say_dropped
from draftsmith.data.tokens import ChatTemplate, chat_of
from draftsmith.foreign import visible
from draftsmith.json_rows import Dropped, summary
from draftsmith.label.row_checks import SILENT, UNPLACED, UNTOUCHED, LeftOut, RowChecks
from draftsmith.label.schema import Answer, deciding, read_answers
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
    labelled = _read(store, answers)
    revision, trust = where.revision, where.trust_remote_code
    tokenizer = where.tokenizer(target)
    length = max_length or context_of(read_config(resolve(target, revision), trust))
    chat = chat_of(target, tokenizer, rendering.template, revision, trust, rendering.options)
    made = make_rows(labelled, tokenizer, chat, after, length, step)
    if not one_class:
        _refuse_one_class(made, store or str(answers))
    write_rows(out, made.rows)
    _tell(made, out)


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
    by_id: dict[str, list[Answer]] = {}
    for answer in answers:
        group = by_id.setdefault(answer.id, [])
        if group and (group[0].messages, group[0].response) != (answer.messages, answer.response):
            raise ValueError(f"{answer.id}: two answers have this id; give each an id of its own, or none")
        if answer.label is not None:
            group.append(answer)
    checks = RowChecks(tokenizer, chat, max_length)
    for group in by_id.values():
        if group:
            try:
                _add(made, deciding(group), checks, after, step)
            except LeftOut as reason:
                made.left_out.append((reason.detail, reason.reason))
    return made


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


def _add(made: MadeRows, group: Sequence[Answer], checks: RowChecks, after: After, step: StepRule) -> None:
    """Adds the row of an answer, or raises `LeftOut`."""
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
    made.num_disputed += disputed
    made.num_realigned += any(
        answer.tokens is not None and answer.tokens.tokenizer != tokens.tokenizer for answer in placed
    )
    how = "+".join(sorted({answer.label.how for answer in placed if answer.label is not None}))
    made.rows.append(LabelledRow(first.id, first.question(), first.source, how, prompt_ids, reply_ids, labels))


def _read(store: str | None, answers: Path | None) -> list[Answer]:
    if answers is not None:
        dropped: list[Dropped] = []
        labelled = list(read_answers(answers, dropped))
        if not labelled:
            raise ValueError(f"no line of {answers} is an answer; {summary(dropped)}")
        say_dropped(dropped)
        return labelled
    assert store is not None
    with Store(store) as opened:
        return opened.answers()


def _counts(made: MadeRows) -> Counter[int]:
    return Counter(label for row in made.rows for label in row.labels)


def _refuse_one_class(made: MadeRows, source: str) -> None:
    counts = _counts(made)
    if counts[CORRECT] and counts[WRONG]:
        return
    left_out = f" ({_reasons(made)})" if made.left_out else ""
    raise ValueError(
        f"{source} gives {counts[CORRECT]} correct and {counts[WRONG]} wrong tokens, {len(made.left_out)} answers left out{left_out}; a "
        "judge learns from both kinds; label more answers"
    )


def _reasons(made: MadeRows) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(why for _, why in made.left_out).most_common())


def _tell(made: MadeRows, out: Path) -> None:
    counts = _counts(made)
    questions = len({row.question for row in made.rows})
    print(
        f"{len(made.rows)} rows of {questions} questions in {out}: {counts[CORRECT]} correct, {counts[WRONG]} wrong and "
        f"{counts[IGNORED]} ignored tokens"
    )
    if made.num_realigned:
        print(
            f"{made.num_realigned} answers were labelled on another tokenizer's tokens; their labels were placed by characters"
        )
    if made.num_disputed:
        print(
            f"{made.num_disputed} answers have labels that contradict each other; their tokens are ignored from there on"
        )
    if made.left_out:
        example, reason = made.left_out[0]
        print(visible(f"{len(made.left_out)} answers left out: {_reasons(made)} (first: {example}: {reason})"))
