"""From a model's name to its folder on this disk: a path, an embedded model, or a hub id.

Owns what a model may be called. Knows nothing of what the folder holds.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from draftsmith.models.files.hub_download import DownloadBar, announce_download

_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]


def resolve(path: str, revision: str | None = None) -> Path:
    """Find the local directory of a model.

    Args:
        path: a directory, one of the embedded models (``embedded:target``), or a hub id, whose snapshot is downloaded where it is not here.
        revision: the hub's revision.

    Returns:
        The directory.

    Raises:
        ValueError: neither a directory nor a hub id that can be had.
    """
    if path.startswith("embedded:"):
        from importlib.resources import files

        name = path.removeprefix("embedded:")
        # A plain name: "embedded:../.." would be another place on this disk.
        folder = Path(str(files("draftsmith.embedded"))) / name
        if not name.isidentifier() or not (folder / "config.json").exists():
            raise ValueError(f"there is no embedded model {path!r}; use embedded:target or embedded:draft_lm")
        return folder
    if "\0" in path:  # a name from somebody's file, which no system call takes
        raise ValueError(f"model path {path!r:.80} has a NUL in it; give a Hugging Face model directory or a hub id")
    local = Path(path)
    if local.is_dir():
        if not any((local / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"{path} is a directory without config.json; give a Hugging Face model directory or a hub id"
            )
        return local
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
