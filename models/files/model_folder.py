"""From a model's name to its folder on this disk: a path, a GGUF file, an embedded model, or a hub id.

Owns what a model may be called. Knows nothing of what the folder holds.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from draftsmith.models.files.gguf_folder import folder_of, gguf_file_of
from draftsmith.models.files.hub_download import DownloadBar, announce_download

_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]


def resolve(path: str, revision: str | None = None) -> Path:
    """Find the local directory of a model.

    Args:
        path: a directory, a GGUF file or a directory with no other weights than one, one of the embedded models
            (``embedded:target``), or a hub id, whose snapshot is downloaded where it is not here.
        revision: the hub's revision.

    Returns:
        The directory; of a GGUF file the one in the user's cache that it was converted into.

    Raises:
        ValueError: neither a directory, a GGUF file nor a hub id that can be had; or a GGUF file that cannot be read.
    """
    if path.startswith("embedded:"):
        from importlib.resources import files

        name = path.removeprefix("embedded:")
        # A plain name: "embedded:../.." would be another place on this disk.
        folder = Path(str(files("draftsmith.embedded"))) / name
        if not name.isidentifier() or not (folder / "config.json").exists():
            raise ValueError(
                f"there is no embedded model {path!r}; use embedded:target, embedded:draft_lm or embedded:suffix"
            )
        return folder
    if "\0" in path:  # a name from somebody's file, which no system call takes
        raise ValueError(f"model path {path!r:.80} has a NUL in it; give a Hugging Face model directory or a hub id")
    local = Path(path)
    gguf_file = gguf_file_of(local)
    if gguf_file is not None:
        return folder_of(gguf_file)
    if local.is_dir():
        if not any((local / name).exists() for name in ("config.json", "adapter_config.json")):
            inner = sorted(file.parent.name for file in local.glob("*/config.json"))
            nearby = f" ({', '.join(inner)} in it {'have' if inner[1:] else 'has'} one)" if inner else ""
            raise ValueError(
                f"{path} is a directory without config.json{nearby}; give a Hugging Face model directory or a hub id"
            )
        return local
    if local.is_file():
        raise ValueError(f"{path} is a file; give the directory that it lies in, with its config.json")
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ValueError(
            f"model path {path!r} does not exist; give a Hugging Face model directory or a hub id such as org/name"
        )
    try:
        announce_download(path, revision)
        return Path(snapshot_download(path, revision=revision, ignore_patterns=_NOT_NEEDED, tqdm_class=DownloadBar))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} is neither a local directory nor a hub id that can be had: {error}") from error


def resolve_model(path: str, revision: str | None = None) -> Path:
    """As :func:`resolve`, of what must be a whole model.

    Args:
        path: directory, embedded model or hub id.
        revision: the hub's revision.

    Returns:
        The directory, with a ``config.json``.

    Raises:
        ValueError: as there; or it is an adapter.
    """
    folder = resolve(path, revision)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{path} holds a PEFT adapter and no model (config.json is missing); give its base model here and this as --adapter"
        )
    return folder


def openable_name(path: str) -> str:
    """The name by which other software opens a model: an embedded model and a GGUF file by their folder, anything else as it is.

    Args:
        path: directory, GGUF file, embedded model or hub id.

    Returns:
        A directory or hub id.

    Raises:
        ValueError: as :func:`resolve`.
    """
    if path.startswith("embedded:") or gguf_file_of(Path(path)) is not None:
        return str(resolve(path))
    return path
