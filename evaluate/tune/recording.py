"""One pass of a drafter over replies: what it would have drafted behind every token of them.

Owns the drafter that drafts for the record only, and what is kept of a draft once the reply's own continuation is known: enough to
tell what any shallower or smaller tree would have accepted there. Knows neither which shapes are compared nor what they cost.

Shape legend: B batch rows, N tree nodes, P recorded positions, D recorded depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.records import Sample
from draftsmith.models import (
    Cycle,
    Drafter,
    DraftLimits,
    DraftTree,
    Emitted,
    KeptRows,
    Opening,
    PackedBatch,
    Rollout,
    Target,
    TargetEnds,
    root_tree,
)
from draftsmith.models.drafters.draft_records import DraftState
from draftsmith.models.tree.search import Expander
from draftsmith.models.trunk.riders import Riders

Ints = NDArray[np.int32]
NOWHERE = np.iinfo(np.int32).max


def num_candidates(width: int, depth: int) -> int:
    """Nodes of a dynamic tree before it is pruned: all continuations of the root and of the best of each layer."""
    return width + width**2 * (depth - 1)


def unpruned(width: int, depth: int) -> DraftLimits:
    """A dynamic tree of which every node is kept."""
    return DraftLimits(width, depth, node_budget=num_candidates(width, depth))


@dataclass(frozen=True)
class Drafted:
    """One tree on the host, padding left out; [N] each, the root first, a parent before its children."""

    tokens: Ints
    parents: Ints
    depths: Ints
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Recorded:
    """One reply and, behind each of its tokens but the last, where the trees drafted there hold its next tokens.

    Attributes:
        prompt_ids: what the reply was given for.
        token_ids: the reply.
        ahead: width -> int32 [P, D, D]; ``[p, k - 1, d - 1]`` is how many nodes of the tree cut at depth d the rerank prefers to the
            reply's k-th next token; NOWHERE where the tree does not hold it. A budget of n nodes keeps the token if that is below n.
        ranks: width -> int32 [P, D], which continuation of its parent the reply's k-th next token is; -1 where the tree does not hold it.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ahead: dict[int, Ints]
    ranks: dict[int, Ints]

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.token_ids) - 1


@dataclass(frozen=True)
class RecordingState:
    """The recorded drafter's own state, and which request each row is."""

    inner: DraftState
    requests: list[int]

    def select_rows(self, kept: KeptRows) -> RecordingState:
        """The state of some batch rows only."""
        return RecordingState(self.inner.select_rows(kept), [self.requests[row] for row in kept.order])


class Recording(Drafter):
    """Lets another drafter draft one unpruned tree for each width, keeps them, and proposes nothing.

    The engine then emits one token a cycle, so that every position is met, and met with the state that decoding would have there.

    Attributes:
        drafted: of the batch at hand, by request: width -> one tree a position. One list, which engines' views of this drafter fill too.
    """

    def __init__(self, inner: Drafter, widths: Sequence[int], depth: int) -> None:
        super().__init__(inner.config)
        self.inner = inner
        self.limits = {width: unpruned(width, depth) for width in widths}
        self.drafted: list[dict[int, list[Drafted]]] = []

    @property
    def features(self) -> tuple[str, ...]:
        """The recorded drafter's."""
        return self.inner.features

    @property
    def riders(self) -> Riders | None:
        """Those of the drafter that it records."""
        return self.inner.riders

    @property
    def max_draft_steps(self) -> int | None:
        """The recorded drafter's."""
        return self.inner.max_draft_steps

    @property
    def parts(self) -> tuple[Drafter, ...] | None:
        """The recorded drafter's."""
        return self.inner.parts

    def step_weight(self, step: int) -> Tensor:
        """The recorded drafter's."""
        return self.inner.step_weight(step)

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`; the recorded drafter itself stays as it is."""
        self.inner = self.inner.bound(ends)
        return self

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """The recorded drafter's."""
        return self.inner.teacher_forced(batch, rollout)

    def start(self, opening: Opening) -> RecordingState:
        """Empties the record for a new batch."""
        num_rows = len(opening.first_B)
        self.drafted[:] = [{width: [] for width in self.limits} for _ in range(num_rows)]
        most = max(self.limits.values(), key=lambda limits: limits.max_fed)
        return RecordingState(self.inner.start(replace(opening, limits=most)), list(range(num_rows)))

    def expander(self, state: RecordingState, cycle: Cycle, limits: DraftLimits) -> Expander:  # type: ignore[override]
        """The recorded drafter's."""
        return self.inner.expander(state.inner, cycle, limits)

    def advance(self, state: RecordingState, emitted: Emitted) -> RecordingState:  # type: ignore[override]
        """The recorded drafter's."""
        return RecordingState(self.inner.advance(state.inner, emitted), state.requests)

    def propose(self, state: RecordingState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """Records a tree of each width; the bare root is proposed."""
        for width, widest in self.limits.items():
            tree = self.inner.propose(state.inner, cycle, widest)
            for request, drafted in zip(state.requests, on_host(tree), strict=True):
                self.drafted[request][width].append(drafted)
        return root_tree(tree.tokens_BN[:, 0])


def on_host(tree: DraftTree) -> list[Drafted]:
    """Each row's tree, its valid nodes alone."""
    assert tree.scores_BN is not None
    tokens, parents, depths = (
        part.cpu().numpy().astype(np.int32) for part in (tree.tokens_BN, tree.parents_BN, tree.depths_BN)
    )
    scores, valid = tree.scores_BN.float().cpu().numpy(), tree.valid_BN.cpu().numpy()
    places = np.where(parents < 0, -1, np.take_along_axis(valid.cumsum(1) - 1, parents.clip(min=0), axis=1))
    return [
        Drafted(tokens[row][kept], places[row][kept].astype(np.int32), depths[row][kept], scores[row][kept])
        for row, kept in enumerate(valid)
    ]


def record(
    target: Target,
    drafter: Drafter,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    widths: Sequence[int],
    depth: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Recorded]:
    """Decode the prompts plainly, drafting behind every token; replies of one token leave nothing to draft and are kept all the same.

    Args:
        target: decodes.
        drafter: drafts.
        samples: held-out prompts; their places in the list are what the sampling noise belongs to.
        settings: of the replies.
        widths: a tree of each is drafted.
        depth: how deep.
        batch_size: prompts decoded together.
        advance: called with the number of replies that were done since.

    Raises:
        ValueError: a width above the size of the draft vocabulary.
    """
    recording = Recording(drafter, widths, depth)
    # Nothing is proposed. The length says how many riders the trees read.
    engine = Engine(target, recording, DraftLimits(draft_length=depth))
    recorded: list[Recorded] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        numbers = list(range(start, start + len(batch)))
        generations = engine.generate([list(sample.prompt_ids) for sample in batch], settings, request_ids=numbers)
        for sample, generation, drafted in zip(batch, generations, recording.drafted, strict=True):
            recorded.append(traced(sample.prompt_ids, generation.token_ids, drafted, depth))
        advance(len(batch))
    return recorded


def traced(prompt_ids: Sequence[int], reply: Sequence[int], drafted: dict[int, list[Drafted]], depth: int) -> Recorded:
    """What is kept of the trees drafted behind each token of a reply but the last.

    Args:
        prompt_ids: what the reply was given for.
        reply: its tokens.
        drafted: width -> the trees.
        depth: how deep they are traced.
    """
    ahead, ranks = {}, {}
    for width, trees in drafted.items():
        assert len(trees) == len(reply) - 1, "a tree for every token but the last"
        ahead[width] = np.full((len(trees), depth, depth), NOWHERE, dtype=np.int32)
        ranks[width] = np.full((len(trees), depth), -1, dtype=np.int32)
        for place, tree in enumerate(trees):
            trace(tree, reply[place + 1 :], ahead[width][place], ranks[width][place])
    return Recorded(tuple(prompt_ids), tuple(reply), ahead, ranks)


def trace(tree: Drafted, continuation: Sequence[int], ahead: Ints, ranks: Ints) -> None:
    """Follow the reply into a tree and write down, depth by depth, where its tokens stand; see :class:`Recorded`.

    Example: root with children 7 (score -0.1) and 8 (-1.2), 9 (-0.4) below 7. The continuation 8 is rank 1; at depth 1 one node is ahead
    of it (7), of the tree cut at depth 2 two are (7, 9).
    """
    best_first = np.argsort(-tree.scores[1:], kind="stable")  # ties go to the smaller index, as in the real pruning
    place_of = np.empty_like(best_first)
    place_of[best_first] = np.arange(len(best_first))
    depth_by_place = tree.depths[1:][best_first]
    at = 0
    for step, token in enumerate(continuation[: len(ranks)]):
        children = np.flatnonzero(tree.parents == at)
        hits = np.flatnonzero(tree.tokens[children] == token)
        if len(hits) == 0:
            return
        at = int(children[hits[0]])
        ranks[step] = hits[0]
        before = depth_by_place[: place_of[at - 1]]
        for cut in range(step + 1, len(ranks) + 1):
            ahead[step, cut - 1] = np.count_nonzero(before <= cut)
