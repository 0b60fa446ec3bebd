"""Do drafter, cache, tokenizer and target belong together, and is the drafter used as it was trained?

Owns the checks `fingerprints`, `draft-length`, `temperature`, `score-scale` and `prompt-length`. Does not know tensors.
"""

from __future__ import annotations

from draftsmith.data.corpus_survey import IDS_AS_GENERATED
from draftsmith.evaluate.doctor.case import Case, NotChecked, names_target
from draftsmith.evaluate.doctor.report import Finding, Verdict
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.prompt_template import (
    NO_OPTIONS,
    NO_TEMPLATE,
    rendering_fingerprint,
    template_digest,
    template_in_use,
)

_LAYERS = (
    "a drafter cannot have learnt from layers that its cache has not: either this is another drafter's cache (name its own with --cache), "
    "or its config.json was altered (take it from the training's folder again)"
)
_OTHER_TARGET = "name the target that it was made for with --target; with another one everything must be made anew: replies, cache, drafter"
_OTHER = {
    "chat template": "prompts are rendered otherwise than in training: use the template of the cache (with --template, where it was "
    "made with that), or make replies and cache with the new one",
    "weights": "a target of fewer bits has other states and says other things: load it as the cache and the replies did "
    "(--quantization), or make both with the weights that you decode with",
}
_UNTOLD = (
    "the text was rendered by another chat template than the tokenizer's own, or by none: give doctor the same --template, and it is "
    "compared"
)
_WARMER = 0.3  # difference of temperatures from which the drafter meets another kind of text


def check_fingerprints(case: Case) -> Finding:
    """Target, tokenizer and chat template as drafter, cache and replies name them, and whether its weights were whole.

    Raises:
        NotChecked: nothing names the target or the tokenizer that it was made with.
    """
    here = {
        "target": case.ends.fingerprint,
        "tokenizer": tokenizer_fingerprint(case.tokenizer),
        "chat template": rendering_fingerprint(case.tokenizer, case.template, case.rendering),
        "weights": case.quantization or "whole",
    }
    named = _named(case, here["chat template"])
    differing = [(owner, what, there) for owner, what, there in named if there and there != here[what]]
    wrong = [
        f"the {owner} names the {what} {there[:12]}, {case.inputs.target} has {here[what][:12] or 'none'}"
        for owner, what, there in differing
    ]
    known = sum(bool(there) for _, _, there in named)
    figures = {"compared": known, "different": len(wrong)}
    expected = "all equal"
    misread = _misread(case)
    if misread:
        figures["layers"] = len(case.drafter.features)
        return Finding("fingerprints", "fault", misread, "layers as trained on", _LAYERS, figures, tuple(wrong))
    if not known:
        raise NotChecked("neither drafter, cache nor replies name the target or the tokenizer that they were made with")
    untold = ("cache", "chat template", "") in named and bool(case.open_cache.manifest.identity.template_fingerprint)
    details = (*wrong, _UNTOLD) if untold else tuple(wrong)
    added = "; chat template not compared" if untold else ""
    if not wrong:
        return Finding("fingerprints", "ok", f"{known} compared, all equal{added}", expected, "", figures, details)
    kinds = {what for _, what, _ in differing}
    grave = bool(kinds & {"target", "tokenizer"})
    remedy = _OTHER_TARGET if grave else "; ".join(text for what, text in _OTHER.items() if what in kinds)
    verdict: Verdict = "fault" if grave else "warning"
    return Finding(
        "fingerprints", verdict, f"{len(wrong)} of {known} differ{added}", expected, remedy, figures, details
    )


def _named(case: Case, template: str) -> list[tuple[str, str, str]]:
    """Owner, what it names, and its fingerprint of that, empty where it is not known. `template`: the one in use."""
    named: list[tuple[str, str, str]] = [("drafter", "tokenizer", case.drafter.config.tokenizer_fingerprint)]
    # Any target will do for a draft LM; and one whose folder names none was bound to this one when it was read.
    if not isinstance(case.drafter, LMDrafter) and names_target(case.inputs.folder):
        named.append(("drafter", "target", case.drafter.config.target_fingerprint))
    weights = [("replies", case.replies.get("quantization"))] if case.replies else []
    if case.cache is not None:
        identity = case.cache.manifest.identity
        named += [
            ("cache", "target", identity.target_fingerprint),
            ("cache", "tokenizer", identity.tokenizer_fingerprint),
            ("cache", "chat template", _template_of_text(case, template)),
        ]
        weights.append(("cache", identity.target_quantization))
    for what in ("target", "tokenizer"):
        named.append(("replies", what, str(case.replies.get(f"{what}_fingerprint", ""))))
    if case.quantization or any(kind for _, kind in weights):
        named += [(owner, "weights", str(kind or "whole")) for owner, kind in weights]
    return named


def _template_of_text(case: Case, template: str) -> str:
    """The chat template that the cache's text was rendered by; empty where that is unknown, or was --template's and none is given here.

    Replies kept as ids were rendered before extraction, whose options did not touch them, so their own record counts before the cache's.
    `template` is the fingerprint of the one in use.
    """
    identity = case.open_cache.manifest.identity
    rendered = case.replies.get("template") if identity.mask == IDS_AS_GENERATED else None
    if rendered is not None and rendered == template_in_use(case.tokenizer, case.template, case.rendering).digest:
        return template
    if case.template is not None or case.rendering != NO_OPTIONS:
        return str(rendered or identity.template_fingerprint)
    # A tokenizer's own template is hashed otherwise than one that was given.
    given = (template_digest(NO_TEMPLATE), rendered, *([] if rendered is None else [template]))
    return "" if identity.template_fingerprint in given else identity.template_fingerprint


def _misread(case: Case) -> str:
    """How the layers that the drafter reads differ from those that it was trained on, as far as those are known; else empty."""
    if isinstance(case.drafter, LMDrafter):
        return ""
    reads, record = list(case.drafter.features), case.inputs.record
    settings = record.get("drafter")
    recorded = settings.get("layers") if isinstance(settings, dict) else None
    if recorded and list(recorded) != reads:
        return f"the drafter reads {', '.join(reads)}; its training's record says {', '.join(recorded)}"
    layers = () if case.cache is None else case.cache.manifest.identity.layers
    foreign = [name for name in reads if name not in layers]
    if layers and foreign:
        return f"the drafter reads {', '.join(foreign)}; the cache has {', '.join(layers)} only"
    return ""


def check_draft_length(case: Case) -> Finding:
    """Drafted tokens a cycle against the steps that were trained.

    Raises:
        NotChecked: the drafter is an ordinary draft LM, or nobody says how many tokens are drafted.
    """
    if isinstance(case.drafter, LMDrafter):
        raise NotChecked("an ordinary draft LM drafts as long as one likes")
    trained = case.drafter.config.num_draft_steps
    if case.use.draft_length is None:
        raise NotChecked(f"trained for {trained}: say how many tokens you draft with --draft-length")
    figures = {"trained": trained, "drafted": case.use.draft_length}
    measured, expected = f"drafts {case.use.draft_length} tokens", f"at most {trained}, as trained"
    if case.use.draft_length <= trained:
        return Finding("draft-length", "ok", measured, expected, "", figures)
    remedy = (
        f"steps beyond {trained} were never trained: draft {trained} tokens (`draftsmith tune` finds the best shape), or train with "
        f"num_steps {case.use.draft_length}"
    )
    return Finding("draft-length", "warning", measured, expected, remedy, figures)


def check_temperature(case: Case) -> Finding:
    """Temperature of use against that of the replies.

    Raises:
        NotChecked: the temperature of use, or that of the replies, is not known.
    """
    if case.use.temperature is None:
        raise NotChecked("say how you decode with --temperature")
    if case.temperature is None:
        raise NotChecked("nobody wrote down how the replies were made")
    used, trained = case.use.temperature, case.temperature
    figures = {"used": used, "trained": trained}
    measured, expected = f"decodes at {used:g}, replies at {trained:g}", f"within {_WARMER}"
    if abs(used - trained) <= _WARMER + 1e-9:
        return Finding("temperature", "ok", measured, expected, "", figures)
    remedy = f"the drafter never saw such text: train on replies made at it (`draftsmith data respond --temperature {used:g}`)"
    return Finding("temperature", "warning", measured, expected, remedy, figures)


def check_score_scale(case: Case) -> Finding:
    """Whether the factor that ranks draft paths was ever fitted.

    Raises:
        NotChecked: the drafter is an ordinary draft LM, which has no such factor.
    """
    if isinstance(case.drafter, LMDrafter):
        raise NotChecked("an ordinary draft LM has none")
    scale = float(case.drafter.config.score_scale)
    measured, expected = f"{scale:g}", "fitted: not just 1"
    if scale != 1.0:
        return Finding("score-scale", "ok", measured, expected, "", {"score scale": scale})
    remedy = (
        "beams and dynamic trees rank paths by scores that nobody sharpened; validation fits the factor: train with a val_fraction above 0 "
        "and a cache that has last.pre_norm (chains do not mind)"
    )
    return Finding("score-scale", "warning", measured, expected, remedy, {"score scale": scale})


def check_prompt_length(case: Case) -> Finding:
    """Prompts longer than any text that was trained on.

    Raises:
        NotChecked: no prompts or no cache are known.
    """
    cache = case.open_cache
    if not case.prompts:
        raise NotChecked("no prompts are known: name those of the evaluation with --prompts")
    longest = int(cache.lengths.max())
    longer = [sample for sample in case.prompts if len(sample.prompt_ids) >= longest]
    share = len(longer) / len(case.prompts)
    figures = {"longest trained on": longest, "prompts as long": len(longer), "prompts": len(case.prompts)}
    measured = (
        f"{len(longer)} of {len(case.prompts)} prompts are as long as the longest training sample ({longest} tokens)"
    )
    expected = "none"
    if not longer:
        return Finding("prompt-length", "ok", measured, expected, "", figures)
    remedy = "the drafter never stood so far into a text: extract with a larger --max-length, from replies to prompts of that length"
    return Finding("prompt-length", "warning" if share <= 0.5 else "fault", measured, expected, remedy, figures)
