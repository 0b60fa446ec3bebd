"""The sums corpus in one place: problems, their wordings, the checker, graded solutions, and prompt files.

Re-exports what the modules beside it own, and writes problems as prompt rows.
"""

import json
from pathlib import Path

from draftsmith import files
from draftsmith.embedded.checker import Verdict, check
from draftsmith.embedded.grading import GradedSolution, grade
from draftsmith.embedded.problems import Problem, Split, Step, distinct_problems, sample_problems
from draftsmith.embedded.wordings import ALL_WORDINGS, DRAFT_STYLE, TARGET_STYLE, Style, render

__all__ = [
    "ALL_WORDINGS",
    "DRAFT_STYLE",
    "TARGET_STYLE",
    "GradedSolution",
    "Problem",
    "Split",
    "Step",
    "Style",
    "Verdict",
    "check",
    "distinct_problems",
    "grade",
    "render",
    "sample_problems",
    "write_prompts",
]


def write_prompts(path: Path, split: Split, count: int, seed: int = 0) -> None:
    """Writes COUNT distinct problems of a split as prompt rows, one JSON object a line, at once or not at all.

    A row is ``{"id", "messages": [{"role": "user", "content"}], "split", "source": "sums/<template>", "answer"}``.

    Args:
        path: The JSON-lines file to write.
        split: train, validation or test; no combination of numbers is in two of them.
        count: How many problems, at least 1.
        seed: Another seed gives other problems of the split.

    Raises:
        ValueError: the split is unknown, or the count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}, a prompt file holds at least 1 prompt; raise it")
    rows = [
        {
            "id": problem.id,
            "messages": [{"role": "user", "content": problem.question}],
            "split": split,
            "source": f"sums/{problem.template}",
            "answer": problem.answer,
        }
        for problem in distinct_problems(split, count, seed)
    ]
    files.atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
