"""`draftsmith export`: a trained drafter as a folder that others can load, with a card that tells the truth about it.

Owns the order of the work and what is refused. Does not know the layouts' tables or the card's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith import provenance
from draftsmith.export.card import Subject, write_card
from draftsmith.export.layouts import layouts
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import adapted, load_drafter
from draftsmith.models.drafters.registry import family_of
from draftsmith.models.files.adapter_files import BOND
from draftsmith.models.files.checkpoint_files import WEIGHTS
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.fingerprint import checkpoint_fingerprint, module_fingerprint, tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.options import TargetOptions
from draftsmith.outside import parse_json
from draftsmith.ownership import check_replaceable

CARD = "README.md"
STAGE = "draftsmith export"


def export(
    drafter: Path,
    out: Path,
    target: str | None = None,
    layout: str = "draftsmith",
    report: Path | None = None,
    training: Path | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    drafter_adapter: Path | None = None,
    trust_remote_code: bool = False,
    context: int | None = None,
) -> None:
    """Write a trained drafter as safetensors, config and model card, then read it back and compare.

    Reads draftsmith's layout and, with --target, those of other software: Apple's, the official EAGLE code's, vLLM's
    and SGLang's, TensorRT-LLM's, speculators'. The card's figures come from --report and the training record only;
    without them it says that nothing was measured or recorded.

    Args:
        drafter: Folder of the trained drafter.
        out: Folder to write; an earlier export there is replaced as a whole.
        target: Directory or hub id of the drafter's target, or embedded:target; checked to be the one it was trained
            for.
        layout: draftsmith or custom_generate (Transformers alone) for any drafter; apple (ml-recurrent-drafter) for a
            ReDrafter; eagle (vLLM and SGLang) for an EAGLE-1; eagle3 (vLLM and SGLang), tensorrt-llm or speculators
            for an EAGLE-3.
        report: A report.json of `draftsmith evaluate` with rows of these very weights.
        training: Folder or file of the training's provenance.json; by default the one in the drafter's folder.
        revision: Revision of the target's hub id.
        trust_remote_code: Run Python files that come with the target; read them first.
        context: Most tokens that the target reads; default: from its config, as serving engines derive it.
        adapter: PEFT adapter of the target, where the drafter is for both together.
        drafter_adapter: Folder of a trained adapter of the drafter; it is merged, since serving engines have none.
    """
    check_replaceable(out, STAGE, [path for path in (drafter, drafter_adapter, report) if path is not None])
    if adapter is not None and target is None:
        raise ValueError(f"adapter {adapter!r} is on a target that is not named; give the target, too")
    ends, tokenizer = None, ""
    if target is not None:
        options = TargetOptions(
            revision=revision, adapter=adapter, trust_remote_code=trust_remote_code, context=context
        )
        ends = options.load_ends(target)
        tokenizer = tokenizer_fingerprint(load_tokenizer(target, revision, trust_remote_code))
    trained = _load(drafter, drafter_adapter, ends, tokenizer)
    measured, made_by = _measured(report, trained) if report is not None else ([], {})
    history = _training(drafter if drafter_adapter is None else drafter_adapter, training)
    family = family_of(trained)
    subject = Subject(
        family=family,
        config=trained.config,
        features=trained.features,
        parameters=sum(parameter.numel() for parameter in trained.parameters()),
        dtype=str(trained.dtype).removeprefix("torch."),
        layout=layouts.layout_for(family, layout),
    )
    if target is not None:
        subject = replace(subject, **_target_facts(target, revision, trust_remote_code))
    config = {"layout": layout, "target_name": trained.config.target_name}
    config["target_fingerprint"] = trained.config.target_fingerprint
    inputs = {str(drafter / WEIGHTS): sha256_file(drafter / WEIGHTS)}
    if drafter_adapter is not None:
        inputs[str(drafter_adapter)] = checkpoint_fingerprint(drafter_adapter)
    if report is not None:
        inputs[str(report)] = sha256_file(report)
    record = provenance.record(provenance.command_line(), config, inputs) | {"training": history}
    with exclusive(out), atomic_directory(out, STAGE) as folder:
        notes = (*layouts.write(trained, folder, layout, ends), *_adapter_notes(drafter, adapter, drafter_adapter))
        subject = replace(subject, notes=notes)
        (folder / CARD).write_text(write_card(subject, measured, made_by, history), encoding="utf-8")
        provenance.write(folder, record)
    print(f"{out}: {subject.parameters:,} parameters in {layout} layout, read back bit for bit; see {out / CARD}")
    for note in subject.notes:
        print(f"note: {note}")


def _load(drafter: Path, adapter: Path | None, ends: TargetEnds | None, tokenizer: str) -> Drafter:
    """The drafter, with its adapter merged into it where one is given (our own layout only); attached where ends are given."""
    if (drafter / BOND).is_file():
        raise ValueError(f"{drafter} is an adapter; give its drafter, and this folder as --drafter-adapter")
    if adapter is None:
        return layouts.load_any(drafter, ends, tokenizer)
    trained = adapted(load_drafter(drafter), adapter)
    if ends is not None:
        trained.attach(ends)
        trained.check_tokenizer(tokenizer)
    return trained


def _adapter_notes(drafter: Path, adapter: str | None, drafter_adapter: Path | None) -> tuple[str, ...]:
    """What a user must know of adapters that went into this export."""
    notes = []
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

    Raises ValueError for a missing or broken report, and for one that holds no such row.
    """
    if not report.is_file():
        raise ValueError(f"{report}: no such report; make one with `draftsmith evaluate --drafters {report.parent}`")
    found = parse_json(report.read_bytes(), str(report), "run `draftsmith evaluate` again")
    listed = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise ValueError(
            f"{report}: not a report: it has no list of rows; give the report.json of `draftsmith evaluate`"
        )
    own = module_fingerprint(drafter)
    rows = [row for row in found["rows"] if row.get("drafter_fingerprint") == own]
    if not rows:
        names = ", ".join(sorted({str(row.get("drafter")) for row in found["rows"]}))
        raise ValueError(
            f"{report} holds no row of these weights (fingerprint {own[:12]}), only of {names}; this card "
            "takes no figures of other weights: evaluate this drafter first"
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


def _target_facts(target: str, revision: str | None, trust_remote_code: bool) -> Mapping[str, Any]:
    tokenizer = load_tokenizer(target, revision, trust_remote_code)
    ends = read_end_tokens(target, revision, tokenizer, trust_remote_code)
    return {"has_template": bool(tokenizer.chat_template), "eos_token_ids": ends}
