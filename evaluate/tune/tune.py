"""Which draft shape is fastest: tokens per step from a record, seconds from a clock, every shape of a grid weighed.

Owns the grid and the prediction. Knows neither how replies are recorded and cycles timed, nor how the result is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from draftsmith.data.progress import progress
from draftsmith.evaluate.strata.acceptance import tokens_per_step, tokens_per_step_interval
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.tune.costs import Costs
from draftsmith.evaluate.tune.recording import Recorded, num_candidates
from draftsmith.evaluate.tune.simulate import best_static_tree, path_counts, replay
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text

Manner = Literal["chain", "dynamic", "static"]


@dataclass(frozen=True)
class Grid:
    """Which widths, depths and numbers of verified nodes are weighed against each other; without numbers of nodes no trees.

    Raises:
        ValueError: no width or depth, a value twice, or one below 1.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    nodes: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "nodes"):
            values = getattr(self, name)
            if not (values or name == "nodes") or len(set(values)) < len(values) or min(values, default=1) < 1:
                raise ValueError(f"{name} is {list(values)}; give numbers of at least 1, each once")

    def no_deeper_than(self, most: int | None) -> Grid:
        """Without the depths that a drafter cannot draft to; its deepest one in their place. None changes nothing.

        Example: depths 2, 4, 8 and at most 3 -> 2, 3.
        """
        if most is None or self.depth <= most:
            return self
        return replace(self, depths=(*(depth for depth in self.depths if depth < most), most))

    def of_chains(self) -> Grid:
        """The chains of the same depths, and no tree."""
        return replace(self, widths=(1,), nodes=())

    @property
    def depth(self) -> int:
        """The deepest."""
        return max(self.depths)

    def shapes(self) -> list[DraftLimits]:
        """Chains where a width is 1, and dynamic trees with every number of nodes that they have candidates for."""
        shapes: list[DraftLimits] = []
        for width in sorted(self.widths):
            for depth in sorted(self.depths):
                most = num_candidates(width, depth)
                fitting = [nodes for nodes in sorted(self.nodes) if nodes <= most]
                budgets = [None] if width == 1 else fitting or [most]
                shapes += [DraftLimits(width, depth, budget) for budget in budgets]
        return shapes

    def static_shapes(self, replies: Sequence[Recorded]) -> list[DraftLimits]:
        """The best static tree of each number of nodes, as far as the record holds so many paths; none where no draft was ever right."""
        counts = path_counts(replies)
        if not counts:
            return []
        return list(dict.fromkeys(DraftLimits(paths=best_static_tree(counts, nodes)) for nodes in sorted(self.nodes)))


@dataclass(frozen=True)
class Outcome:
    """What one shape promises.

    Attributes:
        shape: as the command line reads it.
        manner: chain, dynamic or static.
        width: of a chain or a dynamic tree; 0 for a static one.
        depth: drafted tokens along one path.
        nodes: drafted nodes that are verified, at most.
        tokens_per_step: emitted tokens per target forward, the bonus token counted.
        interval: 95 % bootstrap over prompts.
        draft_seconds, check_seconds: of a cycle.
        speedup: predicted, over plain decoding in the same engine: tokens per step x plain step / cycle. The prefill is left out.
    """

    shape: str
    manner: Manner
    width: int
    depth: int
    nodes: int
    tokens_per_step: float
    interval: tuple[float, float]
    draft_seconds: float
    check_seconds: float
    speedup: float


def weigh(
    replies: Sequence[Recorded], dynamic: Sequence[DraftLimits], static: Sequence[DraftLimits], costs: Costs
) -> list[Outcome]:
    """Every shape's outcome, the fastest first.

    A static tree is judged by trees of its size that were chosen on the other half of the prompts, since one chosen on the very prompts
    would look better than it is.

    Args:
        replies: the record.
        dynamic: chains and dynamic trees.
        static: static trees that were chosen on all the replies.
        costs: of all of them.

    Raises:
        ValueError: no reply is long enough to need a step.
    """
    if not any(reply.num_positions for reply in replies):
        raise ValueError(
            "no reply has a second token, so nothing was drafted; give prompts that are answered at length"
        )
    outcomes = []
    with progress("weigh", len(dynamic) + len(static), "shapes", brief=True) as advance:
        for limits in dynamic:
            outcomes.append(_outcome(limits, [replay(reply, limits) for reply in replies], costs))
            advance(1)
        for limits in static:
            outcomes.append(_outcome(limits, _replay_by_halves(replies, limits), costs))
            advance(1)
    return sorted(outcomes, key=lambda outcome: -outcome.speedup)


def _replay_by_halves(replies: Sequence[Recorded], limits: DraftLimits) -> list[Decoded]:
    halves = replies[0::2], replies[1::2]
    counts = [path_counts(half) for half in halves]
    if not all(counts):
        return [replay(reply, limits) for reply in replies]
    others = [DraftLimits(paths=best_static_tree(count, len(limits.paths or ()))) for count in reversed(counts)]
    return [replay(reply, other) for half, other in zip(halves, others, strict=True) for reply in half]


def _outcome(limits: DraftLimits, decoded: Sequence[Decoded], costs: Costs) -> Outcome:
    steps, interval = tokens_per_step(decoded), tokens_per_step_interval(decoded)
    assert steps is not None
    assert interval is not None
    cost = costs.of(limits)
    return Outcome(
        shape=shape_text(limits),
        manner="static" if limits.paths else "dynamic" if limits.node_budget else "chain",
        width=0 if limits.paths else limits.beam_width,
        depth=limits.draft_length,
        nodes=limits.max_nodes - 1,
        tokens_per_step=steps,
        interval=interval,
        draft_seconds=cost.draft,
        check_seconds=cost.check,
        speedup=steps * costs.plain / cost.cycle,
    )
