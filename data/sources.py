"""Rows from JSONL, JSON, CSV, Parquet and text files, and from the hub through `datasets`.

Owns: finding and decoding rows, with the place of each one for messages. Does not know: what a row means.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.data.json_list import list_elements
from draftsmith.escapes import one_line
from draftsmith.files import read_jsonl
from draftsmith.json_rows import (
    SPREADSHEETS,
    Dropped,
    DroppedSink,
    UnusableRow,
    check_encoding,
    check_values,
    parse_object,
    shown,
)

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_LONGEST_CELL = 2**26
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MARK = b"\xef\xbb\xbf"
_MARK_BYTES = 8
_BATCH_ROWS = 1024  # of a table that are held at a time
_BLANK_LINES = re.compile(rb"\n[ \t]*\n\s*")
_DOCUMENT_END = b"<|endoftext|>"


@dataclass(frozen=True)
class _Unread:
    """A row that cannot be decoded, and how it begins."""

    reason: str
    shown: str


def read_rows(
    source: str, *, hub_config: str | None = None, hub_split: str = "train", dropped: DroppedSink | None = None
) -> Iterator[tuple[str, Row]]:
    """Read the rows of a source, with the place of each: `FILE:LINE`, `FILE[INDEX]` or `HUB_ID[INDEX]`.

    Args:
        source: a file, or the id of a data set on the hub.
        hub_config: configuration name, for a hub id.
        hub_split: split to read, for a hub id.
        dropped: takes the record of each row that cannot be decoded, and the others are read. None: such a row is an error.

    Yields:
        Place and row.

    Raises:
        ValueError: a missing path, an unknown suffix, a file that is empty or malformed as a whole; without `dropped`, a
            malformed row, with its place.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        for line, row in read_jsonl(path, dropped):
            yield f"{path}:{line}", row
        return
    index = -1
    for index, outcome in enumerate(_decoded(source, path, hub_config, hub_split)):
        place = f"{source}[{index}]"
        if not isinstance(outcome, _Unread):
            yield place, outcome
        elif dropped is not None:
            dropped.append(Dropped(place, outcome.reason, outcome.shown))
        else:
            raise ValueError(f"{place}: {outcome.reason}; mend or delete the row")
    if index < 0:
        raise ValueError(f"{source} is empty; at least one row is needed")


def source_name(source: str) -> str:
    """Short name of a source for ids and reports: a file's stem, or the hub id itself. Bytes that are no UTF-8 are escaped.

    Args:
        source: a file, or the id of a data set on the hub.

    Returns:
        The name.
    """
    path = Path(source)
    return one_line(path.stem if path.suffix in _SUFFIXES else source)


def _decoded(source: str, path: Path, hub_config: str | None, hub_split: str) -> Iterator[Row | _Unread]:
    if path.is_dir():
        raise ValueError(f"{source} is a folder; give one file ({', '.join(_SUFFIXES)})")
    if path.is_file():
        readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _text_rows}
        reader = readers.get(path.suffix)
        if reader is None:
            if path.suffix.lower() not in SPREADSHEETS:
                with open(path, "rb") as file:
                    check_encoding(path, file.readline(_MARK_BYTES))
            raise ValueError(f"{path} has the suffix {path.suffix!r}; rows are read from {', '.join(_SUFFIXES)}")
        return reader(path)
    if path.suffix in _SUFFIXES or path.is_absolute() or source.startswith(".") or not _HUB_ID.fullmatch(source):
        raise ValueError(f"no such file: {source}; check the path")
    return _hub_rows(source, hub_config, hub_split)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    check_encoding(path, content)
    return content.removeprefix(_MARK)


def _json_rows(path: Path) -> Iterator[Row | _Unread]:
    for element in list_elements(path):
        try:
            yield parse_object(element)
        except UnusableRow as error:
            yield _Unread(str(error), shown(element))


def _csv_rows(path: Path) -> Iterator[Row | _Unread]:
    """The rows below the header of a CSV file: texts, and None for an empty cell. Holds one row at a time.

    Raises:
        ValueError: bytes that are not UTF-8, a quote that is never closed, or two columns of one name.
    """
    lines = _csv_lines(path)
    header = next(lines, [])
    for name, count in Counter(header).most_common(1):
        if count > 1:
            raise ValueError(f"{path} has {count} columns of the name {name!r}; give each a name of its own")
    for cells in lines:
        yield _csv_row(header, cells)


def _csv_lines(path: Path) -> Iterator[list[str]]:
    """The cells of each line that has any."""
    with open(path, "rb") as file:
        check_encoding(path, file.read(_MARK_BYTES))
    with open(path, newline="", encoding="utf-8-sig") as text:
        lines = csv.reader(text, strict=True)
        cells: list[str] | None = []
        while cells is not None:
            longest = csv.field_size_limit(_LONGEST_CELL)  # a setting of the whole process
            try:
                cells = next(lines, None)
            except UnicodeDecodeError as error:
                number = _bad_byte(path)
                raise ValueError(f"{path}: not UTF-8 text: byte {number}; convert it with `iconv -t UTF-8`") from error
            except csv.Error as error:
                raise ValueError(f"{path} cannot be read as CSV: {error}; write it anew, or give JSON-lines") from error
            finally:
                csv.field_size_limit(longest)
            if cells:
                yield cells


def _bad_byte(path: Path) -> int:
    """The number, from 1, of a file's first byte that is no UTF-8. Python names its place in a piece of the file only."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return start + error.start + 1
            start += len(line)
    return start


def _csv_row(header: list[str], cells: list[str]) -> Row | _Unread:
    if len(cells) != len(header):
        shown_cells = one_line(",".join(cells))[:200]
        return _Unread(f"the row has {len(cells)} cells, and the header names {len(header)} columns", shown_cells)
    row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    try:
        check_values(row)
    except UnusableRow as error:
        return _Unread(str(error), one_line(",".join(cells))[:200])
    return row


def _parquet_rows(path: Path) -> Iterator[Row | _Unread]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        [(name, count)] = Counter(file.schema_arrow.names).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"{path} has {count} columns of the name {name!r}; give each a name of its own")
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from _rows_of_batch(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error


def _rows_of_batch(batch: pa.RecordBatch) -> Iterator[Row | _Unread]:
    """Row by row, because one that Python has no value for (a year 20000, bytes that are no text) fails its batch."""
    for index in range(batch.num_rows):
        try:
            [row] = batch.slice(index, 1).to_pylist()
            row = {name: _without_fillers(value) for name, value in row.items()}  # null in a column may say something
            check_values(row)
        except (ValueError, OverflowError) as error:
            yield _Unread(str(error), "")
        else:
            yield row


def _without_fillers(value: Any) -> Any:
    """A table's value without the keys that are null: it gives each object the keys of all others, such as the arguments of other tools.

    Example: `{"city": "Oslo", "stock": None}` becomes `{"city": "Oslo"}`; nulls of a list stay.
    """
    if isinstance(value, Mapping):
        return {name: _without_fillers(entry) for name, entry in value.items() if entry is not None}
    return [_without_fillers(entry) for entry in value] if isinstance(value, list) else value


def _text_rows(path: Path) -> Iterator[Row | _Unread]:
    """Documents of a plain text file, separated by `<|endoftext|>` where it occurs, else by blank lines."""
    content = _content(path).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for document in content.split(_DOCUMENT_END) if _DOCUMENT_END in content else _BLANK_LINES.split(content):
        try:
            row = {"text": document.decode("utf-8").strip()}
            check_values(row)
        except UnicodeDecodeError as error:
            yield _Unread(f"not UTF-8 text: byte {error.start + 1} is 0x{document[error.start]:02x}", shown(document))
        except UnusableRow as error:
            yield _Unread(str(error), shown(document))
        else:
            if row["text"]:
                yield row


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[Row | _Unread]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} is neither a file here nor a data set that could be loaded from the hub: {reason}"
        ) from error
    for index in range(len(rows)):
        try:
            row = {name: _without_fillers(value) for name, value in rows[index].items()}
            check_values(row)
        except (ValueError, OverflowError, OSError) as error:  # OSError: an image that cannot be decoded
            yield _Unread(str(error), "")
        else:
            yield row
