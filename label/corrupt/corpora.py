"""A corpus's own corruptor: wrong solutions of its problems, in every wording that a judge may meet.

Owns the interface, the corruptor of the sums corpus, and how a user's own function becomes one. Knows no files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from draftsmith.embedded.grading import corrupt_step
from draftsmith.embedded.problems import Step
from draftsmith.embedded.wordings import DRAFT_STYLE, TARGET_STYLE, word_steps
from draftsmith.label.checkers.checkers import load_function
from draftsmith.label.checkers.sums_answers import judge, problem_of
from draftsmith.label.schema import Span

Wording = Literal["draft", "target", "mixed"]
Row = Mapping[str, Any]
_ATTEMPTS = 20


@dataclass(frozen=True)
class Corrupted:
    """A wrong answer.

    Attributes:
        response: its text.
        error: the span of its first error.
    """

    response: str
    error: Span


Corruptor = Callable[[Row, Wording, random.Random], Corrupted | None]
"""Gives a wrong answer to a problem's row in a wording, or None where it finds none."""


def load_corruptor(spec: str) -> Corruptor:
    """The corruptor of a name, or of a function: `package.module:function` or `file.py:function`.

    Args:
        spec: `embedded` for the sums corpus, or a function `(row, wording, rng) -> Corrupted | None`, whose code runs here.

    Raises:
        ValueError: there is no such corruptor, or the function cannot be loaded.
    """
    if spec == "embedded":
        return corrupt_sum
    if ":" not in spec:
        raise ValueError(
            f"corruptor {spec!r} is not known; use text, embedded, or your own function as package.module:function or file.py:function"
        )
    function, _ = load_function(spec, "corruptor", "(row, wording, rng)")
    return function


def corrupt_sum(row: Row, wording: Wording, rng: random.Random) -> Corrupted | None:
    """A solution of a problem of the sums corpus with one wrong step; the checker places the error.

    Args:
        row: of the problem.
        wording: whose phrases it has; mixed takes each line from one of the two.
        rng: chooses step, error and phrases.

    Raises:
        ValueError: the row's question is not of the sums corpus.
    """
    question = next(
        (str(turn["content"]) for turn in reversed(row.get("messages") or ()) if turn["role"] == "user"), ""
    )
    problem = problem_of(question)
    if problem is None:
        raise ValueError(
            f"the question {question[:80]!r} is not of the sums corpus; make prompts with draftsmith embedded prompts, or take another "
            "corruptor"
        )
    for _ in range(_ATTEMPTS):
        text = _worded(corrupt_step(problem, rng.randrange(len(problem.steps)), rng), wording, rng)
        span = judge(problem, text).error_span
        if span is not None:
            return Corrupted(text, span)
    return None


def wrong_answers(
    row: Row, wordings: Sequence[Wording], corruptor: Corruptor, seed: str
) -> Iterator[tuple[Wording, Corrupted]]:
    """A wrong answer in each wording; the same ones for the same seed.

    Args:
        row: of the problem.
        wordings: which ones.
        corruptor: makes the answers.
        seed: of what is chosen; each problem should have its own.

    Yields:
        the wording and its answer, where the corruptor finds one.

    Raises:
        ValueError: the row is not for this corruptor, or the error is not within the response.
    """
    for wording in wordings:
        wrong = corruptor(row, wording, random.Random(f"{seed}\0{wording}"))
        if wrong is None:
            continue
        if not isinstance(wrong, Corrupted) or not 0 <= wrong.error[0] < wrong.error[1] <= len(wrong.response):
            raise ValueError(
                f"the corruptor gave {wrong!r:.120}; it gives Corrupted(response, error) with the error inside the response"
            )
        yield wording, wrong


def _worded(steps: tuple[Step, ...], wording: Wording, rng: random.Random) -> str:
    draft, target = (word_steps(steps, replace(style, strength=1.0), rng).text for style in (DRAFT_STYLE, TARGET_STYLE))
    if wording == "mixed":
        return "\n".join(rng.choice(lines) for lines in zip(draft.split("\n"), target.split("\n"), strict=True))
    return draft if wording == "draft" else target
