"""JSON as text: written so that every encoder takes it, and read with errors that name the file and the remedy.

Does not know what the values mean. Rows of JSON, one a line, have rules of their own (`json_rows`).
"""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every encoder takes: letters of all scripts as they are, halves of surrogate pairs as `\\udc80`."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def parse_json(content: bytes | str, where: str, remedy: str) -> Any:
    """The value that `content` holds; `where` is what errors call it, `remedy` what they advise.

    Raises:
        ValueError: it is no JSON, no UTF-8, nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); {remedy}") from error


def parse_json_object(content: bytes | str, where: str, remedy: str) -> dict[str, Any]:
    """As `parse_json`, of an object.

    Raises:
        ValueError: as there, or it is another kind of value.
    """
    value = parse_json(content, where, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object but {type(value).__name__}; {remedy}")
    return value
