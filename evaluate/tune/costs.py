"""What a cycle costs on this machine: drafting by width and depth, checking by number of nodes, beside a step of plain decoding.

Owns the clock of single cycles and the order of the runs, which are interleaved so that a slow minute slows all alike. Knows nothing of
acceptance.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from draftsmith.decode import Engine, GenerationSettings, Ledger
from draftsmith.evaluate.tune.recording import num_candidates
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes_by_rows import ShapesByRows

Timed: TypeAlias = DraftLimits | ShapesByRows | None
"""What an engine that is timed drafts; None is plain decoding."""
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Cost:
    """Seconds of one cycle: drafting, and everything else (the target's forward, acceptance, bookkeeping)."""

    draft: float
    check: float

    @property
    def cycle(self) -> float:
        """Both."""
        return self.draft + self.check


@dataclass
class CycleClock(Ledger):
    """A ledger that also keeps every cycle apart, the prefill left out."""

    cycle_costs: list[Cost] = field(default_factory=list)
    _before: Cost = Cost(0.0, 0.0)

    def count(self, nodes: int) -> None:
        """Closes a cycle."""
        super().count(nodes)
        draft = self.seconds["draft"]
        check = sum(seconds for name, seconds in self.seconds.items() if name not in ("prefill", "draft"))
        self.cycle_costs.append(Cost(draft - self._before.draft, check - self._before.check))
        self._before = Cost(draft, check)


@dataclass(frozen=True)
class Probe:
    """What is timed: which shapes, on which text.

    Attributes:
        prompt: token ids of a typical context.
        batch_size: so many rows of it are decoded together.
        new_tokens: emitted in each run.
        rounds: most timed runs of each shape.
        most_seconds: no further round begins that would end later than so many seconds after the first; one is timed all the same.
    """

    prompt: Sequence[int]
    batch_size: int = 1
    new_tokens: int = 24
    rounds: int = 7
    most_seconds: float = math.inf


@dataclass(frozen=True)
class Costs:
    """Medians over cycles, each series made to rise: more nodes or layers never cost less, and what looks so is noise.

    Attributes:
        plain: seconds of a step of plain decoding.
        wobble: how far apart the quartiles of a shape's cycles are, as a share of their median, for the shape in the middle; large on a
            machine that does other things as well.
        whole: what was timed as it is: chains and static trees.
        draft: (width, depth) of dynamic trees -> seconds of drafting.
        check: number of drafted nodes -> seconds of everything else, for dynamic trees.
        follow: seconds of a step that drafts nothing while the drafter keeps up with the text: a plain step, and what the drafter takes.
        rider_depth: depth of the trees that ``check`` was timed on, where riders ride behind each of their nodes: as many as the tree is
            deep, so that shallower trees check fewer rows; 0 without riders.
        rounds: how often each shape was timed.
    """

    plain: float
    wobble: float
    whole: Mapping[DraftLimits, Cost]
    draft: Mapping[tuple[int, int], float]
    check: Mapping[int, float]
    follow: float = math.inf
    rider_depth: int = 0
    rounds: int = 1

    def of(self, limits: DraftLimits) -> Cost:
        """A shape's cost; between two numbers of nodes that were timed, checking is interpolated.

        With riders, a tree counts as the one of ``rider_depth`` that has as many rows, tokens and riders together. Example: timed at depth
        5, a tree of 11 nodes and depth 2 has (1 + 11) (1 + 2) = 36 rows, as one of 5 nodes and depth 5.

        Raises:
            ValueError: a shape whose parts were not timed.
        """
        if limits in self.whole:
            return self.whole[limits]
        size = (limits.beam_width, limits.draft_length)
        if size not in self.draft or limits.node_budget is None:
            raise ValueError(f"{limits} was not timed; time its width and depth too")
        nodes, count = sorted(self.check), float(limits.node_budget)
        if self.rider_depth:
            count = (1 + count) * (1 + limits.draft_length) / (1 + self.rider_depth) - 1
        check = np.interp(count, nodes, [self.check[number] for number in nodes])
        return Cost(self.draft[size], float(check))


@dataclass(frozen=True)
class TimingPlan:
    """Which shapes are run so that the costs of others follow.

    Dynamic trees are taken apart, since drafting hardly depends on how many nodes are kept, and checking on nothing else: drafting is
    timed for each width and depth, checking for each number of nodes on the tree that has most candidates.
    """

    whole: tuple[DraftLimits, ...]
    draft: Mapping[tuple[int, int], DraftLimits]
    check: Mapping[int, DraftLimits]

    @classmethod
    def of(cls, shapes: Sequence[DraftLimits]) -> TimingPlan:
        """The plan for shapes whose costs will be asked for."""
        draft: dict[tuple[int, int], DraftLimits] = {}
        for limits in sorted(filter(_is_dynamic, shapes), key=lambda tree: tree.node_budget or 0):
            draft[limits.beam_width, limits.draft_length] = limits
        check: dict[int, DraftLimits] = {}
        if draft:
            largest = max(draft.values(), key=lambda tree: num_candidates(tree.beam_width, tree.draft_length))
            budgets = sorted({limits.node_budget for limits in shapes if limits.node_budget is not None})
            check = {nodes: replace(largest, node_budget=nodes) for nodes in budgets}
        return cls(tuple(limits for limits in shapes if not _is_dynamic(limits)), draft, check)

    @property
    def shapes(self) -> list[DraftLimits | None]:
        """What is timed by its shape, each once; None is plain decoding."""
        return [None, *dict.fromkeys([*self.whole, *self.draft.values(), *self.check.values()])]

    def num_runs(self, probe: Probe) -> int:
        """How many runs there are at most, the untimed first ones included."""
        return (1 + len(self.shapes)) * (probe.rounds + 1)


def time_cycles(
    target: Target,
    drafter: Drafter,
    plan: TimingPlan,
    probe: Probe,
    advance: Callable[[int], None] = lambda count: None,
    forgo: Callable[[int], None] = lambda count: None,
) -> Costs:
    """Run every shape of the plan, interleaved; the first round is not timed.

    Args:
        target: decodes.
        drafter: drafts.
        plan: what to run.
        probe: the text and the number of rounds.
        advance: called with the number of runs that were done since.
        forgo: called with the number of runs for which no time is left.
    """
    follow = _no_draft(probe.batch_size)
    shapes = [*plan.shapes, follow]
    cycles, rounds = _race(target, drafter, shapes, probe, advance)
    forgo((probe.rounds - rounds) * len(shapes))
    timed = {shape: _median(costs) for shape, costs in cycles.items()}
    widths = sorted({width for width, _ in plan.draft})
    draft: dict[tuple[int, int], float] = {}
    for width in widths:
        sizes = sorted(size for size in plan.draft if size[0] == width)
        draft |= zip(sizes, rising([timed[plan.draft[size]].draft for size in sizes]), strict=True)
    nodes = sorted(plan.check)
    return Costs(
        plain=timed[None].cycle,
        wobble=statistics.median(map(_wobble, cycles.values())),
        whole=_rising_whole(plan.whole, timed),
        draft=draft,
        check=dict(zip(nodes, rising([timed[plan.check[count]].check for count in nodes]), strict=True)),
        follow=timed[None].cycle + timed[follow].draft,
        rider_depth=0
        if drafter.riders is None
        else max((limits.draft_length for limits in plan.check.values()), default=0),
        rounds=rounds,
    )


def _no_draft(num_rows: int) -> ShapesByRows:
    """No draft for so many rows, in an engine that would draft for more."""
    return ShapesByRows(((num_rows, None), (num_rows + 1, DraftLimits(draft_length=1))))


def rising(values: Sequence[float]) -> list[float]:
    """The nearest series that never falls: neighbours in the wrong order become their mean, again and again (isotonic regression).

    Example: 3, 5, 4, 6, 2 becomes 3, 4.25, 4.25, 4.25, 4.25.
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [statistics.fmean(block) for block in blocks for _ in block]


def _rising_whole(shapes: Sequence[DraftLimits], timed: Mapping[Timed, Cost]) -> dict[DraftLimits, Cost]:
    risen: dict[DraftLimits, Cost] = {}
    for family in (_chains(shapes), [limits for limits in shapes if limits.paths is not None]):
        series = sorted(family, key=lambda limits: limits.max_nodes)
        drafts = rising([timed[limits].draft for limits in series])
        checks = rising([timed[limits].check for limits in series])
        risen |= {limits: Cost(*both) for limits, *both in zip(series, drafts, checks, strict=True)}
    return risen


def _chains(shapes: Sequence[DraftLimits]) -> list[DraftLimits]:
    return [limits for limits in shapes if limits.paths is None]


def _is_dynamic(limits: DraftLimits) -> bool:
    return limits.node_budget is not None


def _race(
    target: Target,
    drafter: Drafter,
    shapes: Sequence[Timed],
    probe: Probe,
    advance: Callable[[int], None],
) -> tuple[dict[Timed, list[Cost]], int]:
    """The costs of single cycles, and how many rounds were timed. Each round runs every shape and begins with another one."""
    costs: dict[Timed, list[Cost]] = defaultdict(list)
    rounds, began = 0, time.perf_counter()
    for turn in range(-1, probe.rounds):
        started = time.perf_counter()
        for place in range(len(shapes)):
            shape = shapes[(place + turn) % len(shapes)]
            # a few tokens warm up as well as many
            run = probe if turn >= 0 else replace(probe, new_tokens=min(probe.new_tokens, WARM_UP_TOKENS))
            cycles = _run(target, None if shape is None else drafter, shape, run)
            if turn >= 0:
                costs[shape] += cycles
            advance(1)
        rounds, ended = turn + 1, time.perf_counter()
        if rounds and ended - began + ended - started > probe.most_seconds:
            break
    return costs, rounds


def _run(target: Target, drafter: Drafter | None, limits: Timed, probe: Probe) -> list[Cost]:
    """The cycles of one run but the first, in which some drafters read the prompt."""
    clock = CycleClock()
    settings = GenerationSettings(max_new_tokens=probe.new_tokens)
    Engine(target, drafter, limits, ledger=clock).generate([list(probe.prompt)] * probe.batch_size, settings)
    return clock.cycle_costs[1:] or clock.cycle_costs


def _wobble(costs: Sequence[Cost]) -> float:
    if len(costs) < 2:
        return 0.0
    low, middle, high = statistics.quantiles([cost.cycle for cost in costs], n=4, method="inclusive")
    return (high - low) / middle


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(cost.draft for cost in costs), statistics.median(cost.check for cost in costs))
