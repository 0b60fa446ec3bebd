"""A GGUF file as a model folder: checked, dequantised once through Transformers, and kept in the user's cache.

Owns what a GGUF file must hold, and where its folder lies. A GGUF file takes minutes to read through Transformers, so each is read once.
Everything else in the package then sees a folder with float32 safetensors, a config, a tokenizer and a chat template.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from transformers import PreTrainedTokenizerBase

from draftsmith.files import atomic_directory
from draftsmith.models.files.pretrained import name_faults, read_gguf, read_tokenizer
from draftsmith.models.gguf.header import GgufHeader, read_header
from draftsmith.models.gguf.tokenizer import build_tokenizer
from draftsmith.ownership import user_cache_folder

_LOG = logging.getLogger(__name__)
_SUFFIX = ".gguf"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_FORMAT = 3  # of the folders in the cache; raise it when they change
_HEAD, _BLOCK, _NUM_BLOCKS = 64 * 2**20, 64 * 2**10, 256  # bytes, bytes, count: what of a large file is hashed
# Text on which tokenizers differ: contractions, digits, marks, runs of blanks, words of mixed case.
_PROBE = "I'LL pay 12345 to HTTPServer's  x/y\n\n\t 2026-11 naïve 你好 don't"
_NUM_PROBED = 8  # special tokens that are tried between two such texts
_ENDS = ("eos", "eot", "eom")  # end of text, of turn and of message


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
        ValueError: the file is broken or incomplete, Transformers cannot read its architecture, its tokenizer has no rule here, or the
            `gguf` package is missing.
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


def _check_header(file: Path, header: GgufHeader) -> None:
    """Refuse what Transformers would leave out without a word, and with it a part of the model.

    Raises:
        ValueError: an adapter or a part of a split file, an unknown architecture, or a scaled rope.
    """
    remedy = "give the model's folder with safetensors"
    kind, num_parts = header.read("general.type", str) or "model", header.read("split.count", int) or 1
    if kind != "model":
        raise ValueError(f"{file} holds no model but {kind!r:.80}; {remedy}")
    if num_parts > 1:
        raise ValueError(f"{file} is one of {num_parts} parts; join them with `llama-gguf-split --merge`, or {remedy}")
    known = {_plain(name) for name in _architectures()}
    if _plain(header.architecture) not in known:
        raise ValueError(
            f"{file} has the architecture {header.architecture!r:.80}, which Transformers does not read from GGUF "
            f"(it reads {', '.join(sorted(_architectures()))}); {remedy}"
        )
    scaling = header.read(f"{header.architecture}.rope.scaling.type", str) or "none"
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
    tokenizer = build_tokenizer(header)  # first: a tokenizer that cannot be had is known before the weights are read
    num_weights = sum(math.prod(shape) for shape in header.shapes.values())
    _LOG.info("converting %s into %s (%.1f GiB, once)", file, folder, num_weights * 4 / 2**30)
    with TemporaryDirectory() as alone, atomic_directory(folder, "draftsmith's GGUF cache") as partial:
        # Alone in its folder: Transformers would read any config, template or adapter that happens to lie beside the file.
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        model = read_gguf(Path(alone), "model.gguf", file, set(header.shapes))
        model.config.update({"eos_token_id": list(_end_ids(header)) or None})
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _check_saved(file, partial, tokenizer)


def _check_saved(file: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that Transformers reads back as another: for some families it builds their own instead."""
    read = read_tokenizer(folder)
    text = _PROBE + "".join(list(tokenizer.get_added_vocab())[:_NUM_PROBED]) + _PROBE
    if read.encode(text) != tokenizer.encode(text):
        raise ValueError(
            f"{file} has a tokenizer that Transformers does not keep for its family: it reads a {type(read).__name__}, which gives other "
            "tokens; give the model's folder with safetensors"
        )


def _end_ids(header: GgufHeader) -> Iterator[int]:
    """The tokens that end a reply, each once."""
    ids = (header.read(f"tokenizer.ggml.{name}_token_id", int) for name in _ENDS)
    yield from dict.fromkeys(token for token in ids if token is not None)


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
