"""The model card of a judge: that it is lossy, how it was labelled, what its thresholds do, how it is used.

Owns the text. Every figure comes from the judge's config or the training's record; where nothing was recorded, the card states that.
Does not know how to read or write weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from draftsmith.escapes import code, plain, yaml_text
from draftsmith.export.judge.autojudge import NUMBERS, TENSORS
from draftsmith.models.judge import NO_GATE, POST_NORM, CurvePoint, JudgeConfig

JudgeLayout = Literal["draftsmith", "autojudge"]
UNKNOWN_TARGET = "path/or/hub-id/of/the/target"
_LIMITS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_HEADER = "| threshold | correct tokens accepted | wrong tokens accepted |"
_TEXT = "Tom has 3 boxes with 4 pens each. Tom has 12 pens."


def write_judge_card(config: JudgeConfig, layout: JudgeLayout, training: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        config: the judge's.
        layout: of the folder that the card is for.
        training: the provenance record of the training run; empty where there is none.
    """
    name = Path(config.target_name).name or "its target"
    parts = [
        _front_matter(config),
        f"# A judge for {plain(name)}",
        _summary(config),
        "## Use",
        _use(config) if layout == "draftsmith" else _use_autojudge(config),
        "## Thresholds",
        _thresholds(config),
        *_answers(config),
        "## Labels",
        _labels(config.labels),
        "## Training",
        _training(config.labels, training),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: JudgeConfig) -> str:
    lines = ["---", "library_name: draftsmith", "tags: [speculative-decoding, judge-decoding, lossy]"]
    target = config.target_name
    if target.count("/") == 1 and not target.startswith((".", "/")) and not Path(target).exists():
        lines.append(f"base_model: {yaml_text(target)}")
    return "\n".join([*lines, "---"])


def _summary(config: JudgeConfig) -> str:
    reads = "after its final norm" if config.feature == POST_NORM else "before its final norm"
    if config.reads_opinion:
        reads += ", and six numbers of what that target thinks of the token"
    draft = f" and the last state of {code(config.draft_name or 'its draft model')}" if config.draft_hidden_size else ""
    return (
        "**This is LOSSY.** A judge lets tokens of a draft stand that the target itself would not have written. With it, speculative "
        "decoding accepts more tokens a step, and its output is no longer the target's own: some of what it lets pass is wrong. At "
        "threshold 1 it accepts nothing, and decoding is lossless again.\n\n"
        f"A linear head of {config.num_features + 1:,} numbers ([Judge Decoding](https://arxiv.org/abs/2501.19309)) over the last hidden "
        f"state of {code(config.target_name or UNKNOWN_TARGET)} at the drafted token, {reads}{draft}. It is bound to that target "
        f"(fingerprint {code(config.target_fingerprint[:12] or 'unknown')}) and works with no other."
    )


def _use(config: JudgeConfig) -> str:
    return f"Needs `python -m pip install draftsmith`. In this folder:\n\n```python\n{judge_example(config)}```"


def judge_example(config: JudgeConfig) -> str:
    """A program that judges the tokens of a text with the judge in the current folder."""
    target = config.target_name or UNKNOWN_TARGET
    opinion = ["from draftsmith.models.opinion import opinion_of_text"] if config.reads_opinion else []
    # A target has no opinion of the first token.
    first = "[:, 1:]" if config.reads_opinion else ""
    lines = [
        "from pathlib import Path",
        "",
        "import torch",
        "",
        "from draftsmith.models import Target, load_tokenizer",
        "from draftsmith.models.judge import load_judge",
        *opinion,
        "",
        f"target = Target.load({json.dumps(target)})",
        'judge = load_judge(Path(".")).attach(target.ends)',
        f"ids = torch.tensor([load_tokenizer({json.dumps(target)}).encode({json.dumps(_TEXT)})])",
        "with torch.no_grad():",
        "    states = target.prefix(ids).pre_norm",
        f'    features = {{"states": states{first}}}',
    ]
    if config.draft_hidden_size:
        draft = json.dumps(config.draft_name)
        lines.append(f'    features["draft_states"] = Target.load({draft}).prefix(ids).pre_norm{first}')
    if config.reads_opinion:
        lines.append("    positions = torch.arange(1, ids.shape[1])")
        lines.append('    features["opinion"] = opinion_of_text(target.ends, states[0], ids[0], positions)[None]')
    return "\n".join([*lines, "    print(judge.log_odds(**features).sigmoid(), judge.accepts(**features))"]) + "\n"


def _use_autojudge(config: JudgeConfig) -> str:
    return (
        f"`{TENSORS}` and `{NUMBERS}` are what `JudgeConfig` of [AutoJudge](https://arxiv.org/abs/2504.20039)'s fork of vLLM takes. "
        "AutoJudge counts the other way: it predicts that a token is important and rejects from the threshold on, so signs and "
        "threshold are turned round here. Its scripts read a pickle; these files are none, and go in without one. Not tried with the "
        "fork itself:\n\n```python\nimport json\n\nfrom safetensors.numpy import load_file\nfrom vllm.config import JudgeConfig\n\n"
        f'numbers = json.load(open("{NUMBERS}"))\n'
        f'judge_config = JudgeConfig(**load_file("{TENSORS}"), threshold=numbers["threshold"])\n```'
    )


def _thresholds(config: JudgeConfig) -> str:
    if not config.curve:
        return f"The threshold is {config.threshold:.6g}. What it does to held-out tokens was not recorded."
    rows = [_row(point) for point in _chosen(config.curve)]
    at = config.labels.get("at_threshold")
    setting = f"This judge is set to {config.threshold:.6g}"
    if isinstance(at, Mapping) and at.get("threshold") == config.threshold:
        rows.append("| " + " | ".join(f"**{cell}**" for cell in _cells(CurvePoint(**at))) + " |")  # type: ignore[typeddict-item]
        setting = f"The last row is the threshold that this judge is set to{_rule(config.labels)}"
    table = "\n".join([_HEADER, "|---|---|---|", *rows])
    return (
        f"Over held-out questions, with 95 % intervals by bootstrap over questions. {setting}.\n\n{table}\n\n"
        f"{_differing(config)}These are shares of labelled tokens. What a threshold does to answers has to be measured on answers."
    )


def _differing(config: JudgeConfig) -> str:
    """The same over the tokens that a judge is asked about; empty where nobody measured it."""
    differing = config.labels.get("differing")
    if not config.differing_curve or not isinstance(differing, Mapping):
        return ""
    rows = [_row(point) for point in _chosen(config.differing_curve)]
    table = "\n".join([_HEADER, "|---|---|---|", *rows])
    return (
        "Tokens that the target itself would have chosen stand without a judge. Over the other held-out tokens "
        f"({plain(differing['correct'])} correct, {plain(differing['wrong'])} wrong) the area under the ROC curve is "
        f"{differing['auc']:.4f}, and the thresholds accept:\n\n{table}\n\n"
    )


def _answers(config: JudgeConfig) -> list[str]:
    """What the threshold was chosen by, where answers decided; nothing where they did not, or another threshold is set now."""
    tuned = config.labels.get("tuned")
    if not isinstance(tuned, Mapping) or tuned.get("threshold") != config.threshold:
        return []
    judged = f"judged by {code(tuned['checker'])}" if tuned["checker"] else "compared with the target's own"
    most = f"{100 * tuned['most_lost']:g}"
    parts = [f"Threshold and gate were chosen by answers to {plain(tuned['problems'])} problems, {judged}."]
    if not tuned["checker"]:
        parts.append("**Quality is unmeasured:** no checker said which answers are right.")
    if not tuned["holds"]:
        parts.append(
            f"**No setting was kept**, so the threshold is 1 and this judge accepts nothing: {plain(tuned['why'])}. The limit is a loss of "
            f"{most} points."
        )
    else:
        gate = (
            ""
            if tuned["gate"] == NO_GATE
            else f" with the gate {code(tuned['gate'])}{' and a veto' if tuned['veto'] else ''}"
        )
        parts.append(
            f"With drafts of {code(tuned['shape'])}{gate}, right answers change by {100 * tuned['change']:+.1f} points against lossless "
            f"decoding (lower 95 % bound {100 * tuned['change_low']:+.1f}; the limit was -{most}). {tuned['accepted_per_cycle']:.2f} draft "
            f"tokens are accepted a cycle, {tuned['lossless_per_cycle']:.2f} without the judge. The best of {plain(tuned['settings'])} "
            "settings looks a little better than it is."
        )
    for drafter in config.drafters:
        parts.append(f"The drafts were those of {code(drafter['name'])}; others may fool this judge.")
    return ["## Answers", " ".join(parts)]


def _rule(labels: Mapping[str, Any]) -> str:
    """By what the threshold was chosen."""
    if not isinstance(labels.get("max_wrong"), float):
        return ""
    upper = " at the upper end of the interval" if labels.get("hold_upper") else ""
    which = " that the target would not have chosen" if labels.get("threshold_over") == "differing" else ""
    return f", chosen to accept at most {100 * labels['max_wrong']:g}% of the wrong tokens{which}{upper}"


def _chosen(curve: list[CurvePoint]) -> list[CurvePoint]:
    """The point that accepts most within each limit on wrong tokens, each once, from strict to loose."""
    per_limit = [next((point for point in curve if point["wrong"] <= limit), None) for limit in _LIMITS]
    unique = {point["threshold"]: point for point in per_limit if point is not None}
    return [unique[threshold] for threshold in sorted(unique, reverse=True)]


def _row(point: CurvePoint) -> str:
    return "| " + " | ".join(_cells(point)) + " |"


def _cells(point: CurvePoint) -> tuple[str, str, str]:
    correct = f"{point['correct']:.1%} ({point['correct_low']:.1%} to {point['correct_high']:.1%})"
    wrong = f"{point['wrong']:.1%} ({point['wrong_low']:.1%} to {point['wrong_high']:.1%})"
    return f"{point['threshold']:.6g}", correct, wrong


def _labels(labels: Mapping[str, Any]) -> str:
    if not labels.get("questions"):
        return "Not recorded."
    lines = ["| | questions | correct tokens | wrong tokens |", "|---|---|---|---|"]
    for split, count in labels["questions"].items():
        correct, wrong = (labels.get(kind, {}).get(split, "not recorded") for kind in ("correct", "wrong"))
        lines.append(f"| {plain(split)} | {plain(count)} | {plain(correct)} | {plain(wrong)} |")
    statements = [
        f"{what}: {_listed(labels[key])}"
        for key, what in (("how", "labelled by"), ("source", "from"))
        if labels.get(key)
    ]
    return "\n".join(lines) + (f"\n\nAnswers {'; '.join(statements)}." if statements else "")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{plain(name)} ({plain(count)})" for name, count in counts.items())


def _training(labels: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    if not training:
        return "Not recorded."
    metrics = training.get("config", {}).get("metrics", {})
    area = (
        f" Area under the ROC curve over held-out questions: {metrics['val/auc']:.4f}." if "val/auc" in metrics else ""
    )
    penalty = f" L2 penalty {labels['l2']:g}, class weight {labels.get('class_weight')}." if "l2" in labels else ""
    return f"{code(training.get('command', 'command not recorded'))}, {plain(training.get('time', 'time not recorded'))}.{penalty}{area}"
