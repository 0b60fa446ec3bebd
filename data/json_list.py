"""The elements of a JSON list in a file, one after the other: no more of the file is held than one element and one piece.

Owns: where an element begins and ends. Does not know: what an element holds, or whether it is valid JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from draftsmith.json_rows import check_encoding, is_blank

PIECE = 2**20
_MARK = b"\xef\xbb\xbf"
# A text (its closing quote in the group, if it has one), or one of the marks by which elements are told apart.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{},]', re.DOTALL)
_NOT_BLANK = re.compile(rb"\S")
_DEEPER = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def list_elements(path: Path, piece: int = PIECE) -> Iterator[bytes]:
    """The bytes of each element of the list in a file, so that one that cannot be parsed costs no other.

    Example: `[{"a": ","}, 7]` has the elements `{"a": ","}` and ` 7`.

    Args:
        path: a JSON file in UTF-8; a byte-order mark is passed over.
        piece: how many bytes are read at a time, at least 8. An element that is longer is read in longer ones.

    Yields:
        The bytes of each element. None where the file is blank.

    Raises:
        ValueError: the file is UTF-16 or packed, begins with an object, or the list does not begin, is not closed, or is not all of the
            file; the message has the line.
    """
    with open(path, "rb") as file:
        window = _Window(file, piece)
        check_encoding(path, window.content)
        window.begin = len(_MARK) if window.content.startswith(_MARK) else 0
        mark = window.next_mark()
        if mark == b"{":
            raise ValueError(
                f"{path} begins with an object, but a JSON file is a list of objects; one object a line is JSONL: name the file .jsonl"
            )
        if mark == b"[":
            yield from _elements(path, window)
        elif mark:
            raise _broken(path, window, "this is no list of objects")


def _elements(path: Path, window: _Window) -> Iterator[bytes]:
    window.begin = window.at = window.begin + 1
    depth = 1
    while depth and (mark := window.next_token()):
        depth += _DEEPER.get(mark, 0)
        if not depth or (depth == 1 and mark == b","):
            element = window.content[window.begin : window.at - 1]
            if depth or not is_blank(element):
                yield element
            window.begin = window.at
    if depth:
        raise _broken(path, window, "the list is never closed")
    if window.next_mark():
        raise _broken(path, window, "this is no list of objects")


def _broken(path: Path, window: _Window, wrong: str) -> ValueError:
    window.next_mark()
    return ValueError(f"{path}:{window.line()}: not valid JSON: {wrong}; mend the file")


class _Window:
    """What is held of a file: the current element, and the rest of the piece that was read last.

    Attributes:
        content: these bytes; those before `begin` are not needed any more.
        begin: where the current element begins.
        at: up to where it was looked at.
    """

    def __init__(self, file: BinaryIO, piece: int) -> None:
        self._file, self._piece = file, piece
        self.content = file.read(piece)
        self.begin = self.at = 0
        self._num_lines = 0
        self._is_all = False

    def line(self) -> int:
        """The line of the file in which the current element begins, from 1."""
        return self._num_lines + self.content.count(b"\n", 0, self.begin) + 1

    def next_mark(self) -> bytes:
        """The first byte from `begin` on that is not blank, with `begin` at it; none at the end of the file."""
        while True:
            other = _NOT_BLANK.search(self.content, self.begin)
            self.begin = self.at = len(self.content) if other is None else other.start()
            if other is not None or not self._more():
                return b"" if other is None else other[0]

    def next_token(self) -> bytes:
        """The next text or mark from `at` on, with `at` behind it; none at the end of the file."""
        while True:
            token = _TOKEN.search(self.content, self.at)
            # A text without its closing quote may continue in the next piece.
            if token is not None and (token[1] != b"" or self._is_all):
                self.at = token.end()
                return token[0]
            self.at = len(self.content) if token is None else token.start()
            if not self._more() and token is None:
                return b""

    def _more(self) -> bool:
        """Reads on, as much as is held: so a long element is looked at a few times, and not once for each piece."""
        held = len(self.content) - self.begin
        self._num_lines += self.content.count(b"\n", 0, self.begin)
        more = self._file.read(max(self._piece, held))
        self.content = self.content[self.begin :] + more
        self.at -= self.begin
        self.begin = 0
        self._is_all = not more
        return bool(more)
