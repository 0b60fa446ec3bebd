"""The names of a cache's files: a shard's own name, and the SHA-256 that names its copy on another machine.

Owns both patterns and their errors. A name is checked where a manifest is read, and again where a path is made of it. Knows nothing of
what the files hold.
"""

from __future__ import annotations

import re

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"shard-[0-9]{5,20}\.safetensors")

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
