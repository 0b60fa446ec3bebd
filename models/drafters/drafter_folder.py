"""A drafter from the folder it was saved in, whole or not at all.

Owns what a drafter may be called, which reader its folder needs, and that any other causal LM is a draft LM. Knows no trained family: the
registry's records name them.
"""

from __future__ import annotations

import hashlib
import logging
import pkgutil
from pathlib import Path

from draftsmith.models.drafters.draft_lm import load_draft_lm
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import read_drafter
from draftsmith.models.drafters.other_layouts import (
    TargetBond,
    is_other_software,
    layout_of,
    part_of_target,
    read_other_software,
)
from draftsmith.models.drafters.registry import missing_families, registry
from draftsmith.models.files.adapter_files import BOND, TARGET_ADAPTER
from draftsmith.models.files.checkpoint_files import CONFIG, read_fields, read_tensors
from draftsmith.models.files.fingerprint import checkpoint_fingerprint
from draftsmith.models.files.model_folder import resolve

_LOG = logging.getLogger(__name__)
COMPOSED = {
    "draftsmith_suffix": "draftsmith.models.composed.suffix_drafter:SuffixDrafter",
    "draftsmith_refined": "draftsmith.models.composed.refined_drafter:RefinedDrafter",
    "draftsmith_phrases": "draftsmith.models.composed.phrase_drafter:PhraseDrafter",
}
"""Drafters whose folder is a config without weights, by model_type: the class that reads it."""
_ADAPTED = "draftsmith.models.lora.adapted_drafter:from_folder"
"""What reads the folder of an adapter."""


def drafter_folder(name: str) -> Path:
    """Find where a drafter lies.

    Args:
        name: a directory, one of the embedded models (``embedded:draft_lm``), or a hub id.

    Returns:
        The folder; of a hub id its snapshot.

    Raises:
        ValueError: there is no such thing.
    """
    try:
        return resolve(name)
    except ValueError as error:
        raise ValueError(
            f"drafter {name!r} is no folder with a config.json; give what `draftsmith export` or training wrote, or a causal LM by its "
            f"directory, its hub id or as embedded:draft_lm ({error})"
        ) from error


def load_drafter(
    path: Path,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    finite: bool = True,
    target: TargetBond | None = None,
) -> Drafter:
    """Load a drafter of any family in evaluation mode, in draftsmith's layout or that of other software; or a draft LM.

    The folder of a drafter's adapter gives the drafter that it names with the adapter merged into it.

    Args:
        path: its directory, or another name that :func:`drafter_folder` knows.
        dtype: of a draft LM, which runs beside the target; trained families keep their own.
        trust_remote_code: whether Python files that come with a draft LM may run; trained families have none.
        finite: refuse NaN and infinity; False lets those of a trained family pass, for who looks for them.
        target: what a folder of other software is for; only such a folder needs it.

    Returns:
        The drafter. One of other software is attached to the target, any other to nothing.

    Raises:
        ValueError: no such folder, no drafter, or one that is not whole (see `read_drafter`); a folder of other software that is of
            another target, or without ``target``.
    """
    path = drafter_folder(str(path))
    if (path / BOND).is_file():

        def load_below(name: str) -> Drafter:
            return load_drafter(Path(name), dtype, trust_remote_code, target=target)

        adapted: Drafter = pkgutil.resolve_name(_ADAPTED)(path, load_below)
        return adapted
    if composed := _composed_in(path):
        return _composed(path, composed, dtype, trust_remote_code, finite, target)
    kind = _family_in(path)
    if kind is not None and not _is_without_target(path):
        _say_of_adapted_target(path)
        return read_drafter(path, kind, finite)
    if kind is not None or (target is not None and part_of_target(path, target.ends)) or is_other_software(path):
        return read_other_software(path, target)
    draft_lm = load_draft_lm(str(path), dtype, trust_remote_code=trust_remote_code)
    draft_lm.loaded_from = path
    return draft_lm


def _is_without_target(folder: Path) -> bool:
    """Whether a folder with a family's own model_type is other software's, which names no target: Apple's is one."""
    fields = read_fields(folder)
    return "target_fingerprint" not in fields and layout_of(fields, read_tensors(folder)) is not None


def _say_of_adapted_target(folder: Path) -> None:
    """Say that a drafter goes with another model than the target that it names."""
    if (folder / TARGET_ADAPTER).is_dir():
        _LOG.warning(
            "%s was trained together with an adapter of its target. Decode with --adapter %s: replies are then those of the adapted model, "
            "which is NOT the target without it, and lossless means equal to the adapted model's own",
            folder,
            folder / TARGET_ADAPTER,
        )


def drafter_fingerprint(folder: Path) -> str:
    """Hash what a drafter's folder holds: its weights, or where it has none, its config and all that this names.

    Args:
        folder: of the drafter.

    Returns:
        sha256 (hex).

    Raises:
        ValueError: the folder holds no drafter.
    """
    if not _composed_in(folder):
        return checkpoint_fingerprint(folder)
    _check_no_circle(folder)
    below = [drafter_fingerprint(drafter_folder(name)) for name in _named_in(folder)]
    return hashlib.sha256((folder / CONFIG).read_bytes() + "".join(below).encode()).hexdigest()


def _composed_in(folder: Path) -> str:
    """The class that reads a folder without weights, by its name; empty for any other folder."""
    if not (folder / CONFIG).is_file():
        return ""
    return COMPOSED.get(str(read_fields(folder).get("model_type")), "")


def _composed(
    path: Path, kind: str, dtype: str, trust_remote_code: bool, finite: bool, target: TargetBond | None
) -> Drafter:
    """The drafter that a config describes, with the drafters that it names."""
    _check_no_circle(path)

    def load(name: str) -> Drafter:
        return load_drafter(Path(_beside(path, name)), dtype, trust_remote_code, finite, target)

    drafter: Drafter = pkgutil.resolve_name(kind).from_folder(path, read_fields(path), load)
    return drafter


def _named_in(folder: Path) -> list[str]:
    """What a config without weights names."""
    fields = read_fields(folder)
    names = [fields.get(part) for part in ("head", "ngrams", "lm", "shared_pool")]
    return [_beside(folder, name) for name in names if name and isinstance(name, str)]


def _check_no_circle(folder: Path, above: tuple[Path, ...] = ()) -> None:
    """Check that no config names a folder that names it.

    Raises:
        ValueError: naming both.
    """
    if folder.resolve() in above:
        raise ValueError(f"{above[-1] / CONFIG} names {folder}, which names it in turn; name a trained drafter")
    if _composed_in(folder):
        for name in _named_in(folder):
            _check_no_circle(Path(name), (*above, folder.resolve()))


def _beside(folder: Path, name: str) -> str:
    """The name of a drafter in a config: a folder beside the config's own, or else as it is written."""
    return str(folder / name) if (folder / name).is_dir() else name


def _family_in(folder: Path) -> type[Drafter] | None:
    """The class of the drafter in a folder; None where its config is not that of a trained drafter.

    Raises:
        ValueError: a trained drafter of a family that is not installed, or whose package cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return None
    fields = read_fields(folder)
    name = fields.get("model_type")
    family = registry().get(name) if isinstance(name, str) else None
    if family is None and "target_fingerprint" in fields:
        raise ValueError(
            f"{folder} holds a drafter of a family that is not known here (model_type {name!r:.80}){missing_families()}"
        )
    return None if family is None else family.drafter
