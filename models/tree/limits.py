"""How much and in which manner to draft in one cycle.

Owns the settings of the search and their rules. Knows no drafter and no search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Rule = Literal["mcsd", "kseq", "block"]


@dataclass(frozen=True)
class SampledChildren:
    """A tree whose nodes are drawn from the drafter's own distribution.

    Attributes:
        children: how many are drawn below each node, depth by depth; ``(1, 1, 1)`` is the classic chain of three.
        rule: ``mcsd`` draws without replacement and rejects candidate by candidate (arXiv:2401.06706, section 3.3); ``kseq`` draws
            independently and accepts by SpecTr's K-SEQ (arXiv:2310.15141, algorithm 2); ``block`` verifies a chain as a whole
            (arXiv:2403.10444, algorithm 2).

    Raises:
        ValueError: no children, a number of children below 1, an unknown rule, or ``block`` for more than a chain.
    """

    children: tuple[int, ...]
    rule: Rule = "mcsd"

    def __post_init__(self) -> None:
        if not self.children or min(self.children) < 1:
            raise ValueError(f"children is {self.children}; give one number of at least 1 for every depth")
        if self.rule not in ("mcsd", "kseq", "block"):
            raise ValueError(f"rule is {self.rule!r}; it must be mcsd, kseq or block")
        if self.rule == "block" and max(self.children) > 1:
            raise ValueError(
                f"children is {self.children}, and block verification is for chains; give 1 for every depth, or the rule mcsd or kseq"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes at each depth. Example: children (3, 2) give (3, 6)."""
        widths, width = [], 1
        for count in self.children:
            width *= count
            widths.append(width)
        return tuple(widths)


@dataclass(frozen=True)
class EarlyStop:
    """AdaEDL: stop drafting where the drafter's entropy says that the next token would hardly be accepted (arXiv:2410.18351).

    A node is continued only while ``1 - sqrt(scale * entropy)`` is at least the threshold. That number is a lower bound on the chance of
    acceptance. The decision comes before any continuation is drawn, and from the drafter alone, so the output does not change. After every
    cycle the threshold of a row moves by ``step`` towards the acceptance rate ``goal``.

    Attributes:
        threshold: where it starts, in [0, 1).
        scale: the paper's gamma, above 0.
        step: the paper's epsilon, in [0, 1).
        goal: the paper's alpha, the acceptance rate to reach, in [0, 1).
        rate_memory: the paper's beta_1, of the running acceptance rate, in [0, 1).
        threshold_memory: the paper's beta_2, of the running threshold, in [0, 1).

    Raises:
        ValueError: a number outside its range.
    """

    threshold: float = 0.5
    scale: float = 0.2
    step: float = 0.01
    goal: float = 0.9
    rate_memory: float = 0.5
    threshold_memory: float = 0.9

    def __post_init__(self) -> None:
        for name in ("threshold", "step", "goal", "rate_memory", "threshold_memory"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.scale <= 0.0:
            raise ValueError(f"scale is {self.scale}; it must be positive")


@dataclass(frozen=True)
class DraftLimits:
    """How much to draft in one cycle. Exactly one manner of drafting results:

    - beams (arXiv:2403.09919): the default; the nodes of the surviving beams are verified;
    - a dynamic tree (arXiv:2406.16858): with ``node_budget``, the best nodes among all continuations of the beams are verified;
    - a static tree (arXiv:2401.10774): with ``paths``;
    - a sampled tree: with ``sampled``.

    Attributes:
        beam_width: nodes continued in each layer of the draft.
        draft_length: drafted tokens below the root (Apple's ``beam_length`` counts the root too, so it is one more).
        node_budget: at most so many drafted nodes are verified, the best by cumulative probability.
        min_probability: nodes whose cumulative draft probability is below this are not verified.
        paths: a static tree: every node as the ranks that lead to it, ``(0, 2)`` is the third best continuation of the best one. Holds
            every prefix of every path; kept in order, by depth and rank. Sets ``draft_length``.
        sampled: a tree of sampled nodes; needs a temperature above 0. Sets ``draft_length``.
        early_stop: do not continue nodes of high entropy.
        merge: of a dynamic tree: nodes with as many last tokens in common share their continuations
            (:mod:`draftsmith.models.tree.merging`).
        likeliest: draft the likeliest tokens at every temperature. Otherwise, above 0, drafts are guesses of what the target will draw
            (:class:`~draftsmith.models.tree.noise.SharedNoise`).

    Raises:
        ValueError: a number is out of range, or two manners exclude each other. Also for a sampled tree that would be pruned by score:
            the rules of acceptance hold only for candidates that were really drawn.
    """

    beam_width: int = 1
    draft_length: int = 4
    node_budget: int | None = None
    min_probability: float = 0.0
    paths: tuple[tuple[int, ...], ...] | None = None
    sampled: SampledChildren | None = None
    early_stop: EarlyStop | None = None
    merge: int | None = None
    likeliest: bool = False

    def __post_init__(self) -> None:
        for name in ("beam_width", "draft_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.node_budget is not None and self.node_budget < 1:
            raise ValueError(f"node_budget is {self.node_budget}; it must be at least 1, or null for no budget")
        if not 0.0 <= self.min_probability < 1.0:
            raise ValueError(f"min_probability is {self.min_probability}; it must be in [0, 1)")
        if self.paths is not None and self.sampled is not None:
            raise ValueError("a tree is either static (paths) or sampled, not both; give one of them")
        if self.sampled is not None and (self.node_budget is not None or self.min_probability > 0.0):
            raise ValueError(
                "a sampled tree cannot be pruned by score (node_budget, min_probability): rejection is exact only for candidates that "
                "were drawn and all shown to it; leave the pruning out, or use beams or a dynamic tree"
            )
        if self.sampled is not None and self.likeliest:
            raise ValueError(
                "a sampled tree draws its tokens (sampled) and cannot hold the likeliest ones; leave one of them out"
            )
        if self.beam_width != 1 and (self.paths is not None or self.sampled is not None):
            raise ValueError(
                f"beam_width is {self.beam_width}, but a static or sampled tree has widths of its own; leave it out"
            )
        if self.paths is not None:
            if self.node_budget is not None:
                raise ValueError("a static tree (paths) has its own nodes; leave node_budget out")
            check_paths(self.paths)
            object.__setattr__(self, "paths", tuple(sorted(self.paths, key=lambda path: (len(path), path))))
            object.__setattr__(self, "draft_length", max(map(len, self.paths)))
        if self.merge is not None and (self.merge < 1 or self.node_budget is None or self.beam_width < 2):
            raise ValueError(
                f"merge is {self.merge} with beam_width {self.beam_width} and node_budget {self.node_budget}; it must be at least 1, and "
                "only trees of width 2 or more with a budget have branches to merge, such as 4x6n24m2"
            )
        if self.sampled is not None:
            object.__setattr__(self, "draft_length", len(self.sampled.children))

    @property
    def max_nodes(self) -> int:
        """The largest tree these limits allow, the root included."""
        if self.paths is not None:
            return 1 + len(self.paths)
        if self.sampled is not None:
            return 1 + sum(self.sampled.widths)
        drafted = self.beam_width * self.draft_length
        if self.node_budget is not None:
            drafted = self.beam_width + self.beam_width**2 * (self.draft_length - 1)
            drafted = min(drafted, self.node_budget)
        return 1 + drafted

    @property
    def is_chain(self) -> bool:
        """Whether every draft is one branch."""
        return self.beam_width == 1 and self.max_nodes <= self.draft_length + 1

    @cached_property
    def max_fed(self) -> int:
        """The most drafted nodes that the drafter itself is fed in one cycle, the root not counted."""
        if self.paths is not None:
            return len({path[:-1] for path in self.paths if len(path) > 1})
        if self.sampled is not None:
            return sum(self.sampled.widths[:-1])
        return self.beam_width * (self.draft_length - 1)

    def no_deeper_than(self, depth: int) -> DraftLimits:
        """Cut the draft at a depth, and keep its manner. Deeper paths and children are dropped.

        Example: paths (0,), (1,), (0, 0) cut at 1 are (0,), (1,).

        Args:
            depth: drafted tokens below the root, at least 1.

        Returns:
            The limits with a ``draft_length`` of at most ``depth``.
        """
        if self.draft_length <= depth:
            return self
        if self.paths is not None:
            return replace(self, paths=tuple(path for path in self.paths if len(path) <= depth))
        if self.sampled is not None:
            return replace(self, sampled=replace(self.sampled, children=self.sampled.children[:depth]))
        return replace(self, draft_length=depth)


def check_paths(paths: tuple[tuple[int, ...], ...]) -> None:
    """Check that paths are a static tree.

    Args:
        paths: every node as the ranks that lead to it, each at least 0.

    Raises:
        ValueError: no paths, a negative rank, a path twice, or one whose prefix is not among them.
    """
    known = set(paths)
    if not paths or len(known) < len(paths):
        raise ValueError("a static tree needs at least one path, and each path once")
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"path {path} of the static tree is not a list of ranks from 0 on")
        if len(path) > 1 and path[:-1] not in known:
            raise ValueError(
                f"path {path} of the static tree hangs in the air: its prefix {path[:-1]} is not among the paths"
            )
