"""`draftsmith export`: a trained drafter as a folder that others can load, with a card that tells the truth about it.

Owns the order of the work and which inputs are an error. Does not know the layouts' tables or the card's words.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.export.card import Subject, write_card
from draftsmith.export.layouts import layouts
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.json_text import parse_json
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.drafters.registry import family_of
from draftsmith.models.files.adapter_files import BOND, TARGET_ADAPTER
from draftsmith.models.files.checkpoint_files import weight_files
from draftsmith.models.files.fingerprint import checkpoint_fingerprint, module_fingerprint, tokenizer_fingerprint
from draftsmith.models.lora.adapted_drafter import adapted
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.options import EndsOptions
from draftsmith.models.tree.kept_shapes import read_kept_shapes
from draftsmith.ownership import check_replaceable

CARD = "README.md"
STAGE = "draftsmith export"


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Records that the model card quotes.

    Args:
        report: A report.json of `draftsmith evaluate` with rows of these very weights.
        training: Folder or file of the training's provenance.json; by default the one in the drafter's folder.
    """

    report: Path | None = None
    training: Path | None = None


NO_RECORDS = RecordOptions()
OWN_ENDS = EndsOptions()


def export(
    drafter: Path,
    out: Path,
    target: str | None = None,
    layout: str = "draftsmith",
    drafter_adapter: Path | None = None,
    records: Annotated[RecordOptions, FLAT] = NO_RECORDS,
    where: Annotated[EndsOptions, FLAT] = OWN_ENDS,
) -> None:
    """Write a trained drafter as safetensors, config and model card, then read it back and compare.

    Reads draftsmith's layout and, with --target, those of other software, which docs/how-to/serve/export.md lists. The card's
    figures come from --report and the training record only; without them the card states that nothing was measured or recorded.

    Args:
        drafter: Folder of the drafter, draftsmith's or another software's.
        out: Folder to write; an earlier export there is replaced as a whole.
        target: Directory or hub id of the drafter's target, or embedded:target; checked to be the one it was trained for.
        layout: draftsmith or custom_generate (Transformers alone) for any drafter, or an engine's layout for its family.
            docs/how-to/serve/export.md lists them; the error for another name lists those that fit the drafter.
        drafter_adapter: Folder of a trained adapter of the drafter; it is merged, since serving engines have none.
        records: What the model card quotes; see `RecordOptions`.
        where: Which target is meant; see `EndsOptions`. Name its adapter where the drafter is for both together.

    Raises:
        ValueError: a file or setting does not fit the others, or the folder is one that this command must not replace.
    """
    read = [path for path in (drafter, drafter_adapter, records.report) if path is not None]
    check_replaceable(out, STAGE, read)
    if where.adapter is not None and target is None:
        raise ValueError(f"adapter {where.adapter!r} is on a target that is not named; give the target, too")
    ends, tokenizer = None, ""
    if target is not None:
        ends, tokenizer = where.load_ends(target), tokenizer_fingerprint(where.tokenizer(target))
    trained = _load(drafter, drafter_adapter, ends, tokenizer)
    measured, made_by = _measured(records.report, trained) if records.report is not None else ([], {})
    history = _training(drafter if drafter_adapter is None else drafter_adapter, records.training)
    subject = _subject(trained, layout, target, where)
    record = provenance.record(provenance.command_line(), _config(trained, layout), _inputs(drafter, read))
    with exclusive(out), atomic_directory(out, STAGE) as folder:
        notes = (
            *layouts.write(trained, folder, layout, ends),
            *_adapter_notes(drafter, where.adapter, drafter_adapter),
        )
        subject = replace(subject, notes=notes)
        if (drafter / TARGET_ADAPTER).is_dir():
            shutil.copytree(drafter / TARGET_ADAPTER, folder / TARGET_ADAPTER)
        if subject.layout.holds_shapes:
            _copy_shapes(drafter if drafter_adapter is None else drafter_adapter, folder)
        (folder / CARD).write_text(write_card(subject, measured, made_by, history), encoding="utf-8")
        provenance.write(folder, record | {"training": history})
    print(f"{out}: {subject.parameters:,} parameters in {layout} layout, read back bit for bit; see {out / CARD}")
    for note in subject.notes:
        print(f"note: {note}")


def _subject(drafter: Drafter, layout: str, target: str | None, where: EndsOptions) -> Subject:
    """What the card is about, as far as the drafter and its target show it."""
    family = family_of(drafter)
    subject = Subject(
        family=family,
        config=drafter.config,
        features=drafter.features,
        parameters=sum(parameter.numel() for parameter in drafter.parameters()),
        dtype=str(drafter.dtype).removeprefix("torch."),
        layout=layouts.layout_for(family, layout),
        most_steps=drafter.max_draft_steps,
    )
    if target is None:
        return subject
    tokenizer = where.tokenizer(target)
    has_template = bool(tokenizer.chat_template)
    return replace(subject, has_template=has_template, eos_token_ids=where.end_tokens(target, tokenizer))


def _config(drafter: Drafter, layout: str) -> dict[str, str]:
    names = ("target_name", "target_fingerprint")
    return {"layout": layout} | {name: getattr(drafter.config, name) for name in names}


def _inputs(drafter: Path, read: Sequence[Path]) -> dict[str, str]:
    """The files and folders that an export is made of, each with its fingerprint."""
    others = [path for path in read if path != drafter]
    fingerprints = {str(path): checkpoint_fingerprint(path) if path.is_dir() else sha256_file(path) for path in others}
    return {str(file): sha256_file(file) for file in weight_files(drafter)} | fingerprints


def _load(drafter: Path, adapter: Path | None, ends: TargetEnds | None, tokenizer: str) -> Drafter:
    """The drafter, with its adapter merged into it where one is given; attached where ends are given."""
    if (drafter / BOND).is_file():
        raise ValueError(f"{drafter} is an adapter; give its drafter, and this folder as --drafter-adapter")
    if adapter is None:
        return layouts.load_any(drafter, ends, tokenizer)
    trained = adapted(load_drafter(drafter, target=None if ends is None else TargetBond(ends, tokenizer)), adapter)
    if ends is not None:
        trained.attach(ends)
        trained.check_tokenizer(tokenizer)
    return trained


def _copy_shapes(source: Path, folder: Path) -> None:
    """The shapes that tune kept beside the drafter, or beside the adapter that is merged into it."""
    kept = read_kept_shapes(source)
    if kept is not None:
        kept.write(folder)


def _adapter_notes(drafter: Path, adapter: str | None, drafter_adapter: Path | None) -> tuple[str, ...]:
    """What a user must know of adapters that went into this export."""
    notes = []
    if (drafter / TARGET_ADAPTER).is_dir():
        notes.append(
            f"It was trained together with the adapter of its target in `{TARGET_ADAPTER}`. Decode with the target and that adapter. "
            "Replies are then those of the adapted model, which is not the target without it; lossless means equal to the adapted model's."
        )
    if adapter is not None:
        notes.append(
            f"The target is the model named above with the PEFT adapter `{adapter}` merged into it; load it so."
        )
    if drafter_adapter is not None:
        notes.append(
            f"These weights are those of the drafter `{drafter}` with its adapter `{drafter_adapter}` merged into them."
        )
    return tuple(notes)


def _measured(report: Path, drafter: Drafter) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a report that were measured with exactly these weights.

    Raises:
        ValueError: the report is missing or broken, or holds no such row.
    """
    if not report.is_file():
        raise ValueError(f"{report}: no such report; make one with `draftsmith evaluate --drafters {report.parent}`")
    content = parse_json(report.read_bytes(), str(report), "run `draftsmith evaluate` again")
    listed = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise ValueError(
            f"{report}: not a report: it has no list of rows; give the report.json of `draftsmith evaluate`"
        )
    own = module_fingerprint(drafter)
    rows = [row for row in content["rows"] if row.get("drafter_fingerprint") == own]
    if not rows:
        names = ", ".join(sorted({str(row.get("drafter")) for row in content["rows"]}))
        raise ValueError(
            f"{report} holds no row of these weights (fingerprint {own[:12]}), only of {names}; this card "
            "takes no figures of other weights: evaluate this drafter first"
        )
    return rows, content


def _training(drafter: Path, training: Path | None) -> dict[str, Any]:
    """The training's record; that of an earlier export hands on the record it holds."""
    if training is None:
        if not (drafter / provenance.FILE_NAME).is_file():
            return {}
        folder = drafter
    else:
        folder = training.parent if training.name == provenance.FILE_NAME else training
    record = provenance.read(folder)
    history = record.get("training", record)
    return history if isinstance(history, dict) else {}
