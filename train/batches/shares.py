"""Which rank takes which samples of a joint batch, so that all ranks have nearly as much to do.

Owns: the two ways to deal. Does not know: epochs, caches.
"""

import heapq

import numpy as np

from draftsmith.train.batches.cuts import cut


def deal_out(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """Which rank takes which sample, so that all ranks have nearly as many tokens.

    The longest sample comes first; each goes to the rank with the fewest tokens so far. So no two ranks differ by more than the longest
    sample (Graham, "Bounds on multiprocessing timing anomalies", 1969).

    Args:
        lengths: int64 [n], tokens of each sample; n >= num_ranks.
        num_ranks: W; each gets at least one sample.

    Returns:
        int64 [n], ranks.
    """
    rank_of = np.zeros(len(lengths), dtype=np.int64)
    if num_ranks == 1:
        return rank_of
    tokens = [(0, rank) for rank in range(num_ranks)]
    for place in np.argsort(-lengths, kind="stable").tolist():
        fewest, rank = tokens[0]
        rank_of[place] = rank
        heapq.heapreplace(tokens, (fewest + int(lengths[place]), rank))
    return rank_of


def deal_by_length(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """As deal_out, with the shortest samples for the first rank and the longest for the last: little padding in each.

    Args:
        lengths: int64 [n], tokens of each sample; n >= num_ranks.
        num_ranks: W; each gets at least one sample.

    Returns:
        int64 [n], ranks.
    """
    order = np.argsort(lengths, kind="stable")
    cuts = cut(np.cumsum(lengths[order]), num_ranks, 1)
    rank_of = np.empty(len(lengths), dtype=np.int64)
    rank_of[order] = np.repeat(np.arange(num_ranks), np.diff(cuts))
    return rank_of
