"""`draftsmith doctor`: why is my acceptance low?

Owns the command and the order of the checks, from what everything rests on to what is fine-tuning. Does not know how any check is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.arguments import FLAT, suggestion
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import Corpus
from draftsmith.data.progress import metered, progress
from draftsmith.data.prompts import PROMPT_FILE, PromptSelection
from draftsmith.evaluate.doctor.acceptance import check_acceptance
from draftsmith.evaluate.doctor.alignment import check_settings, check_shifts, check_steps
from draftsmith.evaluate.doctor.bonds import (
    check_draft_length,
    check_fingerprints,
    check_prompt_length,
    check_score_scale,
    check_temperature,
)
from draftsmith.evaluate.doctor.case import (
    UNKNOWN_USE,
    Case,
    CaseInputs,
    NotChecked,
    Use,
    draw,
    find,
    load_served,
    replies_of,
    with_states,
)
from draftsmith.evaluate.doctor.foreign_words import check_judge
from draftsmith.evaluate.doctor.labels import check_labels, check_loops, check_own_text, check_vocabulary, shown_samples
from draftsmith.evaluate.doctor.modes import check_mode
from draftsmith.evaluate.doctor.overfit import check_overfit
from draftsmith.evaluate.doctor.overlap import (
    check_duplicates,
    check_overlap,
    ngrams_of,
    read_text,
    token_stream,
    unread,
)
from draftsmith.evaluate.doctor.report import Finding, console, findings_json, findings_table, summary
from draftsmith.evaluate.doctor.serving import check_file, check_serving
from draftsmith.evaluate.doctor.states import check_projection, check_sound, check_states, project
from draftsmith.evaluate.lossy.contest import judged_by, read_questions
from draftsmith.evaluate.lossy.lossy import IsRight
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.samples import readable, selected_samples
from draftsmith.files import atomic_write
from draftsmith.label.checkers.checkers import load_checker
from draftsmith.models.files.device_and_dtype import AUTO, as_dtype
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.target.target import Target, TargetEnds
from draftsmith.ownership import check_output_file

Check = Callable[[Case], Finding]
READS_TEXT = ("overlap", "duplicates")
"""The checks that read every sample's tokens (not its states)."""
CHECKS: dict[str, Check] = {
    "fingerprints": check_fingerprints,
    "sound-states": check_sound,
    "states": check_states,
    "re-projection": check_projection,
    "labels": check_labels,
    "own-text": check_own_text,
    "loops": check_loops,
    "draft-vocabulary": check_vocabulary,
    "shifts": check_shifts,
    "steps": check_steps,
    "settings": check_settings,
    "drafter-file": check_file,
    "train-serve": check_serving,
    "acceptance": check_acceptance,
    "score-scale": check_score_scale,
    "draft-length": check_draft_length,
    "temperature": check_temperature,
    "prompt-length": check_prompt_length,
    "mode": check_mode,
}
"""The checks that need nothing but the case, in their order; `overfit`, READS_TEXT and, if asked for, `judge` follow."""
NAMES = (*CHECKS, "overfit", *READS_TEXT, "judge")


@dataclass(frozen=True)
class Bounds:
    """How much is looked at.

    Args:
        samples: How many samples of the cache are looked at; `overlap` and `duplicates` read the tokens of all.
        ngram: Tokens of the n-grams by which prompts are looked for in the training text.
        overfit_steps: Most steps of the trial training on one sample; 0 leaves it out.
        seed: Another seed draws other samples.

    Raises:
        ValueError: a count is too low.
    """

    samples: int = 64
    ngram: int = 13
    overfit_steps: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("ngram", 1), ("overfit_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


USUAL_BOUNDS = Bounds()


def doctor(
    drafter: str,
    target: str | None = None,
    cache: str | None = None,
    prompts: Path | None = None,
    split: str | None = None,
    out: Path | None = None,
    skip: list[str] | None = None,
    show: int = 2,
    source: Path | None = None,
    ends_only: bool = False,
    bounds: Annotated[Bounds, FLAT] = USUAL_BOUNDS,
    use: Annotated[Use, FLAT] = UNKNOWN_USE,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Tell why a drafter's acceptance may be low: states, labels, text, vocabulary, training, export.

    Target, cache and settings are those that the drafter's provenance names, unless you give others. With dtype auto, the target runs
    in what it ran in when the cache was made. Every finding names a remedy. Exits with 1 where it finds a fault.

    Args:
        drafter: Folder of a training run, of a drafter or an adapter as training or `draftsmith export` wrote it, or of a public head.
        target: Directory or hub id of the target; default: the one that the drafter names.
        cache: The hidden-state cache that it was trained from; default: the one that its provenance names.
        prompts: Prompts, as for `draftsmith evaluate`: acceptance is measured on them, and the training text is searched for them.
        split: Only this split of the prompts.
        out: Also write the report here, as JSON.
        skip: Checks to leave out, by their names in the table.
        show: How many samples are printed, with what is trained on marked.
        source: The text that was trained on, as `draftsmith data extract` takes it; read instead of the cache's tokens.
        ends_only: Load the target's embedding, norm and head alone: for a target too large for this machine. No fresh forward then.
        bounds: How much is looked at; see `Bounds`.
        use: How you use the drafter; see `Use`.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.

    Raises:
        ValueError: a check found a fault, or something cannot be loaded.
    """
    left_out = _skipped(skip or [])
    inputs = find(drafter, cache, target, where.revision, where.adapter)
    _check_out(out, (inputs.folder, inputs.target, inputs.cache, prompts, source))
    where = replace(where.placed(), revision=inputs.revision, adapter=inputs.adapter)
    tokenizer = where.tokenizer(inputs.target)
    asked = _prompts(prompts, split, inputs.target, tokenizer, rendering, where)
    corpus = _text(source, where.end_tokens(inputs.target, tokenizer), tokenizer, rendering)
    case = gather(inputs, tokenizer, bounds, ends_only, where)
    asked = readable(asked, case.ends.vocab_size)
    case = replace(case, prompts=tuple(asked), use=use, template=rendering.template, rendering=rendering.options)
    case = replace(case, is_right=_judge(use.judge, prompts, asked))
    if corpus is not None and case.cache is not None:
        corpus.split = case.cache.manifest.identity.split  # the other rows were never trained on
    findings = examine(case, bounds, left_out, corpus)
    _print(case, findings, show)
    _write(out, case, findings, {**vars(bounds), "skip": left_out, "ends_only": ends_only, "prompts": prompts})
    print(summary(findings))
    faults = [finding.name for finding in findings if finding.verdict == "fault"]
    if faults:
        raise ValueError(f"{len(faults)} of {len(findings)} checks found a fault: {', '.join(faults)}")


def _check_out(out: Path | None, read: Sequence[str | Path | None]) -> None:
    """Keep the report away from what the command reads."""
    if out is not None:
        check_output_file(out, [Path(each) for each in read if each is not None])


def _prompts(
    prompts: Path | None,
    split: str | None,
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    rendering: TemplateChoice,
    where: TargetOptions,
) -> list[Sample]:
    """The prompts to look for, none where no file is given. A split without prompts is an error."""
    if prompts is None:
        return []
    samples = selected_samples(prompts, target, tokenizer, PromptSelection(split=split), rendering, where)
    if not samples:
        raise ValueError(f"{prompts} has no prompt in split {split!r}; name another with --split, or leave it out")
    return samples


def _judge(checker: str | None, prompts: Path | None, samples: Sequence[Sample]) -> IsRight | None:
    """Tells whether a text answers a prompt, by its number; None without a checker or prompts."""
    if prompts is None or checker is None:
        return None
    loaded = load_checker(checker)
    file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    return judged_by(read_questions(file, samples, loaded), samples, loaded)


def _text(
    source: Path | None, ends: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, rendering: TemplateChoice
) -> Corpus | None:
    """The text to read instead of the cache's tokens. Its samples are whole: what training cut off can be a duplicate all the same."""
    if source is None:
        return None
    chat = partial(ChatTemplate, tokenizer, rendering.template, ends, rendering.options)
    corpus = Corpus(source, chat, None, sys.maxsize)
    corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
    return corpus


def _print(case: Case, findings: Sequence[Finding], show: int) -> None:
    """The findings as a table, and some samples."""
    screen, inputs = console(), case.inputs
    screen.print(
        f"drafter {inputs.folder}  target {inputs.target}  cache {inputs.cache or 'unknown'}\n",
        highlight=False,
        markup=False,
    )
    screen.print(findings_table(findings))
    screen.print()
    for view in shown_samples(case, show, marks=not screen.is_terminal):
        screen.print(view, soft_wrap=True)


def _write(out: Path | None, case: Case, findings: Sequence[Finding], settings: Mapping[str, Any]) -> None:
    """The report as JSON, where one is asked for."""
    if out is None:
        return
    inputs = case.inputs
    subject = {"drafter": inputs.folder, "origin": inputs.origin, "target": inputs.target, "cache": inputs.cache}
    named = {name: None if value is None else str(value) for name, value in subject.items()}
    made_by = provenance.record(provenance.command_line(), settings, {inputs.target: case.ends.fingerprint})
    atomic_write(out, findings_json(findings, named, made_by))


def gather(
    inputs: CaseInputs,
    tokenizer: PreTrainedTokenizerBase,
    bounds: Bounds,
    ends_only: bool,
    where: TargetOptions,
) -> Case:
    """Loads target, drafter and samples, each once.

    Args:
        inputs: where they are.
        tokenizer: the target's.
        bounds: how many samples.
        ends_only: whether the target's trunk stays unloaded.
        where: where the target runs; with dtype `auto` it runs in what it ran in when the cache was made.

    Raises:
        ValueError: something cannot be loaded, or the shapes of cache or drafter are not the target's.
    """
    # Shards are not hashed here, which would read all of a large cache; `data verify` does.
    opened = None if inputs.cache is None else HiddenStateCache(inputs.cache, check="off", finite=False)
    made_in = where.dtype if opened is None else opened.manifest.identity.target_dtype
    where = replace(where, dtype=made_in if where.dtype == AUTO else where.dtype).resolved(inputs.target)
    ends, whole = _target(inputs, ends_only, where)
    if opened is not None and opened.manifest.identity.hidden_size != ends.hidden_size:
        raise ValueError(
            f"{inputs.cache} holds states of {opened.manifest.identity.hidden_size} numbers, {inputs.target} has {ends.hidden_size}; name "
            "the cache of this target with --cache"
        )
    served = load_served(inputs.folder, ends, where.dtype, where.trust_remote_code)
    trained = served
    if inputs.origin is not None:
        trained = load_served(inputs.origin, ends, where.dtype, where.trust_remote_code)
    case = Case(inputs, served, trained, ends, whole, tokenizer, seed=bounds.seed, quantization=where.quantization)
    return case if opened is None else _with_samples(case, opened, bounds.samples)


def _target(inputs: CaseInputs, ends_only: bool, where: TargetOptions) -> tuple[TargetEnds, Target | None]:
    """The target's ends on one device, and the whole target unless its ends alone are wanted."""
    whole = None if ends_only else where.load(inputs.target)
    spread = where.device_map is not None and inputs.adapter is None
    if whole is not None and not spread:
        return whole.ends, whole
    # Embedding, norm and head of a spread target lie on several devices; the drafter's checks want them on one.
    return where.load_ends(inputs.target, as_dtype(where.dtype), where.device), whole


def _with_samples(case: Case, cache: HiddenStateCache, num_samples: int) -> Case:
    """The case with some samples of its cache, and the target's likeliest tokens for them."""
    chosen = draw(cache, num_samples, case.seed)
    for sample in chosen:
        check_ids(f"sample {sample.id} of {case.inputs.cache}", int(sample.input_ids.max()), case.ends.vocab_size)
    if case.target is not None:
        with progress("doctor: states", len(chosen), "samples", brief=True) as advance:
            fresh = []
            for sample in chosen:
                fresh.append(with_states(sample, case.trained.features, case.target))
                advance(1)
        chosen = tuple(fresh)
    replies = replies_of(cache)
    temperature = replies.get("settings", {}).get("temperature")
    with progress("doctor: project", len(chosen), "samples") as advance:
        projection = project(cache, chosen, case.ends, case.target, temperature, advance)
    return replace(case, cache=cache, samples=chosen, replies=replies, projection=projection)


def check_ids(place: str, largest: int, vocab_size: int) -> None:
    """Checks that the target has an embedding for every token.

    Raises:
        ValueError: it lacks one: the text is in another tokenizer's ids.
    """
    if largest >= vocab_size:
        raise ValueError(
            f"{place} has the token {largest}, the target knows {vocab_size}: it is in another tokenizer's ids; make it with this target"
        )


def examine(case: Case, bounds: Bounds, skip: Sequence[str] = (), corpus: Corpus | None = None) -> list[Finding]:
    """Every check once, in order; those that cannot be made say why. `corpus`: the text to read instead of the cache's tokens."""
    checks: dict[str, Check] = dict(CHECKS)
    if case.use.judge is not None:
        checks["judge"] = check_judge
    checks["overfit"] = partial(check_overfit, max_steps=bounds.overfit_steps)
    findings = []
    with metered("doctor", len(checks), "checks", brief=True) as meter:
        for name, check in checks.items():
            meter.say(name)
            findings.append(_made(name, check, case, skip))
            meter.advance(1)
    read = wanted = None
    reason = "" if corpus is not None else unread(case)
    if not reason and not set(READS_TEXT) <= set(skip):
        wanted = ngrams_of(case.prompts, bounds.ngram) if case.prompts and "overlap" not in skip else None
        with progress("doctor: read the text", None if case.cache is None else len(case.cache), "samples") as advance:
            try:
                read = read_text(token_stream(case.cache, corpus, advance), wanted)
            except ValueError as error:  # a damaged shard or line; the report keeps what was found before
                reason = str(error)
        if corpus is not None and read is not None and not read.num_samples:
            read, reason = (
                None,
                f"{corpus.source} has no row in split {corpus.split!r}, which the cache was made of: name its own text",
            )
    findings.append(_made("overlap", partial(check_overlap, read=read, wanted=wanted, reason=reason), case, skip))
    findings.append(_made("duplicates", partial(check_duplicates, read=read, reason=reason), case, skip))
    return findings


def _made(name: str, check: Check, case: Case, skip: Sequence[str]) -> Finding:
    if name in skip:
        return Finding(name, "not checked", "left out by --skip")
    try:
        return check(case)
    except NotChecked as reason:
        return Finding(name, "not checked", str(reason))
    except ValueError as error:  # it says what is wrong and what to do, and must not hide what the other checks found
        return Finding(name, "fault", "could not be measured", remedy=str(error))


def _skipped(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"skip names {name!r}, which is no check.{suggestion(name, NAMES)} They are: {', '.join(NAMES)}"
            )
    return tuple(names)
