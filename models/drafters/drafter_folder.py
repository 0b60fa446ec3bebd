"""A drafter from the folder it was saved in, whole or not at all.

Owns what a drafter may be called, which reader its folder needs, how a folder of other software is bound to a target, and that any other
causal LM is a draft LM. Knows no trained family and no layout: the registry's records name both.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import pkgutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith import provenance
from draftsmith.models.drafters.draft_lm import load_draft_lm
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import read_drafter
from draftsmith.models.drafters.family import Family
from draftsmith.models.drafters.registry import all_families, missing_families, registry
from draftsmith.models.files.adapter_files import BOND, TARGET_ADAPTER
from draftsmith.models.files.checkpoint_files import CONFIG, StoredTensors, read_fields, read_tensors, weight_files
from draftsmith.models.files.fingerprint import checkpoint_fingerprint
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.foreign.named_kinds import broken_claim, claims_known_head, named_kind
from draftsmith.models.foreign.reader import Foreign
from draftsmith.models.foreign.speculators_config import SPECULATORS_KEY
from draftsmith.models.target.ends import TargetEnds

_LOG = logging.getLogger(__name__)
COMPOSED = {
    "draftsmith_suffix": "draftsmith.models.composed.suffix_drafter:SuffixDrafter",
    "draftsmith_refined": "draftsmith.models.composed.refined_drafter:RefinedDrafter",
    "draftsmith_phrases": "draftsmith.models.composed.phrase_drafter:PhraseDrafter",
}
"""Drafters whose folder is a config without weights, by model_type: the class that reads it."""
_ADAPTED = "draftsmith.models.lora.adapted_drafter:from_folder"
"""What reads the folder of an adapter."""


@dataclass(frozen=True)
class TargetBond:
    """The target that a drafter of other software is for, since its folder names none.

    Attributes:
        ends: the target's.
        tokenizer_fingerprint: of the target's tokenizer; empty means unknown.
    """

    ends: TargetEnds
    tokenizer_fingerprint: str = ""


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
    if kind is not None:
        _say_of_adapted_target(path)
        return read_drafter(path, kind, finite)
    if (target is not None and _part_of_target(path, target.ends)) or is_foreign(path):
        return read_foreign(path, target)
    draft_lm = load_draft_lm(str(path), dtype, trust_remote_code=trust_remote_code)
    draft_lm.loaded_from = path
    return draft_lm


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


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a drafter of other software: of a layout that is read, or of a kind that is known by name.

    Args:
        folder: that holds no drafter in draftsmith's layout.

    Returns:
        True for a drafter, False for a whole model.

    Raises:
        ValueError: its weights are pickled, or a file is broken.
    """
    if not (folder / CONFIG).is_file():
        return False
    fields = read_fields(folder)
    if SPECULATORS_KEY in fields or named_kind(fields) or claims_known_head(fields):
        return True
    if not weight_files(folder) and any(folder.glob("*.safetensors")):
        return False
    return layout_of(fields, read_tensors(folder)) is not None


def layout_of(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Family, Foreign] | None:
    """Find the layout of other software that a folder is in.

    Args:
        fields: of its config.
        tensors: by name.

    Returns:
        The family of its drafter, and how it is read; None where no family reads it.
    """
    return next((pair for pair in _foreign_layouts() if pair[1].holds(fields, tensors)), None)


def _foreign_layouts() -> Iterator[tuple[Family, Foreign]]:
    """Every layout of other software that one of the families reads, with that family."""
    for family in all_families():
        for module in map(importlib.import_module, family.layouts):
            yield from ((family, layout.foreign) for layout in module.LAYOUTS if layout.foreign is not None)


def read_foreign(folder: Path, target: TargetBond | None) -> Drafter:
    """Read a drafter in the layout of other software, or the one inside the target's own checkpoint, and bind it to its target.

    Args:
        folder: with ``config.json`` and weights as safetensors.
        target: what it is for.

    Returns:
        The drafter in evaluation mode, attached to the target.

    Raises:
        ValueError: no layout that is known here, no ``target``, a drafter that is not whole, one that the families cannot express, or one
            of another target.
    """
    if target is not None and (part := _part_of_target(folder, target.ends)):
        return _bound(part, StoredTensors(folder), folder, target)
    fields, tensors = read_fields(folder), read_tensors(folder)
    match = layout_of(fields, tensors)
    if match is None:
        raise ValueError(unknown_layout(folder, fields, tensors))
    layout = match[1]
    if target is None:
        raise ValueError(
            f"{folder} is in {layout.software} layout, which names no target; say which one it is for with --target"
        )
    _check_bond(folder, target.ends)
    return _bound(layout, tensors, folder, target)


def part_in(names: Collection[str]) -> tuple[Family, Foreign] | None:
    """Find a drafter that lies inside a target's checkpoint.

    Args:
        names: of the checkpoint's tensors.

    Returns:
        Its family, and how it is read; None where there is none.
    """
    return next(
        (pair for pair in _foreign_layouts() if pair[1].in_target is not None and pair[1].in_target(names)), None
    )


def _part_of_target(folder: Path, ends: TargetEnds) -> Foreign | None:
    """How the drafter inside a folder is read, where the folder is the target's own; None where it is not."""
    if not (folder / CONFIG).is_file():
        return None
    part = part_in(StoredTensors(folder).keys())
    if part is None or checkpoint_fingerprint(folder) == ends.fingerprint:
        return None if part is None else part[1]
    _LOG.warning(
        "%s holds an %s for its own model, and the target is not that model: it has another checkpoint, another revision or an adapter. So "
        "the whole folder drafts as a draft LM. To draft with the layer, give the folder of the target's own revision, and no adapter",
        folder,
        part[0].about.title,
    )
    return None


def _bound(layout: Foreign, tensors: Mapping[str, Tensor], folder: Path, target: TargetBond) -> Drafter:
    """Read a drafter, and bind it to its target."""
    ends = target.ends
    drafter = layout.read(read_fields(folder), tensors, ends, str(folder))
    drafter.config.target_name, drafter.config.target_fingerprint = ends.name, ends.fingerprint
    drafter.config.tokenizer_fingerprint = target.tokenizer_fingerprint
    drafter.loaded_from = folder
    return drafter.attach(ends)


def unknown_layout(folder: Path, fields: Mapping[str, Any], tensors: Collection[str]) -> str:
    """Say what is wrong with a folder that no layout holds.

    Args:
        folder: where it lies.
        fields: of its config.
        tensors: the names of its tensors.

    Returns:
        The message of an error.
    """
    software = " or in ".join(dict.fromkeys(layout.software for _, layout in _foreign_layouts()))
    readable = f"give a folder in draftsmith's layout or in {software}{missing_families()}"
    kind, package = named_kind(fields, tensors), fields.get(SPECULATORS_KEY)
    if package is not None:
        known = f" ({kind})" if kind else ""
        return f"{folder} is a {package!r:.80} of the speculators package{known}, which draftsmith does not decode yet; {readable}"
    if kind:
        return f"{folder} holds a drafter of the kind {kind}, which draftsmith does not decode yet; {readable}"
    if claims_known_head(fields):
        remedy = f"take names without a prefix such as model., and the whole file. Otherwise {readable}"
        return f"{folder} is {broken_claim(fields, tensors)}; {remedy}"
    return f"{folder} holds no drafter that is known here (model_type {fields.get('model_type')!r:.80}); {readable}"


def _check_bond(folder: Path, ends: TargetEnds) -> None:
    """Other layouts name no target, but a folder that this package wrote tells it in its provenance."""
    if not (folder / provenance.FILE_NAME).is_file():
        return
    config = provenance.read(folder).get("config", {})
    bond = config.get("target_fingerprint", "")
    if bond and bond != ends.fingerprint:
        raise ValueError(
            f"{folder} was exported for target {config.get('target_name')!r} (fingerprint {bond[:12]}), not for "
            f"{ends.name!r} ({ends.fingerprint[:12]}); name that target"
        )


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
