"""Is the drafter used in the modes that it was trained in: thinking or not, with tools, on long texts?

Owns the check `mode`. Does not know how modes are found in text.
"""

from __future__ import annotations

from collections.abc import Mapping

from draftsmith.data.chats.modes import LONG, MODES, NOT_THINKING, THINKING, TOOLS
from draftsmith.data.chats.reply_marks import marks_of
from draftsmith.data.corpus_survey import IDS_AS_GENERATED
from draftsmith.evaluate.doctor.case import Case, NotChecked
from draftsmith.evaluate.doctor.report import Finding, Verdict

_SELDOM = 0.05
_REMEDIES = {
    THINKING: "let the target reply while it thinks (`draftsmith data respond --template_args`, such as enable_thinking=true)",
    NOT_THINKING: "let the target reply without thinking (`draftsmith data respond --template_args`, such as enable_thinking=false)",
    TOOLS: "add prompts with `tools` to those that you give to `draftsmith data respond`",
    LONG: "add prompts of that length, and extract with a larger --max-length",
}


def check_mode(case: Case) -> Finding:
    """The modes of the prompts against those of the text that was trained on.

    Raises:
        NotChecked: no prompts or no cache are known, or the cache does not tell modes.
    """
    manifest = case.open_cache.manifest
    if not case.prompts:
        raise NotChecked("no prompts are known: name those of the evaluation with --prompts")
    if not manifest.modes:
        raise NotChecked("this cache does not tell the modes of its samples: extract it again")
    asked = {mode: sum(mode in sample.modes for sample in case.prompts) / len(case.prompts) for mode in MODES}
    trained = {mode: manifest.modes.get(mode, 0) / max(1, manifest.num_labelled) for mode in MODES}
    if manifest.identity.mask == IDS_AS_GENERATED:
        # The target's own replies are what it says in a mode, with a thought or without one.
        trained[THINKING] = max(trained[THINKING], _share_asked_to_think(case))
    foreign = [mode for mode in MODES if asked[mode] > 0 and trained[mode] < _SELDOM]
    measured = f"prompts: {_shares(asked)}; trained on: {_shares(trained)}"
    expected = f"each mode of the prompts in {_SELDOM:.0%} or more of the text"
    figures = {f"{mode} prompts": share for mode, share in asked.items()}
    figures |= {f"{mode} trained on": share for mode, share in trained.items()}
    if not foreign:
        return Finding("mode", "ok", measured, expected, "", figures)
    remedy = "; ".join(_REMEDIES[mode] for mode in foreign)
    remedy = f"a drafter gains little in a mode that it never saw: {remedy}; then train on these replies as well"
    verdict: Verdict = "fault" if max(asked[mode] for mode in foreign) > 0.5 else "warning"
    return Finding("mode", verdict, measured, expected, remedy, figures)


def _share_asked_to_think(case: Case) -> float:
    """The share of the samples whose first reply follows a prompt that leaves room for a thought."""
    marks = marks_of(case.tokenizer, case.template, case.rendering)
    starts = [sample.input_ids[: int(sample.loss_mask.bool().int().argmax())].tolist() for sample in case.samples]
    return sum(map(marks.asks_for_thought, starts)) / max(1, len(starts))


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{mode} {share:.0%}" for mode, share in shares.items() if share) or "none"
