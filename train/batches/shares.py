"""Which rank takes which samples of a joint batch, so that all ranks have nearly as much to do.

Owns: the two ways to deal. Does not know: epochs, caches.
"""

import heapq

import numpy as np

from draftsmith.train.batches.cuts import cut


def deal_out(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [n]: which rank takes each of n samples, so that all have nearly as many tokens; n >= num_ranks, and each gets one.

    The longest first, each to the rank with the fewest tokens so far (Graham, "Bounds on multiprocessing timing anomalies",
    1969): no two ranks differ by more than the longest sample.
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
    """As deal_out, the shortest samples to the first rank and the longest to the last: little padding in each."""
    order = np.argsort(lengths, kind="stable")
    cuts = cut(np.cumsum(lengths[order]), num_ranks, 1)
    rank_of = np.empty(len(lengths), dtype=np.int64)
    rank_of[order] = np.repeat(np.arange(num_ranks), np.diff(cuts))
    return rank_of
