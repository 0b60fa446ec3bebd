"""Are the cached states what they are called? They are compared with a fresh forward, and projected to tokens again.

Owns the checks `sound-states`, `states` and `re-projection`, and the target's likeliest tokens that other checks read too. Does not know
drafters.

Shape legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.doctor.case import Case, NotChecked, Projection, fresh_states, has_pre_norm
from draftsmith.evaluate.doctor.report import Finding, Verdict
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.target import PRE_NORM, Target

_ROWS = 1024  # logits of so many positions are in memory at a time
_SEARCHED = 256  # tokens over which the layer that fits is looked for
# By the dtype that is stored; the first of each pair is sound, beyond the second is a fault.
_AGREEMENTS = {"float8_e4m3": (0.93, 0.80)}
_AGREEMENT = (0.98, 0.90)  # shares of equal argmax
_CLEAR = 0.05  # by which another reading must be better to be named
_DISTANCES = {"float8_e4m3": (0.08, 0.16)}
_DISTANCE = (0.03, 0.10)  # median distance relative to a state's length
_IN_THE_LOOP = "the target was in the loop: no states are kept that could be wrong"
_POST_NORM = "after the final norm"


def states_of(sample: CachedSample, layer: str) -> Tensor:
    """float32 [T, D] on the CPU, whatever dtype is stored."""
    return pack([sample], (layer,)).hidden[layer].float()


@torch.no_grad()
def likeliest(ends: TargetEnds, states_TD: Tensor, normed: bool = False) -> Tensor:
    """int64 [T] on the CPU: the argmax of the target's head over ``states_TD`` before the final norm, or after it where `normed`."""
    argmaxes = []
    for part_TD in states_TD.split(_ROWS):
        part_TD = part_TD.to(ends.device)
        part_TD = part_TD.to(ends.dtype) if normed else ends.final_norm(part_TD)
        argmaxes.append(ends.logits(part_TD).argmax(-1).cpu())
    return torch.cat(argmaxes)


def project(
    cache: HiddenStateCache,
    samples: Sequence[CachedSample],
    ends: TargetEnds,
    target: Target | None,
    temperature: float | None,
    advance: Callable[[int], None] = lambda count: None,
) -> Projection:
    """The target's likeliest tokens over samples: of the cached states, and of one fresh forward each where the target is whole."""
    cached, fresh, following, sharpness = [], [], [], []
    for sample in samples:
        following.append(torch.cat([sample.loss_mask[1:], sample.loss_mask.new_zeros(1)]).bool())
        states_TD = states_of(sample, PRE_NORM) if has_pre_norm(cache) else None
        if states_TD is not None:
            cached.append(likeliest(ends, states_TD))
        if target is not None:
            now_TD = fresh_states(target, sample, ()).pre_norm[0]
            fresh.append(likeliest(ends, now_TD))
            states_TD = now_TD  # what is expected of own text must not come from states under suspicion
        if states_TD is not None:
            sharpness.append(_sharpness(ends, states_TD[following[-1].to(states_TD.device)], temperature))
        advance(1)
    sharp_T = torch.cat(sharpness) if sharpness else torch.zeros(0)
    return Projection(
        tuple(cached) if has_pre_norm(cache) else None,
        tuple(fresh) if target is not None else None,
        tuple(following),
        float(sharp_T.mean()) if len(sharp_T) else float("nan"),
    )


@torch.no_grad()
def _sharpness(ends: TargetEnds, states_TD: Tensor, temperature: float | None) -> Tensor:
    """float32 [T] on the CPU: the likeliest token's probability at each of these states; ones for greedy replies."""
    if temperature == 0.0:
        return torch.ones(len(states_TD))
    warmth = 1.0 if temperature is None else temperature
    parts = [part_TD.to(ends.device) for part_TD in states_TD.split(_ROWS)]
    return torch.cat(
        [(ends.logits(ends.final_norm(part_TD)).float() / warmth).softmax(-1).amax(-1).cpu() for part_TD in parts]
    )


def check_sound(case: Case) -> Finding:
    """Numbers that cannot be states: NaN, infinity, zeros, the same vector everywhere.

    Raises:
        NotChecked: the cache holds no states.
    """
    cache = case.open_cache
    if not cache.manifest.identity.layers:
        raise NotChecked(_IN_THE_LOOP)
    faults: list[str] = []
    tokens = 0
    norms: dict[str, list[float]] = {}
    for sample in case.samples:
        for layer in cache.manifest.identity.layers:
            states_TD = states_of(sample, layer)
            tokens += len(states_TD)
            wrong = _unsound(states_TD)
            norms.setdefault(layer, []).append(float(states_TD.norm(dim=-1).median()))
            if wrong:
                faults.append(f"sample {sample.id}, {layer}: {wrong}")
    figures = {"samples": len(case.samples), "states": tokens, "unsound": len(faults)}
    details = [f"median length of {layer}: {sum(lengths) / len(lengths):.3g}" for layer, lengths in norms.items()]
    if faults:
        return Finding(
            "sound-states",
            "fault",
            f"{len(faults)} of {len(case.samples)} samples: {faults[0]}",
            "finite, not zero, another at every token",
            "delete the cache and extract it again; should it come back, run the target in float32 (--target-dtype float32) and store "
            "bfloat16: float16 overflows on some targets",
            figures,
            tuple(faults[:4]),
        )
    return Finding(
        "sound-states", "ok", f"{tokens:,} states", "finite, not zero, not constant", "", figures, tuple(details)
    )


def _unsound(states_TD: Tensor) -> str:
    bad_T = ~torch.isfinite(states_TD).all(-1)
    if bool(bad_T.any()):
        return f"NaN or infinity at {int(bad_T.sum())} tokens, first at {int(bad_T.nonzero()[0])}"
    zero_T = (states_TD == 0).all(-1)
    if bool(zero_T.any()):
        return f"all zeros at {int(zero_T.sum())} tokens, first at {int(zero_T.nonzero()[0])}"
    if len(states_TD) > 2 and bool((states_TD[2:] == states_TD[1]).all()):
        return f"the same state at all of {len(states_TD) - 1} tokens"
    return ""


def check_states(case: Case) -> Finding:
    """Every cached layer against the same layer of a forward made now; where they differ, which layer it really is.

    Raises:
        NotChecked: the target's trunk was not loaded, or the cache holds no states.
    """
    cache = case.open_cache
    if case.target is None:
        raise NotChecked("needs the whole target, of which only the ends were loaded: leave --ends-only out")
    identity = cache.manifest.identity
    if not identity.layers:
        raise NotChecked(_IN_THE_LOOP)
    sound, broken = _DISTANCES.get(identity.dtype, _DISTANCE)
    medians = distances(case.target, case.samples[:8], identity.layers)
    worst = max(medians, key=lambda layer: medians[layer])
    measured = f"{worst}: {medians[worst]:.4f} away"
    expected = f"below {sound} of a state's length"
    figures = {f"distance of {layer}": value for layer, value in medians.items()}
    if medians[worst] <= sound:
        return Finding("states", "ok", measured, expected, "", figures)
    details = []
    for layer in [name for name, value in medians.items() if value > sound]:
        best, distance = _nearest(case.target, case.samples[0], layer)
        known = (
            f"is {best} ({distance:.4f} away)" if distance <= sound else f"is no layer of this target (nearest: {best})"
        )
        details.append(f"what the cache calls {layer} {known}")
    verdict: Verdict = "fault" if medians[worst] > broken else "warning"
    remedy = (
        "the drafter learnt from other states than it meets in decoding: extract the cache again with this target, and train again"
        if verdict == "fault"
        else "the target runs in another dtype or with other kernels than when the cache was made: give --dtype as in extraction"
    )
    return Finding("states", verdict, measured, expected, remedy, figures, tuple(details))


def distances(target: Target, samples: Sequence[CachedSample], layers: Sequence[str]) -> dict[str, float]:
    """Of each layer the median distance of the cached states from a fresh forward's, relative to their length."""
    by_layer: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for sample in samples:
        output = fresh_states(target, sample, tuple(layers))
        for layer in layers:
            by_layer[layer].append(relative(states_of(sample, layer), output.feature(layer)[0].float().cpu()))
    return {layer: float(torch.cat(parts).median()) for layer, parts in by_layer.items()}


def as_named(case: Case, layers: Sequence[str]) -> bool:
    """Whether the cached states of these layers are known to be what a forward says; False where the trunk was not loaded."""
    if case.target is None:
        return False
    _, broken = _DISTANCES.get(case.open_cache.manifest.identity.dtype, _DISTANCE)
    return all(away <= broken for away in distances(case.target, case.samples[:2], layers).values())


def relative(stored_TD: Tensor, fresh_TD: Tensor) -> Tensor:
    """float32 [T]: distance of each state relative to the fresh one's length."""
    return ((stored_TD - fresh_TD).norm(dim=-1) / fresh_TD.norm(dim=-1).clamp_min(1e-12)).nan_to_num(nan=float("inf"))


def _nearest(target: Target, sample: CachedSample, layer: str) -> tuple[str, float]:
    """Which layer of a fresh forward, and how many tokens away, comes nearest to what is stored under a name."""
    stored_TD = states_of(sample, layer)[:_SEARCHED]
    names = (PRE_NORM, *(f"layer.{number}.output" for number in range(target.config.num_hidden_layers)))
    output = fresh_states(target, sample, names, _SEARCHED)
    candidates = {name: output.feature(name)[0].float().cpu() for name in names}
    candidates[f"{PRE_NORM} {_POST_NORM}"] = output.normed[0].float().cpu()
    distance_to: dict[str, float] = {}
    for name, states_TD in candidates.items():
        for shift in (0, -1, 1):
            here, there = _overlap(len(stored_TD), shift)
            if here.stop > here.start:
                where = {0: "", -1: ", one token late", 1: ", one token early"}[shift]
                distance_to[name + where] = float(relative(stored_TD[here], states_TD[there]).median())
    best = min(distance_to, key=lambda name: distance_to[name])
    return best, distance_to[best]


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Slices a, b with `stored[a]` beside `fresh[b]`, where b is `shift` tokens further on. Example: 4, 1 -> 0:3 and 1:4."""
    return slice(max(0, -shift), length - max(0, shift)), slice(max(0, shift), length - max(0, -shift))


def check_projection(case: Case) -> Finding:
    """The argmax of the cached states, against a fresh forward or the text, also read in other ways (norm, shift, layer).

    Raises:
        NotChecked: the cache lacks the states that the target's head reads.
    """
    projection = case.projected
    as_named, nearly = _AGREEMENTS.get(case.open_cache.manifest.identity.dtype, _AGREEMENT)
    if not case.open_cache.manifest.identity.layers:
        raise NotChecked(_IN_THE_LOOP)
    if projection.cached is None:
        raise NotChecked(f"the cache has no {PRE_NORM}; the check `states` compares the layers that it has")
    against_forward = projection.fresh is not None
    shares = {"as named": _mean(_agreements(case, projection.cached))}
    readings = dict(_readings(case))
    shares |= {name: _mean(_agreements(case, tokens, shift)) for name, (tokens, shift) in readings.items()}
    own = shares["as named"]
    best = max(shares, key=lambda name: shares[name])
    reference = "a fresh forward's" if against_forward else "the text's next token"
    likely = 1.0 if against_forward else projection.sharpness
    measured = f"{own:.1%} equal {reference}" + (f" ({best}: {shares[best]:.1%})" if best != "as named" else "")
    expected = f"{as_named:.0%} or more" if likely > 0.99 else f"about {likely:.0%} (sampled or foreign text)"
    details = tuple(f"{name}: {share:.1%}" for name, share in shares.items())
    if best != "as named" and shares[best] > own + _CLEAR:
        remedy = (
            f"the states named {PRE_NORM} read best {best}: whoever wrote this cache slipped there; extract it again with `draftsmith "
            "data extract`, and train again"
        )
        return Finding("re-projection", "fault", measured, expected, remedy, shares, details)
    if own >= as_named * likely:
        return Finding("re-projection", "ok", measured, expected, "", shares)
    if not against_forward:
        remedy = (
            "either the text is not the target's own (see `own-text`), or the states are not its states: only a forward can tell; run "
            "doctor with the whole target"
        )
        return Finding("re-projection", "warning", measured, expected, remedy, shares, details)
    verdict: Verdict = "fault" if own < nearly else "warning"
    remedy = (
        "these are not this target's states before its final norm, and none of the usual slips explains them: extract the cache again"
        if verdict == "fault"
        else "the target runs in another dtype than when the cache was made, or nearly ties are common: give --dtype as in extraction"
    )
    return Finding("re-projection", verdict, measured, expected, remedy, shares, details)


def _readings(case: Case) -> Iterator[tuple[str, tuple[tuple[Tensor, ...], int]]]:
    """Other ways to read the states: name -> likeliest tokens, and how many tokens later they are to be looked at."""
    cached = case.projected.cached
    assert cached is not None
    normed = tuple(likeliest(case.ends, states_of(sample, PRE_NORM), normed=True) for sample in case.samples)
    yield "as if after the final norm", (normed, 0)
    yield "one token late", (cached, 1)
    yield "one token early", (cached, -1)
    for layer in case.open_cache.manifest.identity.layers:
        if layer != PRE_NORM:
            yield f"taken from {layer}", (tuple(likeliest(case.ends, states_of(s, layer)) for s in case.samples), 0)


def _agreements(case: Case, tokens: Sequence[Tensor], shift: int = 0) -> Iterator[Tensor]:
    """bool, a tensor a sample: whether `tokens[t + shift]` is what follows position t, by the fresh forward or else by the text."""
    fresh = case.projected.fresh
    for number, sample in enumerate(case.samples):
        length = len(sample.input_ids)
        wanted_T = fresh[number] if fresh is not None else sample.input_ids.roll(-1)
        counted_T = torch.ones(length, dtype=torch.bool) if fresh is not None else case.projected.labelled_next[number]
        here, there = _overlap(length, shift)
        yield (tokens[number][there] == wanted_T[here])[counted_T[here]]


def _mean(parts: Iterator[Tensor]) -> float:
    joined_T = torch.cat([part_T.float() for part_T in parts])
    return float(joined_T.mean()) if len(joined_T) else 0.0
