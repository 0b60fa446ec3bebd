"""`draftsmith doctor`: why is my acceptance low?

Owns the command and the order of the checks, from what everything rests on to what is fine-tuning. Does not know how any check is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.arguments import FLAT, suggestion
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.corpus import Corpus
from draftsmith.data.progress import progress
from draftsmith.data.tokens import ChatTemplate
from draftsmith.evaluate.doctor.acceptance import check_acceptance
from draftsmith.evaluate.doctor.alignment import check_shifts, check_steps
from draftsmith.evaluate.doctor.bonds import (
    check_draft_length,
    check_fingerprints,
    check_prompt_length,
    check_score_scale,
    check_temperature,
)
from draftsmith.evaluate.doctor.case import (
    Case,
    NotChecked,
    Places,
    Use,
    draw,
    find,
    load_served,
    replies_of,
    with_states,
)
from draftsmith.evaluate.doctor.labels import check_labels, check_loops, check_own_text, check_vocabulary, shown_samples
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
from draftsmith.evaluate.samples import read_samples
from draftsmith.files import atomic_write
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import as_dtype, load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions

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
    "drafter-file": check_file,
    "train-serve": check_serving,
    "acceptance": check_acceptance,
    "score-scale": check_score_scale,
    "draft-length": check_draft_length,
    "temperature": check_temperature,
    "prompt-length": check_prompt_length,
}
"""The checks that need nothing but the case, in their order; `overfit` and READS_TEXT follow."""
NAMES = (*CHECKS, "overfit", *READS_TEXT)


@dataclass(frozen=True)
class Bounds:
    """How much is looked at: samples drawn from the cache, n of the n-grams, steps of the trial training, the seed of all draws."""

    samples: int = 64
    ngram: int = 13
    overfit_steps: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("ngram", 1), ("overfit_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def doctor(
    drafter: str,
    target: str | None = None,
    cache: str | None = None,
    prompts: Path | None = None,
    split: str | None = None,
    template: str | None = None,
    out: Path | None = None,
    skip: list[str] | None = None,
    samples: int = 64,
    show: int = 2,
    source: Path | None = None,
    draft_length: int | None = None,
    temperature: float | None = None,
    ngram: int = 13,
    overfit_steps: int = 80,
    ends_only: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
) -> None:
    """Tell why a drafter's acceptance may be low: states, labels, text, vocabulary, training, export.

    Target, cache and settings are those that the drafter's provenance names; options go before it. Every finding says what to do. Exits
    with 1 where something is at fault.

    Args:
        drafter: Folder of a training run, or of a drafter as training or `draftsmith export` wrote it.
        target: Directory or hub id of the target; default: the one that the drafter names.
        cache: The hidden-state cache that it was trained from; default: the one that its provenance names.
        prompts: Prompts that acceptance is measured on, to be looked for in the training text: as for `draftsmith evaluate`.
        split: Only this split of the prompts.
        template: Chat template file where the tokenizer has none, or "none".
        out: Also write the report here, as JSON.
        skip: Checks to leave out, by name.
        samples: How many samples of the cache are looked at; `overlap` and `duplicates` read the tokens of all.
        show: How many of them are printed, with what is trained on marked.
        source: The text that was trained on, as `draftsmith data extract` takes it; read instead of the cache's tokens.
        draft_length: Tokens that you draft in a cycle, to be compared with what was trained.
        temperature: What you decode at, to be compared with the replies'.
        ngram: Tokens of the n-grams by which prompts are looked for.
        overfit_steps: Most steps of the trial training on one sample; 0 leaves it out.
        ends_only: Load the target's embedding, norm and head alone: for a target too large for this machine. No fresh forward then.
        dtype: What the target runs in; default: what it ran in when the cache was made, else float32.
        seed: Another seed draws other samples.
        where: The target's devices, revision, adapter and quantization; see `TargetOptions`.
        rendering: The chat template's name and variables; see `TemplateOptions`.
    """
    left_out = _skipped(skip or [])
    bounds = Bounds(samples, ngram, overfit_steps, seed)
    places = find(drafter, cache, target, where.revision, where.adapter)
    tokenizer = load_tokenizer(places.target, places.revision, where.trust_remote_code)
    ends = read_end_tokens(places.target, places.revision, tokenizer, where.trust_remote_code)
    asked = [] if prompts is None else read_samples(prompts, tokenizer, template, split, None, ends, rendering)
    if prompts is not None and not asked:
        raise ValueError(f"{prompts} has no prompt in split {split!r}; name another with --split, or leave it out")
    # Whole samples: what was cut off in training is no reason to look at less of the text.
    corpus = None
    if source is not None:
        corpus = Corpus(source, lambda: ChatTemplate(tokenizer, template, ends, rendering), None, sys.maxsize)
    if corpus is not None:
        corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
    case = gather(places, tokenizer, bounds, ends_only, dtype, where)
    for sample in asked:
        check_ids(f"the prompt {sample.id} of {prompts}", max(sample.prompt_ids, default=0), case.ends.vocab_size)
    case = replace(
        case, prompts=tuple(asked), use=Use(draft_length, temperature), template=template, rendering=rendering
    )
    if corpus is not None and case.cache is not None:
        corpus.split = case.cache.manifest.identity.split  # the other rows were never trained on
    findings = examine(case, bounds, left_out, corpus)
    screen = console()
    screen.print(
        f"drafter {places.folder}  target {places.target}  cache {places.cache or 'unknown'}\n",
        highlight=False,
        markup=False,
    )
    screen.print(findings_table(findings))
    screen.print()
    for view in shown_samples(case, show, marks=not screen.is_terminal):
        screen.print(view, soft_wrap=True)
    if out is not None:
        subject = {"drafter": places.folder, "origin": places.origin, "target": places.target, "cache": places.cache}
        named = {name: None if value is None else str(value) for name, value in subject.items()}
        settings = {**vars(bounds), "skip": left_out, "ends_only": ends_only, "prompts": prompts}
        made_by = provenance.record(provenance.command_line(), settings, {places.target: case.ends.fingerprint})
        atomic_write(out, findings_json(findings, named, made_by))
    print(summary(findings))
    faults = [one for one in findings if one.verdict == "fault"]
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(findings)} checks found a fault: {', '.join(one.name for one in faults)}"
        )


def gather(
    places: Places,
    tokenizer: PreTrainedTokenizerBase,
    bounds: Bounds,
    ends_only: bool,
    dtype: str | None,
    where: TargetOptions,
) -> Case:
    """Loads target, drafter and samples, each once.

    Raises ValueError for what cannot be loaded, and for a cache or drafter whose shapes are not the target's.
    """
    # Shards are not hashed here, which would read all of a large cache; `data verify` does.
    opened = None if places.cache is None else HiddenStateCache(places.cache, check="off", finite=False)
    width = dtype or (opened.manifest.identity.target_dtype if opened is not None else "float32")
    whole = None
    options = replace(where, revision=places.revision, adapter=places.adapter)
    if ends_only:
        ends = options.load_ends(places.target, as_dtype(width), where.device)
    else:
        whole = options.load(places.target, width)
        ends = whole.ends
        if where.device_map is not None and places.adapter is None:
            # Embedding, norm and head of a spread target lie on several devices; the drafter's checks want them on one.
            ends = options.load_ends(places.target, as_dtype(width), where.device)
    if opened is not None and opened.manifest.identity.hidden_size != ends.hidden_size:
        raise ValueError(
            f"{places.cache} holds states of {opened.manifest.identity.hidden_size} numbers, {places.target} has {ends.hidden_size}; name "
            "the cache of this target with --cache"
        )
    served = load_served(places.folder, ends, width, where.trust_remote_code)
    trained = served if places.origin is None else load_served(places.origin, ends, width, where.trust_remote_code)
    if opened is None:
        return Case(places, served, trained, ends, whole, tokenizer, seed=bounds.seed, quantization=where.quantization)
    chosen = draw(opened, bounds.samples, bounds.seed)
    for sample in chosen:
        check_ids(f"sample {sample.id} of {places.cache}", int(sample.input_ids.max()), ends.vocab_size)
    if whole is not None:
        chosen = tuple(with_states(sample, trained.features, whole) for sample in chosen)
    replies = replies_of(opened)
    warmth = replies.get("settings", {}).get("temperature")
    with progress("doctor: project", len(chosen), "samples") as advance:
        projection = project(opened, chosen, ends, whole, warmth, advance)
    return Case(
        places,
        served,
        trained,
        ends,
        whole,
        tokenizer,
        opened,
        chosen,
        replies,
        projection=projection,
        seed=bounds.seed,
        quantization=where.quantization,
    )


def check_ids(place: str, largest: int, vocab_size: int) -> None:
    """Raises ValueError for a token that the target has no embedding for: the text is in another tokenizer's ids."""
    if largest >= vocab_size:
        raise ValueError(
            f"{place} has the token {largest}, the target knows {vocab_size}: it is in another tokenizer's ids; make it with this target"
        )


def examine(case: Case, bounds: Bounds, skip: Sequence[str] = (), corpus: Corpus | None = None) -> list[Finding]:
    """Every check once, in order; those that cannot be made say why. `corpus`: the text to read instead of the cache's tokens."""
    checks: dict[str, Check] = dict(CHECKS)
    checks["overfit"] = partial(check_overfit, max_steps=bounds.overfit_steps)
    findings = [_made(name, check, case, skip) for name, check in checks.items()]
    read = wanted = None
    reason = "" if corpus is not None else unread(case)
    if not reason and not set(READS_TEXT) <= set(skip):
        wanted = ngrams_of(case.prompts, bounds.ngram) if case.prompts and "overlap" not in skip else None
        with progress("doctor: read the text", 0 if case.cache is None else len(case.cache), "samples") as advance:
            try:
                read = read_text(token_stream(case.cache, corpus, advance), wanted)
            except ValueError as error:  # a damaged shard or line; what was found before stays told
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
