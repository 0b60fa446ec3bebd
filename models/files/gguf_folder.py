"""A GGUF file as a model folder: checked, dequantised once through Transformers, and kept in the user's cache.

Owns what a GGUF file must hold, and where its folder lies. A GGUF file takes minutes to read through Transformers, so each is read once.
Everything else in the package then sees a folder with float32 safetensors, a config, a tokenizer and a chat template.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from draftsmith.extras import install_command
from draftsmith.files import atomic_directory
from draftsmith.models.files.pretrained import name_faults, read_gguf
from draftsmith.ownership import user_cache_folder

_LOG = logging.getLogger(__name__)
_SUFFIX = ".gguf"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_FORMAT = 2  # of the folders in the cache; raise it when they change
_HEAD, _BLOCK, _NUM_BLOCKS = 64 * 2**20, 64 * 2**10, 256  # bytes, bytes, count: what of a large file is hashed
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9  # types of metadata values that have no fixed size
_MOST_DIMENSIONS = 8
_REMEDY = "download it again, or give the model's folder with safetensors"
_ENDS = ("eos", "eot", "eom")  # end of text, of turn and of message
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}  # as GGUF names them


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its tensors' data.

    Attributes:
        fields: its metadata by key; an array is given by its length.
        shapes: of each tensor by name, in the order of torch.
    """

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """Such as llama."""
        return str(self.fields.get("general.architecture", ""))


def gguf_file_of(path: Path) -> Path | None:
    """Find the GGUF file that a path names: the file, or the only weights in a folder.

    Args:
        path: whatever was given as a model.

    Returns:
        The file; None where the path names none.

    Raises:
        ValueError: a name with this ending that is no file, or a folder that holds several such files and no other weights.
    """
    if path.suffix.lower() == _SUFFIX and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"model file {str(path)!r} does not exist; give the path of a GGUF file")
        return path
    if not path.is_dir() or any(file.suffix in _OTHER_WEIGHTS for file in path.iterdir()):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == _SUFFIX)
    if len(files) > 1:
        names = name_faults({"here": [file.name for file in files]})
        raise ValueError(f"{path} holds several GGUF files ({names}); give the path of one")
    return files[0] if files else None


def folder_of(file: Path) -> Path:
    """The model folder of a GGUF file, in the user's cache. It is made at the first call and found again by the file's content.

    Args:
        file: the GGUF file.

    Returns:
        The folder.

    Raises:
        ValueError: the file is broken or incomplete, Transformers cannot read its architecture, or the `gguf` package is missing.
        OSError: the cache cannot be written.
    """
    status = file.stat()
    key = _content_key(file.resolve(), status.st_size, status.st_mtime_ns)
    folder = user_cache_folder("gguf") / key
    if (folder / "config.json").is_file():
        return folder
    header = read_header(file)
    _check_header(file, header)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of one run ask for the same file
        if not (folder / "config.json").is_file():
            _convert(file, header, folder)
    return folder


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
        raise ValueError(f"{file} is empty; {_REMEDY}")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Reader(content, sizes).header()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{file} is cut off or damaged in its metadata ({error}); {_REMEDY}") from error
        except _BrokenFile as error:
            raise ValueError(f"{file} {error}; {_REMEDY}") from error


class _BrokenFile(Exception):
    """What is wrong with a GGUF file; the message follows its name."""


class _Reader:
    """Reads a header from the front of a file. Every number is checked against the file's length by :mod:`struct`."""

    def __init__(self, content: mmap.mmap, sizes: Mapping[int, tuple[int, int]]) -> None:
        self._content = content
        self._sizes = sizes  # of each tensor type: elements and bytes of a block
        self._at = 0

    def header(self) -> GgufHeader:
        """Read all of it."""
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
            fields[key] = self._value(self._number("I"))
        spans = [self._tensor() for _ in range(num_tensors)]
        self._check_spans(spans, fields.get("general.alignment", 32))
        shapes = {name: shape for name, shape, _, _ in spans}
        if len(shapes) < len(spans):
            raise _BrokenFile("holds two tensors of one name")
        return GgufHeader(fields, shapes)

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
            self._numbers(f"{length}{_NUMBERS[inner]}")
        elif inner == _STRING:
            for _ in range(length):
                self._text()
        else:
            raise _BrokenFile(f"has a metadata array of the type {inner}, which is not read")
        return length

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
            raise _BrokenFile(
                f"is cut off: it ends before the data of its tensors ({name_faults({'missing': outside})})"
            )


def _block_sizes(file: Path) -> Mapping[int, tuple[int, int]]:
    """Elements and bytes of a block for each type of tensor, as the `gguf` package knows them."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} is a GGUF file, which needs the gguf package; run: {install_command('gguf')}")
    import gguf

    return {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}


def _check_header(file: Path, header: GgufHeader) -> None:
    """Refuse what Transformers would leave out without a word, and with it a part of the model.

    Raises:
        ValueError: an adapter or a part of a split file, an unknown architecture, or a scaled rope.
    """
    fields, remedy = header.fields, "give the model's folder with safetensors"
    if fields.get("general.type", "model") != "model":
        raise ValueError(f"{file} holds no model but {fields['general.type']!r:.80}; {remedy}")
    if fields.get("split.count", 0) > 1:
        raise ValueError(
            f"{file} is one of {fields['split.count']} parts; join them with `llama-gguf-split --merge`, or {remedy}"
        )
    known = {_plain(name) for name in _architectures()}
    if _plain(header.architecture) not in known:
        raise ValueError(
            f"{file} has the architecture {header.architecture!r:.80}, which Transformers does not read from GGUF "
            f"(it reads {', '.join(sorted(_architectures()))}); {remedy}"
        )
    scaling = fields.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling != "none" and _plain(header.architecture) != "gptoss":
        raise ValueError(
            f"{file} scales its rope ({scaling!r:.80}), which Transformers does not read from GGUF; {remedy}"
        )


def _architectures() -> list[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return [name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in ("general", "tokenizer")]


def _plain(architecture: str) -> str:
    """An architecture without what GGUF and Transformers write differently: qwen2moe and qwen2_moe."""
    return architecture.replace("_", "").replace("-", "")


def _convert(file: Path, header: GgufHeader, folder: Path) -> None:
    num_weights = sum(math.prod(shape) for shape in header.shapes.values())
    _LOG.info("converting %s into %s (%.1f GiB, once)", file, folder, num_weights * 4 / 2**30)
    with TemporaryDirectory() as alone, atomic_directory(folder, "draftsmith's GGUF cache") as partial:
        # Alone in its folder: Transformers would read any config, template or adapter that happens to lie beside the file.
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        model, tokenizer = read_gguf(Path(alone), "model.gguf", file, set(header.shapes))
        model.config.update({"eos_token_id": list(_end_ids(header.fields)) or None})
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        model.save_pretrained(partial)
        _name_special_tokens(tokenizer, header.fields)
        tokenizer.save_pretrained(partial)
        _drop_added_tokens(partial / "tokenizer.json", header.fields.get("tokenizer.ggml.tokens", 0))


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> None:
    """Give a tokenizer the special tokens that the file states: Transformers 5.17 takes a Llama's first token for its last one too."""
    for name, key in _SPECIAL.items():
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None)


def _drop_added_tokens(file: Path, num_tokens: int) -> None:
    """Take out tokens that the GGUF file has not: Transformers adds an <|endoftext|> behind the vocabulary, which no model can embed."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < num_tokens]
    file.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")


def _end_ids(fields: Mapping[str, Any]) -> Iterator[int]:
    """The tokens that end a reply, each once."""
    ids = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS)
    yield from dict.fromkeys(token for token in ids if isinstance(token, int))


@functools.lru_cache(maxsize=16)
def _content_key(file: Path, size: int, changed: int) -> str:
    """A hash of a file's content and of what makes a folder of it: the metadata, and of a large file spaced blocks.

    Args:
        file: the file.
        size: of the file in bytes.
        changed: when it was changed; with the size it tells whether the hash still counts.
    """
    digest = hashlib.sha256(f"{_FORMAT};{transformers.__version__};{size};".encode())
    with file.open("rb") as handle:
        digest.update(handle.read(_HEAD))
        if size > _HEAD:
            for block in range(_NUM_BLOCKS):
                handle.seek(block * (size - _BLOCK) // (_NUM_BLOCKS - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()[:32]
