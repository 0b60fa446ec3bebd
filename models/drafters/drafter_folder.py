"""A drafter from the folder it was saved in, whole or not at all.

Owns what a drafter may be called, which reader its folder needs, and that any other causal LM is a draft LM. Knows no trained family:
the registry does.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.models.drafters.draft_lm import load_draft_lm
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import read_drafter
from draftsmith.models.drafters.registry import missing_families, registry
from draftsmith.models.files.adapter_files import BOND
from draftsmith.models.files.checkpoint_files import CONFIG, read_fields
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.files.model_folder import resolve


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


def load_drafter(path: Path, dtype: str = "float32", trust_remote_code: bool = False, finite: bool = True) -> Drafter:
    """Load a drafter of any family, saved with ``save_pretrained`` or ``draftsmith export``, in evaluation mode; or a draft LM.

    The folder of a drafter's adapter gives the drafter that it names with the adapter merged into it.

    Args:
        path: its directory, or another name that :func:`drafter_folder` knows.
        dtype: of a draft LM, which runs beside the target; trained families keep their own.
        trust_remote_code: whether Python files that come with a draft LM may run; trained families have none.
        finite: refuse NaN and infinity; False lets those of a trained family pass, for who looks for them.

    Returns:
        The drafter, attached to nothing.

    Raises:
        ValueError: no such folder, no drafter, or one that is not whole (see `read_drafter`).
    """
    path = drafter_folder(str(path))
    if (path / BOND).is_file():
        return _with_adapter(path, dtype, trust_remote_code)
    kind = _family_in(path)
    if kind is None:
        draft_lm = load_draft_lm(str(path), dtype, trust_remote_code=trust_remote_code)
        draft_lm.loaded_from = path
        return draft_lm
    return read_drafter(path, kind, finite)


def _family_in(folder: Path) -> type[Drafter] | None:
    """The class of the drafter in a folder; None where its config is not that of a trained drafter.

    Raises:
        ValueError: a trained drafter of a family that is not installed, or whose package cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return None
    fields = read_fields(folder)
    name = fields.get("model_type")
    if not isinstance(name, str):
        return None
    family = registry().get(name)
    if family is None and "target_fingerprint" in fields:
        raise ValueError(
            f"{folder} holds a drafter of a family that is not known here (model_type {name!r:.80}){missing_families()}"
        )
    return None if family is None else family.drafter


def adapted(drafter: Drafter, adapter: Path) -> Drafter:
    """Merge a trained adapter into a drafter, in place, and bind it to the adapter's target.

    Args:
        drafter: the one that the adapter was trained on.
        adapter: its folder.

    Returns:
        The same drafter.

    Raises:
        ValueError: the adapter is of another drafter, or not whole.
    """
    from draftsmith.models.drafters.lora import load_adapter, merge_adapter

    bond = load_adapter(drafter, adapter, "merged", module_fingerprint(drafter))
    bond.bind(drafter)
    merged = merge_adapter(drafter, "merged")
    merged.loaded_from = adapter  # the shapes that were kept for the drafter alone are not those of both together
    return merged


def _with_adapter(adapter: Path, dtype: str, trust_remote_code: bool) -> Drafter:
    from draftsmith.models.drafters.lora import read_bond

    below = read_bond(adapter).drafter
    try:
        drafter = load_drafter(Path(below), dtype, trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{adapter} is an adapter of the drafter {below!r}, which cannot be had; give that drafter and the adapter apart with "
            f"--drafter-adapter to `draftsmith decode`, or to `draftsmith export`, which makes one drafter of both ({error})"
        ) from error
    return adapted(drafter, adapter)
