"""What files from elsewhere may say: JSON that parses, and the few patterns by which one of their fields becomes part of a path.

Owns these patterns and their refusal. A field is checked where it is read and again where a path is made of it. Knows nothing of what
the files are about.
"""

from __future__ import annotations

import json
import re
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"shard-[0-9]{5,20}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")

SHA256_RULE = "64 hex digits (0-9, a-f)"
SHARD_NAME_RULE = "a name such as shard-00000.safetensors"


def is_sha256(value: object) -> bool:
    """Whether this is a SHA-256 as `sha256_file` writes it."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def is_shard_name(value: object) -> bool:
    """Whether this is the file name of a cache's shard, without any folder."""
    return isinstance(value, str) and _SHARD_NAME.fullmatch(value) is not None


def safe_sha256(value: str) -> str:
    """The value itself, for use in a file name.

    Raises:
        ValueError: it is no SHA-256, and could lead out of its folder.
    """
    if not is_sha256(value):
        raise ValueError(
            f"{value!r:.80} is no sha256 and names no file; it must be {SHA256_RULE}; copy the cache again"
        )
    return value


def safe_shard_name(value: str) -> str:
    """The value itself, for use as a file name.

    Raises:
        ValueError: it is no shard's name, and could lead out of its folder.
    """
    if not is_shard_name(value):
        raise ValueError(f"{value!r:.80} names no shard; it must be {SHARD_NAME_RULE}; copy the cache again")
    return value


def safe_file_name(value: object, where: str) -> str:
    """The value itself, for use as the name of a file inside one folder. `where` is the file and field that it comes from.

    Raises:
        ValueError: it is no text, it has a separator, it begins with a dot, or it has other letters than file names need.
    """
    if not isinstance(value, str) or _PLAIN_NAME.fullmatch(value) is None:
        raise ValueError(
            f"{where} is {value!r:.80}, which is no plain file name; use letters, digits, '.', '_' and '-' only, without folders"
        )
    return value


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
