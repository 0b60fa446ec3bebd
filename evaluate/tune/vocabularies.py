"""What smaller draft vocabularies would give a drafter: coverage and tokens per step from the record, seconds from the bytes of its head.

Owns the most frequent tokens, and the cut of a record to them. Does not know how replies are recorded or how cycles are timed.

A record holds no trees of a drafter with a smaller vocabulary, which would have other candidates in the place of the tokens that it lacks.
So the tokens per step are a lower bound. The seconds are an estimate: drafting takes as long as its weights take to be read.

Shape legend: V vocabulary, Vd draft vocabulary, P recorded positions, D recorded depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.progress import progress
from draftsmith.evaluate.roofline.bytes_read import draft_bytes, tensor_bytes
from draftsmith.evaluate.strata.acceptance import tokens_per_step
from draftsmith.evaluate.tune.costs import Costs
from draftsmith.evaluate.tune.recording import NOWHERE, Recorded
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.tree.limits import DraftLimits

SIZES = (8_192, 16_384, 32_768)
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class VocabularyOutcome:
    """What one draft vocabulary promises, with the fastest shape.

    Attributes:
        size: tokens that the drafter scores.
        is_own: it is the drafter's own vocabulary, as it was recorded and timed.
        coverage: share of the replies' tokens that it holds.
        tokens_per_step: emitted tokens per target forward; a lower bound but for the drafter's own.
        draft_seconds: of a cycle; an estimate but for the drafter's own.
        speedup: over plain decoding, from these two.
    """

    size: int
    is_own: bool
    coverage: float
    tokens_per_step: float
    draft_seconds: float
    speedup: float


def weigh_vocabularies(
    replies: Sequence[Recorded],
    drafter: Drafter,
    limits: DraftLimits,
    costs: Costs,
    sizes: Sequence[int],
    counts_V: Counts | None = None,
) -> list[VocabularyOutcome]:
    """The drafter's own vocabulary and the smaller ones, the fastest first.

    Args:
        replies: the record.
        drafter: that was recorded.
        limits: the fastest shape.
        costs: of its cycles.
        sizes: of the vocabularies; those that are not below the drafter's are left out.
        counts_V: how often each token is labelled in the training text. None counts in the replies: each half of them is judged by the
            tokens of the other half, since a vocabulary chosen on the very replies would look better than it is.

    Raises:
        ValueError: a size below 1.
    """
    if min(sizes, default=1) < 1:
        raise ValueError(f"vocabularies is {list(sizes)}; a draft vocabulary has at least 1 token")
    own_ids = drafter.draft_ids().cpu().numpy()
    halves = [replies[0::2], replies[1::2]]
    vocab_size = drafter.config.vocab_size
    counts = [_counted(half, vocab_size) for half in reversed(halves)] if counts_V is None else [counts_V, counts_V]
    outcomes = []
    for size in sorted({*(size for size in sizes if size < len(own_ids)), len(own_ids)}):
        kept = [most_frequent_of(own_ids, half_counts, size) for half_counts in counts]
        judged = [(reply, kept_mask_V) for half, kept_mask_V in zip(halves, kept, strict=True) for reply in half]
        outcomes.append(_outcome(judged, drafter, limits, costs, size, len(own_ids)))
    return sorted(outcomes, key=lambda outcome: -outcome.speedup)


def _outcome(
    judged: Sequence[tuple[Recorded, NDArray[np.bool_]]],
    drafter: Drafter,
    limits: DraftLimits,
    costs: Costs,
    size: int,
    own_size: int,
) -> VocabularyOutcome:
    steps = tokens_per_step([replay(cut(reply, kept_mask_V), limits) for reply, kept_mask_V in judged])
    assert steps is not None
    inside = np.concatenate([kept_mask_V[list(reply.token_ids)] for reply, kept_mask_V in judged])
    cost = costs.of(limits)
    draft = cost.draft * draft_share(drafter, limits, size / own_size)
    return VocabularyOutcome(
        size, size == own_size, float(inside.mean()), steps, draft, steps * costs.plain / (draft + cost.check)
    )


def most_frequent_of(own_ids: Counts, counts_V: Counts, size: int) -> NDArray[np.bool_]:
    """Which tokens a smaller vocabulary keeps: the most frequent ones of the drafter's; of equally frequent ones, those with smaller ids.

    Example: ids 1, 3, 4 with counts 0, 5, 0 and a size of 2 -> tokens 3 and 1.

    Args:
        own_ids: int64 [Vd], the drafter's draft vocabulary, increasing.
        counts_V: how often each token of the target occurs.
        size: of the smaller vocabulary.

    Returns:
        bool [V], True for tokens that are kept.
    """
    order = np.argsort(-counts_V[own_ids], kind="stable")
    kept_mask_V = np.zeros(len(counts_V), dtype=np.bool_)
    kept_mask_V[own_ids[order[:size]]] = True
    return kept_mask_V


def cut(reply: Recorded, kept_mask_V: NDArray[np.bool_]) -> Recorded:
    """The record of a drafter that proposes only some tokens: a draft ends where the reply continues with another one.

    Args:
        reply: recorded.
        kept_mask_V: bool [V], tokens that are proposed.
    """
    depth = next(iter(reply.ranks.values())).shape[1]
    # Behind the reply's end nothing is accepted anyway.
    inside = np.concatenate([kept_mask_V[list(reply.token_ids[1:])], np.ones(depth, dtype=np.bool_)])
    inside_PD = np.lib.stride_tricks.sliding_window_view(inside, depth)[: reply.num_positions]
    reached_PD = np.logical_and.accumulate(inside_PD, axis=1)
    return replace(
        reply,
        ahead={width: np.where(reached_PD[:, :, None], ahead, NOWHERE) for width, ahead in reply.ahead.items()},
        ranks={width: np.where(reached_PD, ranks, -1) for width, ranks in reply.ranks.items()},
    )


def draft_share(drafter: Drafter, limits: DraftLimits, head_share: float) -> float:
    """Bytes that a draft reads with a part of its output head, over those that it reads with all of it.

    Args:
        drafter: attached to its target.
        limits: how it drafts.
        head_share: of the head's rows.
    """
    whole = draft_bytes(drafter, limits).total
    return 1.0 - (1.0 - head_share) * _head_bytes(drafter, limits) / whole if whole else 1.0


def _head_bytes(drafter: Drafter, limits: DraftLimits) -> int:
    """Of the output heads that a draft reads; of a drafter made of others, of the first, whose draft vocabulary it has."""
    if drafter.parts is not None:
        return sum(_head_bytes(part, limits) for part in drafter.parts[:1])
    return sum(tensor_bytes(drafter.step_weight(step)) for step in range(limits.draft_length))


def labelled_counts(cache: HiddenStateCache, vocab_size: int) -> Counts:
    """How often each token is labelled in a cache.

    Args:
        cache: that the drafter was, or will be, trained on.
        vocab_size: V.

    Returns:
        int64 [V].
    """
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    with progress(f"count the tokens of {cache.path}", len(cache), "samples", brief=True) as advance:
        for input_ids, loss_mask in cache.texts(range(len(cache))):
            # A count of the whole vocabulary for each sample would cost more than the samples.
            np.add.at(counts_V, input_ids[loss_mask].numpy(), 1)
            advance(1)
    return counts_V


def _counted(replies: Sequence[Recorded], vocab_size: int) -> Counts:
    tokens = [token for reply in replies for token in reply.token_ids]
    return np.bincount(np.array(tokens, dtype=np.int64), minlength=vocab_size)


def vocabulary_table(outcomes: Sequence[VocabularyOutcome]) -> str:
    """A Markdown table, the best in bold.

    Args:
        outcomes: the fastest first.
    """
    lines = [
        "| draft vocabulary | of the replies' tokens | tokens per step | draft, ms | speed-up |",
        "|---|---|---|---|---|",
    ]
    for place, outcome in enumerate(outcomes):
        name = f"{outcome.size:,}{' (its own)' if outcome.is_own else ''}"
        lines.append(
            f"| {name if place else f'**{name}**'} | {100 * outcome.coverage:.1f} % | {outcome.tokens_per_step:.2f} "
            f"| {1000 * outcome.draft_seconds:.2f} | {outcome.speedup:.2f} |"
        )
    return "\n".join(lines)


def best_vocabulary(outcomes: Sequence[VocabularyOutcome]) -> str:
    """A line that names the best.

    Args:
        outcomes: the fastest first, two or more.
    """
    best = outcomes[0]
    if best.is_own:
        return f"draft vocabulary: its own {best.size:,} tokens are best; no smaller one gains (estimate)"
    [own] = [outcome for outcome in outcomes if outcome.is_own]
    return (
        f"draft vocabulary: {best.size:,} tokens are best, {best.speedup:.2f} instead of {own.speedup:.2f} with its own {own.size:,} "
        f"(estimate); train with draft_vocab_size {best.size}"
    )
