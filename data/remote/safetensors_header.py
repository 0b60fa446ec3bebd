"""The header of a safetensors file, for files that lie where the library cannot open them.

Owns what such a header must be: every tensor inside the file, of as many bytes as its dtype and shape take. Does not know: networks,
caches, which tensors a file should have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftsmith.data.shards.shard_checks import TensorKind
from draftsmith.json_text import parse_json_object

_LENGTH_BYTES = 8
_LARGEST = 100_000_000  # the library's own limit
_ITEM_BYTES = {
    **dict.fromkeys(("I64", "U64", "F64"), 8),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_REMEDY = "upload it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        kind: its dtype and shape.
        start: its first byte, counted from the beginning of the file.
        stop: the byte after its last.
    """

    kind: TensorKind
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """All tensors of a file.

    Attributes:
        entries: by name.
        content: as much of the file as was read to know them.
        num_bytes: of the file.
    """

    entries: Mapping[str, Entry]
    content: bytes
    num_bytes: int


def header_size(beginning: bytes, num_bytes: int, place: str) -> int:
    """Bytes up to the first tensor.

    Args:
        beginning: at least the first 8 bytes of the file.
        num_bytes: of the file.
        place: what errors call the file.

    Returns:
        Bytes, the first 8 included.

    Raises:
        ValueError: more than the file has.
    """
    size = _LENGTH_BYTES + int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    if len(beginning) < _LENGTH_BYTES or size > min(num_bytes, _LARGEST):
        raise ValueError(
            f"{place} is no shard or is damaged (its header has {size} bytes, the file {num_bytes}); {_REMEDY}"
        )
    return size


def parse_header(content: bytes, num_bytes: int, place: str) -> Header:
    """Read the tensors of a file from its beginning.

    Args:
        content: the beginning, with the whole header.
        num_bytes: of the file.
        place: what errors call the file.

    Returns:
        The header.

    Raises:
        ValueError: it is no such header; the message names the tensor that does not fit.
    """
    size = header_size(content, num_bytes, place)
    table = parse_json_object(content[_LENGTH_BYTES:size], f"{place}: its header", _REMEDY)
    table.pop("__metadata__", None)
    entries = {name: _entry(described, size, num_bytes, f"{place}: {name}") for name, described in table.items()}
    return Header(entries, content, num_bytes)


def _entry(described: Any, begin: int, num_bytes: int, place: str) -> Entry:
    if not isinstance(described, dict) or not {"dtype", "shape", "data_offsets"} <= described.keys():
        raise ValueError(
            f"{place} is {described!r:.80} in the header, it must have dtype, shape and data_offsets; {_REMEDY}"
        )
    dtype, shape, span = described["dtype"], described["shape"], described["data_offsets"]
    if dtype not in _ITEM_BYTES or not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
        raise ValueError(
            f"{place} has dtype {dtype!r:.40}, shape {shape!r:.40} and data_offsets {span!r:.40}; {_REMEDY}"
        )
    start, stop = begin + span[0], begin + span[1]
    if stop > num_bytes or stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(
            f"{place} lies at bytes {start} to {stop} of {num_bytes}, which are not those of {dtype} {shape}; {_REMEDY}"
        )
    return Entry(TensorKind(dtype, tuple(shape)), start, stop)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in value
    )
