"""Interpolated modified Kneser-Ney smoothing: from token sequences to a back-off table (Chen and Goodman, 1999, section 3).

Owns the counts and the discounts. Everything is arrays: an order is counted by sorting the keys of all its windows. Knows no files.

Shape legend: P places of the text, G_n n-grams of order n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.models.ngrams.table import NgramTable

_FALLBACK = (0.5, 1.0, 1.5)  # discounts where a text is too small to estimate them, as KenLM has them


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order.

    Attributes:
        contexts: int64 [G_n], row of the first n - 1 tokens in the order below; 0 for n = 1.
        tokens: int64 [G_n], the last token; rows are sorted by both.
        counts: int64 [G_n], how often each occurs.
        links: int64 [G_n], row of the last n - 1 tokens in the order below; 0 for n = 1.
        row_at: int64 [P], the n-gram that begins at each place; -1 where none does.
    """

    contexts: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    links: np.ndarray
    row_at: np.ndarray


@dataclass(frozen=True)
class _Level:
    """The numbers of one order.

    Attributes:
        counted: its n-grams.
        probs: float64 [G_n].
        weights: float64, of each context: what it leaves to the shorter one.
        below: float64 [G_n], the probability of the same token behind the shorter context.
    """

    counted: _Order
    probs: np.ndarray
    weights: np.ndarray
    below: np.ndarray


def kneser_ney(
    sequences: Sequence[Sequence[int]],
    vocab_size: int,
    order: int,
    least_count: int = 1,
    tokenizer_fingerprint: str = "",
) -> NgramTable:
    """Estimate an n-gram model.

    Orders below N count in how many ways an n-gram is preceded, not how often it occurs; one that only begins sequences keeps its number of
    occurrences. Each order has three discounts, for counts of 1, 2 and more.

    Args:
        sequences: token ids. No n-gram reaches from one into the next.
        vocab_size: V; every token is below it.
        order: N, at least 1.
        least_count: n-grams of three and more tokens that occur less often are left out, and their mass goes to the shorter context.
        tokenizer_fingerprint: of the tokens.

    Returns:
        The table, on the CPU.

    Raises:
        ValueError: no tokens, a token outside the vocabulary, an order or a count below 1, or more n-grams than keys can number.
    """
    if order < 1 or least_count < 1:
        raise ValueError(f"order is {order} and least_count {least_count}; both must be at least 1")
    text = np.fromiter((token for sequence in sequences for token in sequence), dtype=np.int64)
    if text.size == 0:
        raise ValueError("there are no tokens to count; give a text with replies")
    if text.min() < 0 or text.max() >= vocab_size:
        raise ValueError(f"token ids go from {text.min()} to {text.max()}, the vocabulary has {vocab_size} tokens")
    if text.size > np.iinfo(np.int64).max // vocab_size // (order + 1):
        raise ValueError(f"{text.size} tokens are too many for {order}-grams of {vocab_size} tokens; give less text")
    left = np.concatenate([np.arange(len(sequence), 0, -1) for sequence in sequences])
    orders: list[_Order] = []
    for n in range(1, order + 1):
        orders.append(_count(text, left, n, orders[-1] if orders else None, vocab_size))
    levels: list[_Level] = []
    for counted, longer in zip(orders, [*orders[1:], None], strict=True):
        below = levels[-1].probs[counted.links] if levels else np.full(len(counted.tokens), 1.0 / vocab_size)
        levels.append(_level(counted, longer, below))
    return _table(levels, vocab_size, least_count, tokenizer_fingerprint)


def _count(text: np.ndarray, left: np.ndarray, n: int, shorter: _Order | None, vocab_size: int) -> _Order:
    """Count the windows of n tokens that end within their sequence; ``left`` is how many tokens begin at each place."""
    place = np.flatnonzero(left >= n)
    context = np.zeros_like(place) if shorter is None else shorter.row_at[place]
    keys, row, counts = np.unique(context * vocab_size + text[place + n - 1], return_inverse=True, return_counts=True)
    links = np.zeros_like(keys)
    if shorter is not None:
        links[row] = shorter.row_at[place + 1]
    row_at = np.full(text.shape, -1, dtype=np.int64)
    row_at[place] = row
    return _Order(keys // vocab_size, keys % vocab_size, counts, links, row_at)


def _level(counted: _Order, longer: _Order | None, below: np.ndarray) -> _Level:
    """Each n-gram's probability: its discounted share of its context, and what the shorter context adds (equations 23 to 26)."""
    counts = counted.counts
    if longer is not None:
        before = np.bincount(longer.links, minlength=len(counts))
        counts = np.where(before > 0, before, counts)
    discount = _discounts(counts)[np.minimum(counts, 3) - 1]
    total = np.bincount(counted.contexts, weights=counts)
    taken = np.bincount(counted.contexts, weights=np.minimum(discount, counts))
    weights = np.divide(taken, total, out=np.ones(len(total)), where=total > 0)
    share = np.maximum(counts - discount, 0.0) / total[counted.contexts]
    return _Level(counted, share + weights[counted.contexts] * below, weights, below)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """float64 [3]: D_1, D_2, D_3+ by the counts of counts (equation 26)."""
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        return np.array(_FALLBACK)
    share = n1 / (n1 + 2 * n2)
    estimates = [j - (j + 1) * share * after / own for j, own, after in ((1, n1, n2), (2, n2, n3), (3, n3, n4))]
    return np.array([value if 0.0 < value <= j else _FALLBACK[j - 1] for j, value in enumerate(estimates, start=1)])


def _table(levels: list[_Level], vocab_size: int, least_count: int, tokenizer_fingerprint: str) -> NgramTable:
    """Number the n-grams that are kept, shorter ones first, and put all orders into one table.

    An n-gram occurs at most as often as its parts, so whatever is kept has its context and its link.
    """
    keys: list[np.ndarray] = []
    log_probs: list[np.ndarray] = []
    links, lengths = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    backoffs = [np.zeros(1)]
    contexts_below = np.zeros(
        1, np.int64
    )  # the number of each n-gram of the order below as a context; -1 of what is left out
    for n, level in enumerate(levels, start=1):
        kept = level.counted.counts >= (least_count if n > 2 else 1)
        context = level.counted.contexts[kept]
        weights = level.weights if kept.all() else _rest(level, kept)
        used = np.unique(context)
        backoffs_now = np.concatenate(backoffs)
        backoffs_now[contexts_below[used]] = np.log(weights[used])
        first = 1 + sum(len(each) for each in keys)
        numbers = np.full(len(kept), -1, dtype=np.int64)
        numbers[kept] = first + np.arange(int(kept.sum()))
        keys.append(contexts_below[context] * vocab_size + level.counted.tokens[kept])
        log_probs.append(np.log(level.probs[kept]))
        links.append(contexts_below[level.counted.links[kept]] if n > 1 else np.zeros(len(context), np.int64))
        lengths.append(np.full(len(context), n, dtype=np.int64))
        backoffs = [backoffs_now, np.zeros(len(context))]
        contexts_below = numbers
    return NgramTable(
        len(levels),
        vocab_size,
        torch.from_numpy(np.concatenate(keys)),
        torch.from_numpy(np.concatenate(log_probs)).float(),
        torch.from_numpy(np.concatenate(backoffs)).float(),
        torch.from_numpy(np.concatenate(links)),
        torch.from_numpy(np.concatenate(lengths)),
        tokenizer_fingerprint,
    )


def _rest(level: _Level, kept: np.ndarray) -> np.ndarray:
    """float64, of each context: what the kept n-grams lack to 1, over what the shorter context gives to all others."""
    context, size = level.counted.contexts[kept], len(level.weights)
    missing = 1.0 - np.bincount(context, weights=level.probs[kept], minlength=size)
    free = 1.0 - np.bincount(context, weights=level.below[kept], minlength=size)
    good = (missing > 1e-12) & (free > 1e-12)
    return np.where(good, missing / np.where(good, free, 1.0), level.weights)
