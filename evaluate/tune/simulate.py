"""From a record to what any shape would have emitted a step, without decoding again; and to the best static tree.

Owns the replay: cycles from root to root, as the engine's. Knows nothing of how the record was made, of seconds or of files.

Shape legend: P recorded positions, D recorded depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.tune.recording import Ints, Recorded, num_candidates
from draftsmith.models.tree.limits import DraftLimits

RankPath = tuple[int, ...]


def replay(reply: Recorded, limits: DraftLimits) -> Decoded:
    """What the engine would have done with this reply: accepted tokens of each cycle, the last one cut where the reply ends.

    Args:
        reply: recorded at least as deep as the limits go, and with their width.
        limits: a chain, a dynamic tree, or a static tree.

    Example: a reply of 6 tokens and drafts that hold 2, 0, 0, 5, .. tokens of what follows tokens 1, 2, 3, 4, .. takes the cycles
    2 and 1: tokens 2 to 4 with one step, and 5 and 6 with another, of whose drafted tokens only one still had a place.
    """
    accepted_P = accepted(reply, limits)
    cycles, place = [], 0
    while place < reply.num_positions:
        cycles.append(min(int(accepted_P[place]), reply.num_positions - place - 1))
        place += cycles[-1] + 1
    return Decoded(reply.token_ids, tuple(cycles))


def accepted(reply: Recorded, limits: DraftLimits) -> Ints:
    """int32 [P], how many tokens of the reply's own continuation a draft behind each position holds.

    Raises:
        ValueError: beams without a node budget, sampled or merged trees, pruning by probability, early stops, which a record does not tell.
    """
    if limits.sampled is not None or limits.early_stop is not None or limits.min_probability > 0.0 or limits.merge:
        raise ValueError(f"{limits} cannot be replayed; chains, dynamic and static trees can")
    if limits.paths is not None:
        return _accepted_static(reply.ranks[max(reply.ranks)], limits.paths)
    if limits.node_budget is None and limits.beam_width > 1:
        raise ValueError(f"beams of width {limits.beam_width} cannot be replayed without a node budget; give one")
    depth = limits.draft_length
    budget = num_candidates(limits.beam_width, depth) if limits.node_budget is None else limits.node_budget
    # A parent is never ranked behind its child, so the kept tokens are the first ones.
    kept_PD = reply.ahead[limits.beam_width][:, :depth, depth - 1] < budget
    return kept_PD.sum(axis=1, dtype=np.int32)


def _accepted_static(ranks_PD: Ints, paths: Sequence[RankPath]) -> Ints:
    known = set(paths)
    longest = min(max(map(len, known)), ranks_PD.shape[1])
    accepted_P = np.zeros(len(ranks_PD), dtype=np.int32)
    for place, ranks in enumerate(ranks_PD.tolist()):
        while accepted_P[place] < longest and tuple(ranks[: accepted_P[place] + 1]) in known:
            accepted_P[place] += 1
    return accepted_P


def path_counts(replies: Sequence[Recorded]) -> Counter[RankPath]:
    """How often the reply went along each path of ranks, over all positions, as the widest recorded tree tells.

    Below the first layer that tree continues only the best nodes of a layer, so rare and deep paths are counted too low.
    """
    counts: Counter[RankPath] = Counter()
    for reply in replies:
        if reply.num_positions > 0:
            for ranks in reply.ranks[max(reply.ranks)].tolist():
                known = ranks.index(-1) if -1 in ranks else len(ranks)
                counts.update(tuple(ranks[:end]) for end in range(1, known + 1))
    return counts


def best_static_tree(counts: Counter[RankPath], num_nodes: int) -> tuple[RankPath, ...]:
    """The paths of the static tree of at most so many nodes that accepts most (Medusa, arXiv:2401.10774, section 2.3.3).

    What a tree accepts is the sum over its nodes of how often the reply comes by; no path is more frequent than its prefix. So adding
    the most frequent path whose parent is in, again and again, is taking the most frequent paths, ties in favour of parents.

    Raises:
        ValueError: nothing drafted was ever right.
    """
    if not counts:
        raise ValueError(
            "no drafted token was ever the reply's, so no static tree accepts anything; is the drafter trained?"
        )
    order = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return tuple(sorted(order[:num_nodes], key=lambda path: (len(path), path)))
