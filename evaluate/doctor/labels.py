"""What is trained on: how much of the text, which part of it, and whether the draft vocabulary has its tokens.

Owns the checks `labels`, `draft-vocabulary`, `own-text` and `loops`, and the view of masked samples. Does not know drafters' weights.

Shape legend: T tokens, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.text import Text
from torch import Tensor

from draftsmith.data.cache.show import render
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.corpus_survey import IDS_AS_GENERATED
from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.doctor.case import MAX_TOKENS, Case, NotChecked
from draftsmith.evaluate.doctor.report import Finding
from draftsmith.evaluate.strata.acceptance import is_looping
from draftsmith.models.drafters.drafter import Drafter

_FEW, _SPARSE, _ALMOST_ALL = (
    0.01,
    0.10,
    0.95,
)  # labelled share: below the first a fault, below the second or above the third a warning
_COVERED, _THIN = 0.98, 0.90  # labelled tokens in the draft vocabulary
_CLEARER = 0.1  # by which another reading of the map must cover more to be named
_FOREIGN, _MIXED = 0.15, 0.05  # by which agreement with the target may fall short of what its own text would have
_TURNED = 0.10  # share of samples whose labels may lie on the wrong side before it counts
_OWN = 0.6  # share of the target's likeliest from which a text seems to be its own
_TORN = 0.5  # share of labelled stretches that may be of one or two tokens
_COUNTABLE = 20  # tokens from which a share of them means something
_LOOPS = 0.10  # share of replies that may end in a loop
_SHOWN_TOKENS = 160


def check_labels(case: Case) -> Finding:
    """The labelled share, whether it is the replies that are labelled, and whether their ends are."""
    manifest = case.open_cache.manifest
    share = manifest.num_labelled / max(1, manifest.num_tokens)
    masks = torch.cat([sample.loss_mask for sample in case.samples])
    ids = torch.cat([sample.input_ids for sample in case.samples])
    ends = torch.isin(ids, torch.tensor(case.eos_ids, dtype=ids.dtype)) & masks
    first = sum(bool(sample.loss_mask[:1].any()) for sample in case.samples)
    torn = _torn(case.samples)
    figures = {
        "labelled": share,
        "labelled end tokens": int(ends.sum()),
        "samples labelled from token 0": first,
        "torn": torn,
        "samples with labels on the wrong side": len(_turned(case)),
    }
    inside, outside = _agreement(case)
    if inside is not None and outside is not None:
        figures |= {"target's own, labelled": inside, "target's own, not labelled": outside}
    measured = (
        f"{share:.1%} of {manifest.num_tokens:,} tokens; {int(ends.sum())} end tokens among {len(case.samples)} samples"
    )
    expected = f"{_SPARSE:.0%} to {_ALMOST_ALL:.0%}, replies only, their ends too"
    faults, warnings, endless = _label_problems(case, figures)
    details = (*faults, *warnings, *endless)
    remedy = (
        "see the samples below (or `draftsmith data show`): the mask comes from the chat template (a {% generation %} block tells it "
        "exactly) or from replies kept as token ids (`data respond`); mend it, extract and train again"
    )
    if faults:
        return Finding("labels", "fault", measured, expected, remedy, figures, details)
    if warnings:
        return Finding("labels", "warning", measured, expected, remedy, figures, details)
    if endless:
        remedy = (
            "if replies were cut off, make longer ones (`data respond --max-new-tokens`, `data extract --max-length`): from these the "
            "drafter does not learn to stop"
        )
        return Finding("labels", "warning", measured, expected, remedy, figures, details)
    return Finding("labels", "ok", measured, expected, "", figures)


def _label_problems(case: Case, figures: dict[str, float]) -> tuple[list[str], list[str], list[str]]:
    """Faults, warnings, and what is no slip of the mask but of replies without an end."""
    recipe = case.open_cache.manifest.identity.mask
    share, first = figures["labelled"], figures["samples labelled from token 0"]
    faults, warnings, endless = [], [], list[str]()
    if share < _FEW:
        faults.append(f"only {share:.2%} of the tokens are trained on")
    elif share < _SPARSE:
        warnings.append(f"only {share:.1%} of the tokens are trained on: most of the cache is read for nothing")
    if share > _ALMOST_ALL and recipe != "plain text":
        warnings.append(f"{share:.1%} of the tokens are trained on: prompts seem to be labelled")
    if first:
        warnings.append(
            f"{int(first)} of {len(case.samples)} samples are labelled from their very first token, which nothing predicts"
        )
    inside, outside = figures.get("target's own, labelled"), figures.get("target's own, not labelled")
    if inside is not None and outside is not None and _wrong_side(inside, outside):
        faults.append(
            f"the labels lie on the prompts: of the labelled tokens {inside:.0%} are what the target would say, of the others {outside:.0%}"
        )
    elif figures["samples with labels on the wrong side"] >= _TURNED * len(case.samples):
        turned = _turned(case)
        # Sampled replies may well be less likely than a prompt that repeats itself.
        (faults if case.temperature == 0.0 else warnings).append(
            f"the labels lie on the prompts in {len(turned)} of {len(case.samples)} samples, such as {', '.join(turned[:3])}"
        )
    if figures["torn"] > _TORN:
        faults.append(
            f"the mask is torn: {figures['torn']:.0%} of its unbroken stretches are of one or two tokens, replies are longer"
        )
    # What was cut off for this look may well end.
    whole = [sample for sample in case.samples if len(sample.input_ids) < MAX_TOKENS]
    if figures["labelled end tokens"] == 0 and case.eos_ids and whole and recipe != "plain text":
        ended = any(bool(torch.isin(sample.input_ids[-2:], torch.tensor(case.eos_ids)).any()) for sample in whole)
        if ended:
            warnings.append("no end token is labelled: drafts run on past the end of replies")
        else:
            endless.append("no end token is labelled, since no sample ends with one")
    return faults, warnings, endless


def _wrong_side(inside: float | None, outside: float | None) -> bool:
    """Whether what is not trained on is the target's own text, and what is trained on is not."""
    return inside is not None and outside is not None and outside > inside + 0.2 and outside > _OWN


def _misplaced(case: Case) -> bool:
    """Whether the labels miss the replies, so that nothing that is measured at labelled tokens is about replies."""
    turned = len(_turned(case)) >= _TURNED * len(case.samples)
    return _wrong_side(*_agreement(case)) or (turned and case.temperature == 0.0) or _torn(case.samples) > _TORN


def _turned(case: Case) -> list[str]:
    """Ids of the samples whose labels lie on the wrong side."""
    ids = []
    for sample, (equal, labelled) in zip(case.samples, _equals(case), strict=False):
        foreign = float(equal[labelled].float().mean()) < _OWN  # False where nothing is labelled
        # Many of the target's own words in a row are no chance, whatever prompt lies before them.
        in_a_row = max(_runs(equal & ~labelled), default=0) >= _COUNTABLE
        if foreign and (in_a_row or _wrong_side(*_shares(_count(equal, labelled)))):
            ids.append(sample.id)
    return ids


def _torn(samples: Sequence[CachedSample]) -> float:
    """The share of unbroken labelled stretches that have one token or two. Example: masks `0110111` and `1` -> 2 of 3."""
    runs = [length for sample in samples for length in _runs(sample.loss_mask)]
    return sum(length <= 2 for length in runs) / len(runs) if len(runs) >= len(samples) else 0.0


def _runs(mask: Tensor) -> list[int]:
    """Lengths of the unbroken stretches of True, in order. Example: `0110111` -> [2, 3]."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1))
    edges = torch.nonzero(padded.diff()).flatten()
    return (edges[1::2] - edges[::2]).tolist()


def _agreement(case: Case) -> tuple[float | None, float | None]:
    """Shares of tokens that are the target's argmax, among the labelled ones and among the others; None where there are too few."""
    counts = [_count(equal, labelled) for equal, labelled in _equals(case)]
    return _shares(torch.stack(counts).sum(0)) if counts else (None, None)


def _equals(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Of each sample bool [T - 1], for every token but the first: whether it is the target's argmax, and whether it is labelled."""
    chosen = case.projection and (case.projection.fresh or case.projection.cached)
    if not chosen:
        return []
    return [
        (tokens[:-1] == sample.input_ids[1:], sample.loss_mask[1:].bool())
        for sample, tokens in zip(case.samples, chosen, strict=True)
    ]


def _count(equal: Tensor, labelled: Tensor) -> Tensor:
    """float32 [2, 2]: among the labelled tokens and among the others, those that are the target's argmax, and all."""
    return torch.tensor([[float(part.sum()), float(len(part))] for part in (equal[labelled], equal[~labelled])])


def _shares(counts: Tensor) -> tuple[float | None, float | None]:
    own, other = (float(hits / all_) if all_ >= _COUNTABLE else None for hits, all_ in counts)
    return own, other


def check_vocabulary(case: Case) -> Finding:
    """The share of labelled tokens that the drafter can propose at all: its accuracy can be no better.

    Raises:
        NotChecked: no token is labelled.
    """
    drafter = case.drafter
    labelled = torch.cat([sample.input_ids[sample.loss_mask.bool()] for sample in _sampled(case)])
    if not len(labelled):
        raise NotChecked("no token is labelled: see `labels`")
    known = torch.zeros(max(drafter.config.vocab_size, case.ends.vocab_size), dtype=torch.bool)
    known[drafter.draft_ids().cpu()] = True
    inside = known[labelled]
    covered = float(inside.float().mean())
    size = int(known.sum())
    figures = {"draft vocabulary": size, "covered": covered}
    measured = f"{covered:.2%} of {len(labelled):,} labelled tokens are among {size:,}"
    expected = f"{_COVERED:.0%} or more"
    # Of several end tokens one will do, unless the text uses another.
    ends = [token for token in case.eos_ids if token < len(known)]
    used = [token for token in ends if bool((labelled == token).any())]
    missed_ends = [token for token in used or ends if not known[token]]
    if not used and len(missed_ends) < len(ends):
        missed_ends = []
    details = _missed(case, labelled[~inside])
    if missed_ends:
        details = (
            f"the end token {missed_ends[0]} is not in the draft vocabulary: no draft ever ends a reply",
            *details,
        )
    if (as_ids := _covered_as_ids(drafter, labelled, known)) > covered + _CLEARER:
        figures["covered as ids"] = as_ids
        remedy = (
            f"d2t seems to hold token ids, which cover {as_ids:.1%}, and not offsets from each token's own number: store d2t[i] - i there, "
            "or export the drafter again"
        )
        return Finding("draft-vocabulary", "fault", measured, expected, remedy, figures, details)
    remedy = (
        f"no draft step can be right more often than {covered:.1%}: train with a larger draft_vocab_size (null for all), chosen on text "
        "like that of use"
    )
    if covered < _THIN:
        return Finding("draft-vocabulary", "fault", measured, expected, remedy, figures, details)
    if covered < _COVERED or missed_ends:
        return Finding("draft-vocabulary", "warning", measured, expected, remedy, figures, details)
    return Finding("draft-vocabulary", "ok", measured, expected, "", figures)


def _covered_as_ids(drafter: Drafter, labelled: Tensor, known: Tensor) -> float:
    """The share of labelled tokens that would be in the draft vocabulary if its map held ids instead of offsets; 0 where it cannot."""
    if drafter.d2t is None:
        return 0.0
    ids = drafter.d2t.cpu()
    if bool((ids < 0).any()) or bool((ids >= len(known)).any()) or bool((ids.diff() <= 0).any()):
        return 0.0
    return float(torch.isin(labelled, ids).float().mean())


def _sampled(case: Case) -> Sequence[CachedSample]:
    _ = case.open_cache
    return case.samples


def _missed(case: Case, tokens: Tensor) -> tuple[str, ...]:
    if not len(tokens):
        return ()
    ids, counts = tokens.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:5]
    words = ", ".join(f"{str(case.tokenizer.decode([int(ids[i])]))!r} ({int(counts[i])} times)" for i in order)
    return (f"most missed: {words}",)


def check_own_text(case: Case) -> Finding:
    """Is the text the target's own? By the replies' record, and by how often its tokens are what the target likes best.

    Raises:
        NotChecked: the labels miss the replies, or are too few to measure by.
    """
    identity = case.open_cache.manifest.identity
    if _misplaced(case):
        raise NotChecked("what is labelled are not the replies: see `labels` first")
    inside, _ = _agreement(case)
    source = case.replies.get("target_fingerprint")
    own = source == identity.target_fingerprint if source else None
    known = {True: "replies of this target", False: "replies of another target", None: f"mask: {identity.mask}"}[own]
    sharpness = case.projected.sharpness
    warmth = case.temperature
    if inside is None and own is None:
        raise NotChecked(f"{known}; too few labels to measure: raise --samples")
    if inside is None:
        measured, short = f"{known}; too few labels to measure", 0.0
    else:
        measured = f"{inside:.1%} of the labelled tokens are the target's likeliest ({known})"
        short = max(0.0, sharpness - inside) if sharpness == sharpness else 0.0
    figures = {"agreement": float("nan") if inside is None else inside, "expected": sharpness}
    expected = "nearly all"
    if warmth is None and sharpness == sharpness:
        expected = f"{sharpness:.0%} or more (sampled at 1; greedy: 100%)"
    elif sharpness == sharpness:
        kind = "greedy replies" if warmth == 0.0 else f"replies at temperature {warmth:g}"
        expected = f"about {sharpness:.0%}, as {kind} have"
    remedy = (
        "in decoding the drafter follows the target's own words: let the target answer the prompts itself (`draftsmith data respond`), "
        "extract and train on those replies"
    )
    if case.target is None:
        remedy += "; the figure is of the cached states and means nothing where `re-projection` has a fault"
    if own is False or short > _FOREIGN:
        return Finding("own-text", "fault", measured, expected, remedy, figures)
    if short > _MIXED or (own is None and identity.mask != IDS_AS_GENERATED):
        return Finding("own-text", "warning", measured, expected, remedy, figures)
    return Finding("own-text", "ok", measured, expected, "", figures)


def check_loops(case: Case) -> Finding:
    """Replies that end by saying one phrase over and over: they are easy to draft, and nobody wants them."""
    _ = case.open_cache
    replies = [_last_reply(sample) for sample in case.samples]
    looping = [
        sample.id for sample, reply in zip(case.samples, replies, strict=True) if is_looping(reply, case.eos_ids)
    ]
    share = len(looping) / max(1, len(replies))
    measured, expected = f"{len(looping)} of {len(replies)} replies end in a loop", f"below {_LOOPS:.0%}"
    figures = {"samples": len(replies), "looping": len(looping)}
    if share < _LOOPS:
        return Finding("loops", "ok", measured, expected, "", figures)
    remedy = (
        "loops flatter every figure on this text and teach little: make shorter replies, or sampled ones (`draftsmith data respond "
        "--max-new-tokens`, `--temperature`, `--repetition-penalty`)"
    )
    return Finding("loops", "warning", measured, expected, remedy, figures, (f"such as {', '.join(looping[:3])}",))


def _last_reply(sample: CachedSample) -> list[int]:
    """The last unbroken stretch of labelled tokens."""
    labelled = sample.loss_mask.bool().tolist()
    stop = len(labelled) - labelled[::-1].index(True) if any(labelled) else 0
    start = stop
    while start > 0 and labelled[start - 1]:
        start -= 1
    return [int(token) for token in sample.input_ids[start:stop]]


def shown_samples(case: Case, count: int, marks: bool) -> list[Text]:
    """Some samples as training sees them; `marks` puts « » around what is trained on, where colours do not show."""
    views = []
    for sample in case.samples[:count]:
        labelled = torch.nonzero(sample.loss_mask).flatten()
        start = max(0, int(labelled[0]) - _SHOWN_TOKENS // 2) if len(labelled) else 0
        part = slice(start, start + _SHOWN_TOKENS)
        ids, mask = sample.input_ids[part].tolist(), sample.loss_mask[part].bool().tolist()
        name = sample.id if len(ids) == len(sample.input_ids) else f"{sample.id} [{start}:{start + len(ids)}]"
        views.append(render(TokenizedSample(name, ids, mask), case.tokenizer, marks=marks))
    return views
