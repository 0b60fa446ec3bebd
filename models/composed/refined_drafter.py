"""Drafts of a head, scored again by a language model of the same vocabulary (arXiv:2404.09221, section 5).

Owns the config, the join of head and second opinion, and what is kept of both. The head's likeliest tokens at each node stay. An n-gram
table or a small LM then shifts their scores, node by node, or a table those of whole paths. Any search runs over the result, and
verification is as exact as without it. Knows no family.

Shape legend: B batch rows, M nodes continued at once, C candidates of a node or slot, L slots, P paths.
V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from draftsmith.models.composed.composed_drafter import ComposedConfig, ComposedDrafter, ComposedState, MadeOfReplies
from draftsmith.models.composed.revisers import LMReviser, NgramReviser, Opinion, Reviser, TailState
from draftsmith.models.composed.suffix_drafter import SuffixDrafter
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.parallel_draft import NARROW
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, TEXT, Rule
from draftsmith.models.ngrams.lattice import best_paths
from draftsmith.models.ngrams.table import load_ngrams
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.noise import SharedNoise
from draftsmith.models.tree.search import ConfidentExpander, Expander
from draftsmith.models.tree.shortlist import Shortlist, ShortlistExpander, every_target_id
from draftsmith.models.tree.tree import DraftTree, prune, tree_from_paths

_MOST_STATES = 4096


class RefinedConfig(ComposedConfig):
    """Which head is refined, and by what.

    Attributes:
        head: folder of a trained drafter, relative to the config's own.
        ngrams: folder of an n-gram table; empty where an LM refines.
        lm: folder or name of a causal LM with the target's tokenizer; empty where a table refines.
        alpha: weight of the second opinion; 0 only limits the candidates.
        num_candidates: how many of the head's tokens at a node are scored again; the others are not proposed.
        num_paths: P, the best paths through all slots are drafted, which only a head whose steps read no drafted token allows; 0
            rescores node by node.
    """

    model_type = "draftsmith_refined"
    rules: ClassVar[Mapping[str, Rule]] = {
        **ComposedConfig.rules,
        "ngrams": TEXT,
        "lm": TEXT,
        "alpha": NOT_NEGATIVE,
        "num_candidates": COUNT,
        "num_paths": COUNT_OR_ZERO,
    }

    def __init__(
        self,
        ngrams: str = "",
        lm: str = "",
        alpha: float = 0.2,
        num_candidates: int = 16,
        num_paths: int = 0,
        **kwargs: Any,
    ) -> None:
        self.ngrams = ngrams
        self.lm = lm
        self.alpha = alpha
        self.num_candidates = num_candidates
        self.num_paths = num_paths
        super().__init__(**kwargs)

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if not self.head:
            return "no head; name the folder of a trained drafter"
        if bool(self.ngrams) == bool(self.lm):
            return f"ngrams {self.ngrams!r} and lm {self.lm!r}; name exactly one of the two"
        if self.num_paths and self.lm:
            return f"num_paths {self.num_paths} with an LM; only an n-gram table rescores whole paths, so name one or leave num_paths out"
        return ""


class RefinedDrafter(ComposedDrafter):
    """A head whose candidates are scored again.

    Args:
        config: weight and number of candidates.
        head: proposes.
        reviser: scores again.

    Raises:
        ValueError: a field of the config breaks its rule.
    """

    config: RefinedConfig
    config_class = RefinedConfig
    head: Drafter
    untrained = "a refined drafter is not trained; train its head, and make its table with `draftsmith data ngrams`"

    def __init__(self, config: RefinedConfig, head: Drafter, reviser: NgramReviser | LMReviser) -> None:
        super().__init__(config, head)
        self.reviser = reviser
        if config.num_paths:
            self._check_lattice()

    def _check_lattice(self) -> None:
        if self.head.reads_drafted:
            raise ValueError(
                f"num_paths is {self.config.num_paths}, and the steps of head {self.config.head!r} read the tokens drafted before them; "
                "name a head whose steps read the text alone, or leave num_paths out"
            )
        assert isinstance(self.reviser, NgramReviser)
        order, count = self.reviser.table.order, self.config.num_candidates
        if count ** (order - 1) > _MOST_STATES:
            raise ValueError(
                f"{count} candidates and {order}-grams make {count ** (order - 1)} states of a path, more than {_MOST_STATES}; set "
                "num_candidates lower, or make a table of a lower order"
            )

    @classmethod
    def composed(
        cls, config: RefinedConfig, head: Drafter | None, folder: Path, load: Callable[[str], Drafter]
    ) -> Self:
        """See :meth:`ComposedDrafter.composed`.

        Raises:
            ValueError: a head that scores no single node, or an LM that is none.
        """
        assert head is not None  # the config has none without
        if isinstance(head, SuffixDrafter):
            raise ValueError(
                f"{folder / 'config.json'} has head {config.head!r}, which proposes whole continuations and scores no single node; refine "
                "its head, and name the refined drafter as the head of suffixes or phrases"
            )
        if config.ngrams:
            table = folder / config.ngrams
            return cls(config, head, NgramReviser(load_ngrams(table if table.is_dir() else Path(config.ngrams))))
        lm = load(config.lm)
        if not isinstance(lm, LMDrafter):
            raise ValueError(f"{folder / 'config.json'} has lm {config.lm!r}, which is no causal LM; name one")
        return cls(config, head, LMReviser(lm))

    @property
    def _second(self) -> Reviser:
        """The reviser, whichever it is: what it keeps is its own affair."""
        return self.reviser

    @property
    def num_draft_tokens(self) -> int:
        """The head's."""
        return self.head.num_draft_tokens

    @property
    def max_draft_steps(self) -> int | None:
        """The head's."""
        return self.head.max_draft_steps

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """The head, and the LM where that rescores."""
        return (self.head, self.reviser.lm) if isinstance(self.reviser, LMReviser) else (self.head,)

    @property
    def made_of_replies(self) -> MadeOfReplies | None:
        """The n-gram table, where one rescores."""
        if isinstance(self.reviser, LMReviser):
            return None
        table = self.reviser.table
        return MadeOfReplies(
            "table", f"n-gram table {self.config.ngrams!r}", table.vocab_size, table.tokenizer_fingerprint
        )

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`ComposedDrafter.attach`; an LM that rescores is attached too."""
        super().attach(ends)
        if isinstance(self.reviser, LMReviser):
            self.reviser = LMReviser(self.reviser.lm.bound(ends))
        return self

    def score_scale(self, temperature: float) -> float:
        """The head's."""
        return self.head.score_scale(temperature)

    def with_alpha(self, alpha: float) -> RefinedDrafter:
        """The same head and second opinion with another weight.

        Args:
            alpha: the weight.

        Returns:
            A drafter that shares all weights with this one.

        Raises:
            ValueError: a weight below 0.
        """
        fields = {name: getattr(self.config, name) for name in RefinedConfig.rules} | {"alpha": alpha}
        other = RefinedDrafter(RefinedConfig(**fields), self.head, self.reviser)
        other._borrowed[:] = self._borrowed
        return other.eval()

    def start_own(self, opening: Opening) -> DraftState:
        """Begin with the reviser."""
        return self._second.start(opening)

    def advance_own(self, own: DraftState, emitted: Emitted) -> DraftState:
        """The reviser takes in what was emitted."""
        return self._second.advance(own, emitted)

    def follow_own(self, own: DraftState, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """The reviser follows."""
        return self._second.follow(own, cycle, limits)

    def check_depth(self, limits: DraftLimits) -> None:
        """See :meth:`Drafter.check_depth`.

        Raises:
            ValueError: also for a manner of drafting that takes no whole paths, where the best ones are drafted.
        """
        self.head.check_depth(limits)
        manners = (limits.paths, limits.sampled, limits.early_stop, limits.merge)
        if self.config.num_paths and (any(manner is not None for manner in manners) or limits.min_probability):
            raise ValueError(
                "the best whole paths are a chain such as 1x4 or a tree such as 4x4n16; for other shapes leave num_paths out"
            )

    def propose(self, state: ComposedState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """See :meth:`Drafter.propose`: with ``num_paths``, the tree of the best paths through all slots.

        Raises:
            ValueError: as there, and where ``num_paths`` meets a rule of verification that compares distributions.
        """
        if not self.config.num_paths:
            return super().propose(state, cycle, limits)
        self.check_depth(limits)
        if cycle.keep_probs:
            raise ValueError(
                "the rule compares the distributions of draft and target, and best paths have none; give another rule"
            )
        assert isinstance(self.reviser, NgramReviser)
        assert isinstance(state.own, TailState)
        assert state.head is not None
        head, table = self.head.expander(state.head, cycle, limits), self.reviser.table
        ids_BLC, scores_BLC = _slots(head, limits.draft_length, self.config.num_candidates, cycle.noise)
        contexts_B = table.context_of(state.own.tokens_BK)
        num_paths = 1 if limits.is_chain else self.config.num_paths
        paths_BPL, scores_BPL = best_paths(table, contexts_B, ids_BLC, scores_BLC, float(self.config.alpha), num_paths)
        cut = False if cycle.fixed_shapes else None
        tree = tree_from_paths(head.root_B, paths_BPL, scores_BPL, cut)
        return tree if limits.is_chain else prune(tree, limits.max_nodes - 1, cut)

    def expander(self, state: ComposedState, cycle: Cycle, limits: DraftLimits) -> RefinedDraft:  # type: ignore[override]
        """See :class:`RefinedDraft`."""
        assert state.head is not None
        return RefinedDraft(
            self.head.expander(state.head, cycle, limits),
            self._second.opinion(state.own, cycle, limits),
            float(self.config.alpha),
            self.config.num_candidates,
        )


def _slots(head: Expander, length: int, num_candidates: int, noise: SharedNoise | None) -> tuple[Tensor, Tensor]:
    """The likeliest target tokens of each slot of a head that reads no drafted token: int64 [B, L, C], float32 [B, L, C]."""
    logits = [head.begin()]
    while len(logits) < length:
        logits.append(head.extend(head.target_ids(logits[-1].argmax(-1)), torch.zeros_like(head.root_B)[:, None]))
    logits_BLV = torch.cat(logits, dim=1).float()
    if noise is not None:
        logits_BLV = noise.onto(logits_BLV, 0, every_target_id(head, logits_BLV), each=True)
    log_probs_BLV = logits_BLV.log_softmax(-1)
    scores_BLC, draft_BLC = log_probs_BLV.topk(min(num_candidates, log_probs_BLV.shape[-1]), dim=-1)
    return head.target_ids(draft_BLC), scores_BLC


class RefinedDraft:
    """One draft: the head's candidates at each node, with ``log p + alpha log q`` as their logits (equation 3).

    Args:
        head: the head's own expander.
        opinion: q.
        alpha: its weight.
        num_candidates: C; all other tokens get minus infinity.
    """

    def __init__(self, head: Expander, opinion: Opinion, alpha: float, num_candidates: int) -> None:
        self._head, self._opinion, self._alpha, self._count = head, opinion, alpha, num_candidates
        self._shortlist: Shortlist | None = None
        self._noise: SharedNoise | None = None
        self._slot = 0

    @property
    def root_B(self) -> Tensor:
        """See :class:`Expander`."""
        return self._head.root_B

    def begin(self) -> Tensor:
        """See :class:`Expander`."""
        self._opinion.begin()
        return self._rescored(self._head.begin())

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`."""
        self._opinion.extend(tokens_BM, above_BM)
        return self._rescored(self._head.extend(tokens_BM, above_BM))

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """See :class:`Expander`."""
        return self._head.target_ids(draft_ids)

    def acceptance(self) -> Tensor | None:
        """See :class:`ConfidentExpander`: the head's own chances. They depend on nothing behind a node, so drafts may end by them."""
        return self._head.acceptance() if isinstance(self._head, ConfidentExpander) else None

    def shortlist(self, count: int, scale: float, noise: SharedNoise | None) -> Shortlist | None:
        """See :class:`ShortlistExpander`: where the head has one, in drafts so wide that the whole vocabulary costs more.

        Noise is added to the scores after the second opinion, and so never chooses the candidates.
        """
        if count <= NARROW or not isinstance(self._head, ShortlistExpander):
            return None
        self._noise = noise
        self._shortlist = self._head.shortlist(max(count, self._count), 1.0, None)
        if self._shortlist is None:
            return None
        log_probs_BSC = self._shortlist.log_probs_BSC
        kept_BSC = log_probs_BSC[..., : self._count].log_softmax(-1)
        return replace(
            self._shortlist,
            log_probs_BSC=log_probs_BSC * scale,
            tail_BS=torch.full_like(self._shortlist.tail_BS, -torch.inf),
            entropy_BS=torch.special.entr(kept_BSC.exp()).sum(-1),
        )

    def rescore(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`ShortlistExpander`: minus infinity for all but the head's likeliest candidates behind each node."""
        assert self._shortlist is not None
        assert isinstance(self._head, ShortlistExpander)
        if self._slot == 0:
            self._opinion.begin()
        else:
            self._opinion.extend(tokens_BM, above_BM)
        shape = (-1, tokens_BM.shape[1], -1)
        score_BMC = self._shortlist.log_probs_BSC[:, self._slot, None].expand(shape)
        draft_BMC = self._shortlist.draft_BSC[:, self._slot, None].expand(shape)
        added_BMC = self._head.rescore(tokens_BM, above_BM)
        added_BMC = torch.zeros_like(score_BMC) if added_BMC is None else added_BMC.float()
        kept_BMC = (score_BMC + added_BMC).topk(min(self._count, score_BMC.shape[-1]), dim=-1).indices
        ids_BMC = self._head.target_ids(draft_BMC.gather(-1, kept_BMC))
        shifted_BMC = added_BMC.gather(-1, kept_BMC) + self._alpha * self._opinion.log_probs(ids_BMC)
        if self._noise is not None:
            before_BMC = score_BMC.gather(-1, kept_BMC)
            noisy_BMC = self._noise.onto(before_BMC + shifted_BMC, self._slot, ids_BMC)
            shifted_BMC = (noisy_BMC - before_BMC).masked_fill(before_BMC == -torch.inf, -torch.inf)
        self._slot += 1
        return torch.full_like(added_BMC, -torch.inf).scatter(-1, kept_BMC, shifted_BMC)

    def _rescored(self, logits_BMV: Tensor) -> Tensor:
        count = min(self._count, logits_BMV.shape[-1])
        score_BMC, draft_BMC = logits_BMV.float().log_softmax(-1).topk(count, dim=-1)
        score_BMC = score_BMC + self._alpha * self._opinion.log_probs(self._head.target_ids(draft_BMC))
        return torch.full_like(logits_BMV, -torch.inf, dtype=torch.float32).scatter(-1, draft_BMC, score_BMC)
