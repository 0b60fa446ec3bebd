"""The command `draftsmith label corrupt`: answers with one error each, whose place is known because it was put there.

Owns its options, which answers can be spoiled, and what it prints. Does not know how a text is spoiled.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from draftsmith.arguments import FLAT
from draftsmith.data.chats.messages import Message
from draftsmith.data.formats import row_id
from draftsmith.data.prompts import PROMPT_FILE, say_dropped
from draftsmith.files import read_jsonl
from draftsmith.json_rows import Dropped, summary
from draftsmith.label.answer_rows import read_answers, write_answers
from draftsmith.label.corrupt.corpora import Row, Wording, load_corruptor, wrong_answers
from draftsmith.label.corrupt.text_swaps import Swap, SwapKind, swaps
from draftsmith.label.schema import Answer, Label, answer_id, check_answer, check_messages, deciding
from draftsmith.ownership import check_output_file

TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions:
    """How answers are spoiled.

    Args:
        wordings: Wordings of the wrong solutions that a corpus's corruptor writes; mixed takes each line from one of the two others.
        kinds: What the corruptor `text` swaps.
        per_answer: How many wrong answers the corruptor `text` makes of each right one, each with another error.
        seed: Another seed swaps other words; the same one gives the same answers.

    Raises:
        ValueError: a list is empty or names something twice, or per_answer is below 1.
    """

    wordings: tuple[Wording, ...] = ("draft", "target", "mixed")
    kinds: tuple[SwapKind, ...] = ("numbers", "operators", "names")
    per_answer: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("wordings", "kinds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are {values}; give at least one, and each once")
        if self.per_answer < 1:
            raise ValueError(f"per_answer is {self.per_answer}; it must be at least 1")


ALL_WAYS = CorruptionOptions()


def corrupt(
    source: Path,
    out: Path,
    corruptor: str = TEXT,
    licence: str | None = None,
    ways: Annotated[CorruptionOptions, FLAT] = ALL_WAYS,
) -> None:
    """Writes wrong answers, each with one error whose place is known, as labelled answers.

    A judge that has only seen the errors of one draft LM lets those of others stand. These errors are of many kinds, and in every wording.

    Args:
        source: For `text`, a file of labelled answers, of which those without an error are spoiled; else a file of problems.
        out: The file of labelled answers to write; replaced as a whole when it exists.
        corruptor: text swaps numbers, operators and names in right answers; embedded writes wrong solutions of problems of the sums corpus;
            or a function `(row, wording, rng)` of yours as package.module:function or file.py:function.
        licence: Licence of the problems, where their rows do not name one.
        ways: How answers are spoiled; see `CorruptionOptions`.

    Raises:
        ValueError: nothing can be spoiled, or a row has no licence.
    """
    file = source / PROMPT_FILE if source.is_dir() else source
    check_output_file(out, [source, file])
    dropped: list[Dropped] = []
    of_problems = corruptor != TEXT
    made = _of_problems(file, corruptor, licence, ways, dropped) if of_problems else _of_answers(file, ways, dropped)
    answers = list(made)
    if not answers:
        raise ValueError(f"nothing in {file} can be spoiled: {summary(dropped) if dropped else 'it holds no row'}")
    say_dropped(dropped)
    write_answers(out, answers)
    kinds = Counter(answer.label.note for answer in answers if answer.label is not None)
    print(
        f"{len(answers)} wrong answers in {out}: {', '.join(f'{kind} {count}' for kind, count in sorted(kinds.items()))}"
    )


def _of_answers(file: Path, ways: CorruptionOptions, dropped: list[Dropped]) -> Iterator[Answer]:
    labels: dict[str, list[Answer]] = {}
    for answer in read_answers(file, dropped):
        labels.setdefault(answer.id, []).append(answer)
    for group in labels.values():
        labelled = deciding([answer for answer in group if answer.label is not None])
        answer = (labelled or group)[0]
        if not labelled or any(each.label is None or each.label.verdict != "correct" for each in labelled):
            dropped.append(Dropped(f"{file}: {answer.id}", "nobody has found it free of errors", id=answer.id))
            continue
        rng = random.Random(f"{ways.seed}\0{answer.id}")
        places = _within(swaps(answer.response, _prompt_of(answer), ways.kinds, rng), answer)
        if not places:
            dropped.append(Dropped(f"{file}: {answer.id}", "it has nothing to swap", id=answer.id))
        for swap in _chosen(places, ways.per_answer, rng):
            yield _spoiled(answer, swap)


def _within(places: Sequence[Swap], answer: Answer) -> list[Swap]:
    """Those in the part that was checked: elsewhere the first error may be another."""
    first, last = (
        (0, len(answer.response)) if answer.label is None or answer.label.checked is None else answer.label.checked
    )
    return [swap for swap in places if first <= swap.span[0] and swap.span[1] <= last]


def _chosen(places: Sequence[Swap], count: int, rng: random.Random) -> list[Swap]:
    """So many at most; each kind has the same chance, however often it occurs."""
    left = list(places)
    chosen: list[Swap] = []
    while left and len(chosen) < count:
        kind = rng.choice(sorted({swap.kind for swap in left}))
        chosen.append(rng.choice([swap for swap in left if swap.kind == kind]))
        left.remove(chosen[-1])
    return chosen


def _spoiled(answer: Answer, swap: Swap) -> Answer:
    response, error = swap.applied(answer.response)
    before = (answer.label.checked or (0, 0))[0] if answer.label is not None else 0
    label = Label("wrong", "draftsmith label corrupt", "rule", error, (before, error[1]), f"swapped {swap.kind}")
    name = answer_id(answer.source, answer.messages, response, answer.model)
    return replace(answer, id=name, response=response, label=label, tokens=None)


def _prompt_of(answer: Answer) -> str:
    return "\n".join(str(message["content"]) for message in answer.messages)


def _of_problems(
    file: Path, spec: str, licence: str | None, ways: CorruptionOptions, dropped: list[Dropped]
) -> Iterator[Answer]:
    corruptor = load_corruptor(spec)
    for line, row in read_jsonl(file, dropped):
        place = f"{file}:{line}"
        try:
            _check_problem(row, licence, place)
            name = row_id(row, f"line-{line}")
            spoiled = list(wrong_answers(row, ways.wordings, corruptor, f"{ways.seed}\0{name}"))
            answers = [
                _wrong(row, wrong.response, wrong.error, wording, spec, str(row.get("licence") or licence), place)
                for wording, wrong in spoiled
            ]
        except ValueError as error:
            dropped.append(Dropped(place, str(error).removeprefix(f"{place}: ")))
            continue
        yield from answers


def _check_problem(row: Row, licence: str | None, place: str) -> None:
    if not isinstance(row.get("messages"), list):
        raise ValueError("the row has no messages; write its question as messages of a user")
    check_messages(row["messages"], place)
    if not row.get("licence") and licence is None:
        raise ValueError("the licence is not in the row; it goes with every answer; give it with --licence")


def _wrong(
    row: Row, response: str, error: tuple[int, int], wording: Wording, spec: str, licence: str, place: str
) -> Answer:
    messages = tuple(Message(role=turn["role"], content=turn["content"]) for turn in row["messages"])
    source, model = str(row.get("source") or "problems"), f"{spec} corruptor, {wording} wording"
    label = Label("wrong", "draftsmith label corrupt", "rule", error, None, f"{wording} wording")
    answer = Answer(answer_id(source, messages, response, model), messages, response, model, licence, source, label)
    check_answer(answer, place)
    return answer
