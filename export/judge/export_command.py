"""`draftsmith judge export`: a trained judge as a folder that others can load, with a card that says that it is lossy.

Owns the order of the work and which inputs are an error. Does not know the card's words or AutoJudge's numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.export.judge import autojudge as judge_autojudge
from draftsmith.export.judge.card import JudgeLayout, write_judge_card
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.models.files.checkpoint_files import WEIGHTS
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.judge import Judge, load_judge
from draftsmith.models.target.options import EndsOptions
from draftsmith.ownership import check_replaceable

CARD = "README.md"
STAGE = "draftsmith judge export"
THE_TARGET = EndsOptions()


def export_judge(
    judge: Path,
    out: Path,
    target: str | None = None,
    layout: JudgeLayout = "draftsmith",
    threshold: float | None = None,
    where: Annotated[EndsOptions, FLAT] = THE_TARGET,
) -> None:
    """Write a trained judge as safetensors with a model card, then read it back and compare. A judge makes decoding LOSSY.

    Args:
        judge: Folder of the trained judge.
        out: Folder to write; an earlier export there is replaced as a whole.
        target: Directory or hub id of the judge's target, or embedded:target; checked to be the one it was trained for.
        layout: draftsmith, or autojudge for the numbers that AutoJudge's fork of vLLM takes.
        threshold: Another threshold than the judge was trained with; 1 accepts nothing.
        where: Which target is meant; see `EndsOptions`. Name its adapter where the judge is for both together.

    Raises:
        ValueError: an adapter without its target, a judge of another target, or a folder that cannot be read or replaced.
    """
    check_replaceable(out, STAGE, [judge])
    loaded = load_judge(judge)
    if where.adapter is not None and target is None:
        raise ValueError(f"adapter {where.adapter!r} is on a target that is not named; give the target, too")
    if target is not None:
        loaded.attach(where.load_ends(target))
        loaded.check_tokenizer(tokenizer_fingerprint(where.tokenizer(target)))
    if threshold is not None:
        loaded = loaded.with_threshold(threshold)
    history = provenance.training(judge)
    settings = {"layout": layout, "threshold": loaded.config.threshold, "target_name": loaded.config.target_name}
    settings["target_fingerprint"] = loaded.config.target_fingerprint
    inputs = {str(judge / WEIGHTS): sha256_file(judge / WEIGHTS)}
    record = provenance.record(provenance.command_line(), settings, inputs) | {"training": history}
    with exclusive(out), atomic_directory(out, STAGE) as folder:
        if layout == "autojudge":
            judge_autojudge.write(loaded, folder)
        else:
            loaded.save_pretrained(folder)
            _refuse_difference(loaded, load_judge(folder), folder)
        (folder / CARD).write_text(write_judge_card(loaded.config, layout, history), encoding="utf-8")
        provenance.write(folder, record)
    print(f"{out}: judge in {layout} layout, threshold {loaded.config.threshold:.6g}, LOSSY; see {out / CARD}")


def _refuse_difference(written: Judge, reread: Judge, folder: Path) -> None:
    before, after = written.state_dict(), reread.state_dict()
    changed = [name for name in before if not torch.equal(before[name].cpu(), after[name])]
    if changed or written.config.threshold != reread.config.threshold:
        raise ValueError(
            f"{folder}: read back, {', '.join(changed) or 'the threshold'} differ from what was written; check the disk"
        )
