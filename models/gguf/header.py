"""The front of a GGUF file: its metadata and the table of its tensors.

Owns how the bytes are read, and that a file holds the data of every tensor. Does not know what a field means.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from draftsmith.extras import install_command

REMEDY = "download it again, or give the model's folder with safetensors"
"""What to do about a broken file."""
_T = TypeVar("_T")
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9  # types of metadata values that have no fixed size
_MOST_DIMENSIONS = 8
_SHOWN = 3  # names of tensors that an error lists
_WHOLE = frozenset(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores", "merges"))


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its tensors' data.

    Attributes:
        file: the file.
        fields: its metadata by key; the arrays of the tokenizer are tuples, any other array is given by its length.
        shapes: of each tensor by name, in the order of torch.
    """

    file: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """Such as llama."""
        return self.read("general.architecture", str) or ""

    def read(self, key: str, kind: type[_T]) -> _T | None:
        """Read one field.

        Args:
            key: of the field.
            kind: the type that its value must have.

        Returns:
            The value; None where the file has no such field.

        Raises:
            ValueError: the value has another type.
        """
        value = self.fields.get(key)
        if value is not None and type(value) is not kind:
            raise ValueError(f"{self.file} gives {key} as {value!r:.80}, which is no {kind.__name__}; {REMEDY}")
        return value


def read_header(file: Path) -> GgufHeader:
    """Read the metadata and the table of tensors of a GGUF file, and check that it holds the data of every tensor.

    Args:
        file: the GGUF file.

    Returns:
        The header.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, it is cut off, or a tensor lies outside of it. Also without the `gguf` package.
    """
    sizes = _block_sizes(file)
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; {REMEDY}")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return GgufHeader(file, *_Reader(content, sizes).read())
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{file} is cut off or damaged in its metadata ({error}); {REMEDY}") from error
        except _BrokenFile as error:
            raise ValueError(f"{file} {error}; {REMEDY}") from error


class _BrokenFile(Exception):
    """What is wrong with a GGUF file; the message follows its name."""


class _Reader:
    """Reads a header from the front of a file. Every number is checked against the file's length by :mod:`struct`."""

    def __init__(self, content: mmap.mmap, sizes: Mapping[int, tuple[int, int]]) -> None:
        self._content = content
        self._sizes = sizes  # of each tensor type: elements and bytes of a block
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """The fields, and the shapes of the tensors."""
        if self._content[:4] != b"GGUF":
            raise _BrokenFile("is no GGUF file (it does not begin with GGUF)")
        self._at = 4
        version, num_tensors, num_fields = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise _BrokenFile(
                f"is in version {version} of GGUF or big-endian; versions 2 and 3 in little-endian are read"
            )
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._text()
            values = self._value(self._number("I"))
            fields[key] = len(values) if isinstance(values, tuple) and key not in _WHOLE else values
        spans = [self._tensor() for _ in range(num_tensors)]
        self._check_spans(spans, fields.get("general.alignment", 32))
        shapes = {name: shape for name, shape, _, _ in spans}
        if len(shapes) < len(spans):
            raise _BrokenFile("holds two tensors of one name")
        return fields, shapes

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self._content, self._at)
        self._at += struct.calcsize(f"<{kinds}")
        return values

    def _number(self, kind: str) -> Any:
        return self._numbers(kind)[0]

    def _text(self) -> str:
        length = self._number("Q")
        return self._number(f"{length}s").decode("utf-8") if length else ""

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _BrokenFile(f"has a metadata value of the unknown type {kind}")
        inner, length = self._numbers("IQ")
        if inner in _NUMBERS:
            return self._numbers(f"{length}{_NUMBERS[inner]}")
        if inner != _STRING:
            raise _BrokenFile(f"has a metadata array of the type {inner}, which is not read")
        return tuple(self._text() for _ in range(length))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, offset of the data and its bytes."""
        name, num_dimensions = self._text(), self._number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise _BrokenFile(f"gives tensor {name!r:.80} {num_dimensions} dimensions")
        shape = tuple(reversed(self._numbers(f"{num_dimensions}Q")))
        kind, offset = self._numbers("IQ")
        if kind not in self._sizes:
            raise _BrokenFile(
                f"has tensor {name!r:.80} in the unknown type {kind}; the gguf package may be too old for it"
            )
        elements, num_bytes = self._sizes[kind]
        return name, shape, offset, math.prod(shape) // elements * num_bytes

    def _check_spans(self, spans: list[tuple[str, tuple[int, ...], int, int]], alignment: object) -> None:
        if type(alignment) is not int or alignment <= 0:
            raise _BrokenFile(f"has general.alignment {alignment!r:.80}, which is no positive number")
        begin = math.ceil(self._at / alignment) * alignment
        outside = [name for name, _, offset, length in spans if begin + offset + length > len(self._content)]
        if outside:
            rest = f", ... ({len(outside)} in all)" if len(outside) > _SHOWN else ""
            names = ", ".join(outside[:_SHOWN]) + rest
            raise _BrokenFile(f"is cut off: it ends before the data of its tensors (missing: {names})")


def _block_sizes(file: Path) -> Mapping[int, tuple[int, int]]:
    """Elements and bytes of a block for each type of tensor, as the `gguf` package knows them."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} is a GGUF file, which needs the gguf package; run: {install_command('gguf')}")
    import gguf

    return {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
