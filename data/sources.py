"""Rows from JSONL, JSON, Parquet and text files, and from the hub through `datasets`.

Owns: finding and decoding rows, with the place of each one for messages. Does not know: what a row means.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from draftsmith.files import read_jsonl

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
_DOCUMENT_END = "<|endoftext|>"


def read_rows(source: str, *, hub_config: str | None = None, hub_split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yields (place, row): the place is `FILE:LINE`, `FILE[INDEX]` or `HUB_ID[INDEX]`.

    Raises ValueError for a missing path, an unknown suffix, malformed content (with its line) and an empty file.
    """
    path = Path(source)
    if path.is_file():
        yield from _read_file(path)
        return
    if path.is_dir():
        raise ValueError(f"{source} is a folder; give one file ({', '.join(_SUFFIXES)})")
    if path.suffix in _SUFFIXES or path.is_absolute() or source.startswith(".") or not _HUB_ID.fullmatch(source):
        raise ValueError(f"no such file: {source}; check the path")
    yield from _read_hub(source, hub_config, hub_split)


def source_name(source: str) -> str:
    """Short name of a source for ids and reports: a file's stem, or the hub id itself."""
    path = Path(source)
    return path.stem if path.suffix in _SUFFIXES else source


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".jsonl":
        for line, row in read_jsonl(path):
            yield f"{path}:{line}", row
        return
    readers = {".json": _json_rows, ".parquet": _parquet_rows, ".txt": _text_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; prompts are read from {', '.join(_SUFFIXES)}")
    count = 0
    for index, row in enumerate(reader(path)):
        count += 1
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}[{index}] is {type(row).__name__}; each row must be an object")
        yield f"{path}[{index}]", row
    if count == 0:
        raise ValueError(f"{path} is empty; a prompt file needs at least one row")


def _json_rows(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{hint}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds one {type(rows).__name__}; a JSON prompt file is a list of objects")
    yield from rows


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error
    for batch in file.iter_batches():
        yield from batch.to_pylist()


def _text_rows(path: Path) -> Iterator[Any]:
    """Documents of a plain text file, separated by `<|endoftext|>` where it occurs, else by blank lines."""
    text = path.read_text(encoding="utf-8")
    for document in text.split(_DOCUMENT_END) if _DOCUMENT_END in text else _BLANK_LINES.split(text):
        if document.strip():
            yield {"text": document.strip()}


def _read_hub(name: str, config: str | None, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} is neither a file here nor a data set that could be loaded from the hub: {reason}"
        ) from error
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", row
