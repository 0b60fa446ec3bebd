"""Rows of JSON from anywhere: the bytes of one row as an object, or the reason why they are none.

Owns: which bytes are a row, and the record of a row that was left out. Does not know: files, what a row's fields mean.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

from draftsmith.escapes import one_line
from draftsmith.json_text import json_text

DROPPED_FILE = "dropped.jsonl"
MAX_DEPTH = 100
"""Objects and lists inside one another. Python's own limit depends on who calls, and a row must not be read in one pass only."""

_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PARQUET_MARK = b"PAR1"
_PACKED_MARKS = {
    b"\x1f\x8b": "gunzip -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ": "unxz -k",
    b"PK\x03\x04": "unzip",
}
# Tables that are packed themselves.
SPREADSHEETS = (".xlsx", ".xlsm", ".ods")
_BAD_CHARACTER = re.compile("[\0\ud800-\udfff]")
_ESCAPED_BAD_CHARACTER = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
# What differs from row to row in one kind of reason.
_DETAIL = re.compile(r"\d+|'[^']*'|\"[^\"]*\"| as .*")
_SHOWN_CHARACTERS = 200
_SHOWN_KINDS = 5


class UnusableRow(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Dropped:
    """A row that was left out: its place (`FILE:LINE`), the reason, how the row begins, and its id as far as it has one."""

    place: str
    reason: str
    row: str = ""
    id: str = ""


class DroppedSink(Protocol):
    """Takes the record of each row that is left out, in their order: a list, or whatever else has its `append`."""

    def append(self, record: Dropped, /) -> None:
        """Takes one record."""


def check_encoding(name: object, start: bytes) -> None:
    """Refuses a file by its first bytes.

    Raises:
        ValueError: the file is UTF-16, in which lines cannot be told apart, a spreadsheet, or packed.
    """
    if start.startswith(_UTF16_MARKS):
        raise ValueError(f"{name} is UTF-16; text is read as UTF-8: convert it with `iconv -f UTF-16 -t UTF-8`")
    if str(name).lower().endswith(SPREADSHEETS):
        raise ValueError(
            f"{name} is a spreadsheet; write its rows as JSON-lines, or save it as CSV in UTF-8 for `draftsmith data prompts`"
        )
    for mark, unpacker in _PACKED_MARKS.items():
        if start.startswith(mark):
            raise ValueError(f"{name} is packed; unpack it first: `{unpacker} {name}`")


def check_lines(name: object, start: bytes) -> None:
    """Refuses a file that is not one JSON object a line, by its first line.

    Raises:
        ValueError: as :func:`check_encoding`; a Parquet file, or a `.json` file that is a list.
    """
    check_encoding(name, start)
    kind = "a Parquet file" if start.startswith(_PARQUET_MARK) else None
    if str(name).endswith(".json") and start.removeprefix(_MARK).lstrip().startswith(b"["):
        kind = "a list"
    if kind is not None:
        raise ValueError(
            f"{name} is {kind}, but one JSON object a line is expected (JSONL); `draftsmith data prompts` reads it as it is"
        )


def is_blank(content: bytes) -> bool:
    """Whether a line holds nothing; a byte-order mark is nothing."""
    return not content.removeprefix(_MARK).strip()


def parse_object(content: bytes, any_text: bool = False) -> dict[str, Any]:
    """The JSON object in the bytes of one row. A byte-order mark before it is passed over.

    With ``any_text`` a text may hold any character: a model's own reply may, and its token ids are what is read.

    Raises:
        UnusableRow: bytes that are not UTF-8 or not JSON (`NaN` and `Infinity` are not), no object, a key that occurs twice,
            nesting deeper than `MAX_DEPTH`, a number of too many digits, a NUL character or half a surrogate pair.
    """
    try:
        text = content.removeprefix(_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableRow(f"not UTF-8 text: byte {error.start + 1} is 0x{content[error.start]:02x}") from error
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UnusableRow(f"not valid JSON: {error.msg} at column {error.pos + 1}") from error
    except UnusableRow:
        raise
    except RecursionError as error:
        raise UnusableRow(_TOO_DEEP) from error
    except ValueError as error:  # Python converts no number of several thousand digits
        raise UnusableRow("a number has too many digits") from error
    if not isinstance(row, dict):
        raise UnusableRow(f"not a JSON object but {type(row).__name__}")
    if text.count("[") + text.count("{") > MAX_DEPTH or _ESCAPED_BAD_CHARACTER.search(text):
        check_values(row, any_text)
    return row


def check_values(row: Mapping[Any, Any], any_text: bool = False) -> None:
    """Holds a row of any origin to what a row of JSON may contain; ``any_text`` as in :func:`parse_object`.

    Raises:
        UnusableRow: nesting deeper than `MAX_DEPTH`, a NUL character or half a surrogate pair in any text or key.
    """
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        for value in level:
            if isinstance(value, str) and not any_text:
                _check_text(value)
        if not level:
            return
    raise UnusableRow(_TOO_DEEP)


def shown(content: bytes) -> str:
    """The beginning of a row's bytes, for its record."""
    return content[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "replace").strip()[:_SHOWN_CHARACTERS]


def shown_row(row: object) -> str:
    """The beginning of a row that is no bytes any more, for its record."""
    try:
        return json.dumps(row, default=str)[:_SHOWN_CHARACTERS]
    except (TypeError, ValueError, RecursionError):
        return f"({type(row).__name__})"


def dropped_lines(dropped: Iterable[Dropped]) -> str:
    """The content of `dropped.jsonl`, without the fields that are empty."""
    rows = ({name: value for name, value in asdict(row).items() if value} for row in dropped)
    return "".join(json_text(row) + "\n" for row in rows)


def summary(rows: Sequence[Dropped], what: str = "dropped") -> str:
    """One line for a terminal: how many rows there are, and for each kind of reason the first place and how many are like it.

    Example: `3 rows dropped: a.jsonl:2: turn 1 is empty (2 such); a.jsonl:9: no user turn`.
    """
    counted = f"{len(rows)} row{'' if len(rows) == 1 else 's'} {what}"
    if not rows:
        return counted
    first: dict[str, Dropped] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        kind = _DETAIL.sub("#", row.reason)
        first.setdefault(kind, row)
        counts[kind] += 1
    kinds = [
        f"{first[kind].place}: {first[kind].reason}{f' ({count} such)' if count > 1 else ''}"
        for kind, count in counts.most_common(_SHOWN_KINDS)
    ]
    if len(counts) > len(kinds):
        kinds.append(f"and {len(counts) - len(kinds)} other reasons")
    return one_line(f"{counted}: {'; '.join(kinds)}")


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise UnusableRow(f"the key {key!r:.80} occurs twice")
    return row


def _no_constant(name: str) -> NoReturn:
    raise UnusableRow(f"not valid JSON: {name} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _inside(value: object) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list | tuple) else ()


def _check_text(text: str) -> None:
    match = _BAD_CHARACTER.search(text)
    if match is not None:
        bad = match[0]
        raise UnusableRow("a NUL character" if bad == "\0" else f"half a surrogate pair (\\u{ord(bad):04x})")
