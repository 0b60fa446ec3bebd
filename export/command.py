"""`draftsmith export`: a trained drafter as a folder that others can load, with a card that tells the truth about it.

Owns the order of the work and what is refused. Does not know the layouts' tables or the card's words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from draftsmith import provenance
from draftsmith.export import redrafter as layouts
from draftsmith.export.card import Subject, write_card
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.models.fingerprint import module_fingerprint, tokenizer_fingerprint
from draftsmith.models.redrafter import ReDrafter
from draftsmith.models.target import TargetEnds, load_tokenizer, resolve

CARD = "README.md"


def export(
    drafter: Path,
    out: Path,
    target: str | None = None,
    layout: Literal["draftsmith", "apple"] = "draftsmith",
    report: Path | None = None,
    training: Path | None = None,
    revision: str | None = None,
) -> None:
    """Write a trained drafter as safetensors, config and model card, then read it back and compare.

    Reads draftsmith's layout and Apple's (which needs --target), and writes either. The card's figures come from
    --report and the training record only; without them it says that nothing was measured or recorded.

    Args:
        drafter: Folder of the trained drafter.
        out: Folder to write; an earlier export there is replaced as a whole.
        target: Directory or hub id of the drafter's target, or embedded:target; checked to be the one it was trained
            for.
        layout: draftsmith, or apple for the layout of Apple's ml-recurrent-drafter.
        report: A report.json of `draftsmith evaluate` with rows of these very weights.
        training: Folder or file of the training's provenance.json; by default the one in the drafter's folder.
        revision: Revision of the target's hub id.
    """
    _check_place(drafter, out)
    trained = _read(drafter, target, revision)
    measured, made_by = _measured(report, trained) if report is not None else ([], {})
    history = _training(drafter, training)
    subject = Subject(
        config=trained.config,
        parameters=sum(parameter.numel() for parameter in trained.parameters()),
        dtype=str(trained.dtype).removeprefix("torch."),
        layout=layout,
    )
    if target is not None:
        subject = replace(subject, **_target_facts(target, revision))
    config = {"layout": layout, "target_name": trained.config.target_name}
    config["target_fingerprint"] = trained.config.target_fingerprint
    inputs = {str(drafter / layouts.WEIGHTS): sha256_file(drafter / layouts.WEIGHTS)}
    if report is not None:
        inputs[str(report)] = sha256_file(report)
    record = provenance.record(provenance.command_line(), config, inputs) | {"training": history}
    with exclusive(out), atomic_directory(out) as folder:
        (layouts.write if layout == "draftsmith" else layouts.write_apple)(trained, folder)
        (folder / CARD).write_text(write_card(subject, measured, made_by, history), encoding="utf-8")
        provenance.write(folder, record)
    print(f"{out}: {subject.parameters:,} parameters in {layout} layout, read back bit for bit; see {out / CARD}")


def _check_place(drafter: Path, out: Path) -> None:
    if out.resolve() == drafter.resolve():
        raise ValueError(f"out is the drafter's own folder {drafter}; give another, so that the training's files stay")
    if out.is_dir() and any(out.iterdir()):
        known = {layouts.CONFIG, layouts.WEIGHTS, CARD, provenance.FILE_NAME}
        others = sorted(path.name for path in out.iterdir() if path.name not in known)
        if others or not (out / layouts.WEIGHTS).exists():
            found = ", ".join(others[:3]) or "no earlier export"
            raise ValueError(f"{out} holds {found}, which an export would remove; give an empty or a new folder")


def _read(folder: Path, target: str | None, revision: str | None) -> ReDrafter:
    """The drafter in either layout, attached to the target where one is named.

    Raises ValueError for another target or tokenizer than the drafter's, and for Apple's layout without a target.
    """
    fields = layouts.read_config(folder)
    ends = None if target is None else TargetEnds.load(target, revision=revision)
    print_ = "" if target is None else tokenizer_fingerprint(load_tokenizer(target, revision))
    if layouts.is_apple(fields):
        if ends is None:
            raise ValueError(
                f"{folder} is in Apple's layout, which names no target; say which one it is for with --target"
            )
        _check_bond(folder, ends)
        return layouts.load_apple(folder, ends, print_)
    drafter = layouts.load(folder)
    if ends is not None:
        drafter.attach(ends)
        drafter.check_tokenizer(print_)
    return drafter


def _check_bond(folder: Path, ends: TargetEnds) -> None:
    """Apple's config names no target, but a folder that this command wrote tells it in its provenance."""
    if not (folder / provenance.FILE_NAME).is_file():
        return
    config = provenance.read(folder).get("config", {})
    own = config.get("target_fingerprint", "")
    if own and own != ends.fingerprint:
        raise ValueError(
            f"{folder} was exported for target {config.get('target_name')!r} (fingerprint {own[:12]}), not for "
            f"{ends.name!r} ({ends.fingerprint[:12]}); name that target"
        )


def _measured(report: Path, drafter: ReDrafter) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a report that were measured with exactly these weights.

    Raises ValueError for a missing or broken report, and for one that holds no such row.
    """
    if not report.is_file():
        raise ValueError(f"{report}: no such report; make one with `draftsmith evaluate --drafters {report.parent}`")
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{report}: not valid JSON: {error}; run `draftsmith evaluate` again") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError(
            f"{report}: not a report: it has no list of rows; give the report.json of `draftsmith evaluate`"
        )
    own = module_fingerprint(drafter)
    rows = [row for row in found["rows"] if row.get("drafter_fingerprint") == own]
    if not rows:
        names = ", ".join(sorted({str(row.get("drafter")) for row in found["rows"]}))
        raise ValueError(
            f"{report} holds no row of these weights (fingerprint {own[:12]}), only of {names}; figures of other "
            "weights do not go on this card: evaluate this drafter first"
        )
    return rows, found


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


def _target_facts(target: str, revision: str | None) -> Mapping[str, Any]:
    folder = resolve(target, revision)
    has_template = bool(load_tokenizer(target, revision).chat_template)
    ids: Any = None
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = () if ids is None else (int(ids),) if isinstance(ids, int) else tuple(ids)
    return {"has_template": has_template, "eos_token_ids": ends}
