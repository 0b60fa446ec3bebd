"""Tokens per step, acceptance by depth, accepted-length histogram, looping replies: pure functions of records.

Owns the definitions of these measures. Does not know who decoded, on what, or how long it took.
"""

from collections.abc import Callable, Sequence

import numpy as np

from draftsmith.evaluate.strata.decoded import Decoded, DepthAcceptance

LOOP_MIN_REPEATS = 3
LOOP_MIN_TOKENS = 16
LOOP_MAX_PERIOD = 64


def tokens_per_step(decoded: Sequence[Decoded]) -> float | None:
    """Pooled tokens per target forward, the bonus token counted and the prefill's token not.

    sum over prompts of (emitted tokens - 1) / sum over prompts of cycles: long replies weigh more than short ones, as
    they do in time. None when no reply needed a cycle.
    """
    cycles = sum(reply.cycles for reply in decoded)
    return sum(reply.stepped_tokens for reply in decoded) / cycles if cycles else None


def bootstrap_interval(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of column sums, resampling rows (prompts) whole.

    Args:
        columns: one row a prompt, [n][c].
        statistic: sums float64 [R, c] -> values [R]. Values that are not finite do not count: a resample of nothing but zero-cycle
            prompts says nothing about the spread.
        confidence: share of the resamples inside the interval.
        num_resamples: R.
        seed: of the resampling.

    Raises:
        ValueError: there are no rows, or no resample has a value.
    """
    table = np.asarray(columns, dtype=np.float64)
    if len(table) == 0:
        raise ValueError("no prompts to resample: give at least one")
    picks = np.random.default_rng(seed).integers(0, len(table), size=(num_resamples, len(table)))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(table[picks].sum(axis=1))
    values = values[np.isfinite(values)]
    if len(values) == 0:
        raise ValueError("every denominator is 0: give prompts whose replies need a decode cycle")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of sum(numerators) / sum(denominators), one pair a prompt.

    Raises:
        ValueError: the two differ in length or are empty, or every denominator is 0.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    return bootstrap_interval(pairs, lambda sums: sums[:, 0] / sums[:, 1], num_resamples=num_resamples, seed=seed)


def tokens_per_step_interval(decoded: Sequence[Decoded], seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval over prompts of the pooled tokens per step; None when no reply needed a cycle."""
    if not any(reply.cycles for reply in decoded):
        return None
    return ratio_interval([reply.stepped_tokens for reply in decoded], [reply.cycles for reply in decoded], seed=seed)


def acceptance_by_depth(decoded: Sequence[Decoded]) -> tuple[DepthAcceptance, ...]:
    """Conditional and marginal acceptance for each draft depth that any cycle drafted.

    A cycle that drafted fewer levels than `d` does not count against depth `d` in the conditional rate; it does in the
    marginal one, which is what tokens per step is made of: tokens per step = 1 + the sum of marginals, up to the block
    that EOS or the token budget cut.

    Raises:
        ValueError: there are accepted lengths and draft depths, and not one depth a cycle.
    """
    accepted = np.array([count for reply in decoded for count in reply.accepted], dtype=np.int64)
    drafted = np.array([depth for reply in decoded for depth in (reply.drafted or reply.accepted)], dtype=np.int64)
    if len(accepted) != len(drafted):
        raise ValueError(
            f"{len(accepted)} accepted lengths but {len(drafted)} draft depths: give one depth a cycle, or none"
        )
    depths = []
    for depth in range(1, int(drafted.max(initial=0)) + 1):
        reached = int(((accepted >= depth - 1) & (drafted >= depth)).sum())
        passed = int((accepted >= depth).sum())
        conditional = passed / reached if reached else 0.0
        depths.append(DepthAcceptance(depth, reached, passed, conditional, passed / len(accepted)))
    return tuple(depths)


def accepted_length_counts(decoded: Sequence[Decoded]) -> tuple[int, ...]:
    """Number of cycles that accepted 0, 1, 2, ... draft tokens."""
    accepted = [count for reply in decoded for count in reply.accepted]
    return tuple(int(count) for count in np.bincount(accepted)) if accepted else ()


def is_looping(token_ids: Sequence[int], eos_token_ids: Sequence[int] = ()) -> bool:
    """Whether the reply ends by repeating itself: its tail is one phrase at least three times, 16 tokens or more.

    Greedy replies of small models fall into such loops, and any drafter that copies guesses them: they flatter every
    row.
    A tail of period n means the last tokens equal those n places before them; EOS at the end is not part of the tail.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if len(ids) and int(ids[-1]) in set(eos_token_ids):
        ids = ids[:-1]
    for period in range(1, min(LOOP_MAX_PERIOD, len(ids) // LOOP_MIN_REPEATS) + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        tail = len(ids) if len(differs) == 0 else len(ids) - int(differs[-1]) - 1
        if tail >= max(LOOP_MIN_REPEATS * period, LOOP_MIN_TOKENS):
            return True
    return False
