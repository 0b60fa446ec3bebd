"""What the rows of a benchmark say of a prompt beside its words: Spec-Bench and SPEED-Bench name them alike.

Owns the names of these fields and which values they take. Does not know prompts, files, or what is measured.
"""

from collections.abc import Mapping
from typing import Any

BENCHMARK_FIELDS = ("category", "sub_category", "difficulty")
"""By which reports split their figures. A benchmark's `multiturn` follows from its `turns`."""

PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""What SPEED-Bench publishes in place of questions whose licence forbids it to; its script fetches them."""


def is_question(row: Mapping[str, Any]) -> bool:
    """Whether a row is a benchmark's, whose user turns are asked one after the other, each behind the target's own reply.

    Args:
        row: of a data set.

    Returns:
        True where it has the number of a question, or says whether it has several turns.
    """
    return row.get("question_id") is not None or row.get("multiturn") is not None


def benchmark_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the benchmark's fields of a row.

    Args:
        row: of a data set.

    Returns:
        The fields that are text or whole numbers, as text. Values of other types are no names of a category, so they count as absent.
    """
    fields = {}
    for name in BENCHMARK_FIELDS:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            fields[name] = str(value)
    return fields
