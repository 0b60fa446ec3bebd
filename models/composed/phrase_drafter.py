"""Phrases behind a draft: each of its best leaves is followed by what came behind the same tokens before.

They come from the row's own text, as in Lookahead's pool (arXiv:2402.02057), and from what the target said behind rejected tokens
(Ouroboros, arXiv:2402.13720). Verification computed both already. With a head, it drafts first and phrases hang on its leaves. Without
one, they hang on the root. A row's phrases come from that row alone, never from another request, and from a shared pool where the config
names one.

Owns the config, the state and the drafter. Knows no verification.

Shape legend: B batch rows, M leaves, P places, L tokens of a phrase, N tree nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.composed.composed_drafter import ComposedState
from draftsmith.models.composed.phrases import PhraseRing, best_leaves, rejected_phrases, tails_of
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter, TextState
from draftsmith.models.composed.suffixes import GAP, behind_pool, continuations_behind
from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.files.field_rules import COUNT, Rule, is_number
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.tree import DraftTree, joined, prune, root_tree, tree_from_paths

_CHANCE: Rule = (lambda value: is_number(value) and 0 < value <= 1, "a number above 0, at most 1")


class PhraseConfig(SuffixConfig):
    """Which phrases follow a draft; the fields of :class:`SuffixConfig` say what is compared.

    Attributes:
        phrase_length: L, tokens of a phrase behind a leaf; with a head, it drafts so much less than the shape's length.
        num_leaves: how many leaves of a tree are continued, the best ones.
        pool_size: tokens of rejected phrases that a row keeps.
        token_chance: each token of a phrase counts as this likely, times the share of places that it followed.
    """

    model_type = "draftsmith_phrases"
    rules: ClassVar[Mapping[str, Rule]] = {
        **SuffixConfig.rules,
        "phrase_length": COUNT,
        "num_leaves": COUNT,
        "pool_size": COUNT,
        "token_chance": _CHANCE,
    }

    def __init__(
        self,
        longest_match: int = 4,
        shortest_match: int = 1,
        num_places: int = 8,
        tokens_per_match: float = 4.0,
        phrase_length: int = 6,
        num_leaves: int = 4,
        pool_size: int = 1024,
        token_chance: float = 0.6,
        **kwargs: Any,
    ) -> None:
        self.phrase_length = phrase_length
        self.num_leaves = num_leaves
        self.pool_size = pool_size
        self.token_chance = token_chance
        super().__init__(longest_match, shortest_match, num_places, tokens_per_match, **kwargs)


@dataclass(frozen=True)
class PhraseState:
    """What is kept between cycles: the text, and phrases of rejected tokens."""

    text: TextState
    ring: PhraseRing

    def select_rows(self, kept: KeptRows) -> PhraseState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return PhraseState(self.text.select_rows(kept), self.ring.select_rows(kept))


class PhraseDrafter(SuffixDrafter):
    """A head whose leaves phrases follow; without a head, phrases alone. It is made as a :class:`SuffixDrafter` is."""

    config: PhraseConfig
    config_class = PhraseConfig

    @property
    def reads_choices(self) -> bool:
        """See :attr:`Drafter.reads_choices`."""
        return True

    def check_depth(self, limits: DraftLimits) -> None:
        """See :meth:`Drafter.check_depth`.

        Raises:
            ValueError: also for a manner of drafting that needs a distribution at each node, and for a draft that leaves the head no token.
        """
        self._check_manner(limits)
        if self.head is None:
            return
        if limits.draft_length <= self.config.phrase_length:
            raise ValueError(
                f"a draft of {limits.draft_length} tokens is asked for, of which phrases are {self.config.phrase_length}, so that head "
                f"{self.config.head!r} drafts none; draft deeper, or make phrase_length smaller"
            )
        self.head.check_depth(self.limits_of_parts(limits))

    def start_own(self, opening: Opening) -> PhraseState:  # type: ignore[override]
        """Keep the prompts; no phrase was rejected yet."""
        text = super().start_own(opening)
        return PhraseState(text, PhraseRing.empty(len(text.text_BT), self.config.pool_size, text.text_BT.device))

    def advance_own(self, own: PhraseState, emitted: Emitted) -> PhraseState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return replace(own, text=super().advance_own(own.text, emitted))

    def follow_own(self, own: PhraseState, cycle: Cycle, limits: DraftLimits) -> PhraseState:  # type: ignore[override]
        """The pending tokens become text."""
        return replace(own, text=super().follow_own(own.text, cycle, limits))

    def take_choices(self, state: ComposedState, tree: DraftTree, choices_BN: Tensor) -> ComposedState:  # type: ignore[override]
        """See :meth:`Drafter.take_choices`: what the target said behind rejected tokens is kept."""
        state = super().take_choices(state, tree, choices_BN)
        if tree.num_nodes < 3:  # no token was rejected and continued
            return state
        phrases_BNS = rejected_phrases(tree, choices_BN, self.config.phrase_length + 1)
        return replace(state, own=replace(state.own, ring=state.own.ring.with_phrases(phrases_BNS)))

    def propose(self, state: ComposedState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """See :meth:`Drafter.propose`.

        Raises:
            ValueError: as :meth:`SuffixDrafter.propose`.
        """
        root_B, text_BT = self._begun(state.own.text, cycle, limits)
        cut = False if cycle.fixed_shapes else None
        if self.head is None or state.head is None:
            tree = replace(root_tree(root_B), scores_BN=torch.zeros(len(root_B), 1, device=root_B.device), chain=False)
            length = limits.draft_length
        else:
            tree = self.head.propose(state.head, cycle, self.limits_of_parts(limits))
            length = self.config.phrase_length
        most = 1 if limits.is_chain else self.config.num_leaves
        leaf_BM, score_BM = best_leaves(tree, min(most, tree.num_nodes))
        at_BP, paths_BPL, scores_BPL = self._phrases(state.own.ring, text_BT, cycle, tree, leaf_BM, length)
        scores_BPL = scores_BPL + score_BM.repeat_interleave(at_BP.shape[1] // leaf_BM.shape[1], dim=1)[..., None]
        if limits.min_probability > 0.0:
            scores_BPL = scores_BPL.masked_fill(scores_BPL < math.log(limits.min_probability), -torch.inf)
        if limits.is_chain:
            return _longer_chain(tree, leaf_BM[:, 0], paths_BPL, scores_BPL, limits.draft_length, cut)
        return prune(joined(tree, paths_BPL, scores_BPL, at_BP), limits.max_nodes - 1, cut)

    def _phrases(
        self, ring: PhraseRing, text_BT: Tensor, cycle: Cycle, tree: DraftTree, leaf_BM: Tensor, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Phrases behind leaves: int64 [B, M P], the leaf of each; int64 [B, M P, L]; float [B, M P, L], below the leaf's own score."""
        B, M = leaf_BM.shape
        known_BT = counting(text_BT.shape[1], text_BT.device) <= cycle.lengths_B[:, None]
        # What is later counts more among equal matches, so the text is behind the ring, and the ring behind the pool.
        own_BT = torch.cat([F.pad(ring.tokens_BR, (0, 1), value=GAP), torch.where(known_BT, text_BT, GAP)], dim=1)
        stream_BT = behind_pool(own_BT, self.pool_T)
        tails_BMW = tails_of(tree, leaf_BM, text_BT, cycle.lengths_B, self.config.longest_match)
        streams_XT = stream_BT[:, None].expand(-1, M, -1).flatten(0, 1)
        paths_XPL, shares_XPL = continuations_behind(streams_XT, tails_BMW.flatten(0, 1), length, self.config.rule)
        num_places = paths_XPL.shape[1]
        discount_L = (counting(length, text_BT.device) + 1) * math.log(self.config.token_chance)
        shapes = (B, M * num_places, length)
        return (
            leaf_BM.repeat_interleave(num_places, dim=1),
            paths_XPL.reshape(shapes),
            (shares_XPL + discount_L).reshape(shapes),
        )

    def limits_of_parts(self, limits: DraftLimits) -> DraftLimits:
        """See :meth:`Drafter.limits_of_parts`: the head drafts no deeper than it can, and so that a phrase still follows."""
        return super().limits_of_parts(limits.no_deeper_than(limits.draft_length - self.config.phrase_length))


def _longer_chain(
    chain: DraftTree, leaf_B: Tensor, paths_BPL: Tensor, scores_BPL: Tensor, length: int, cut: bool | None
) -> DraftTree:
    """A chain with the best of some paths behind its last node."""
    assert chain.scores_BN is not None
    best_B11 = scores_BPL.exp().sum(-1).argmax(1)[:, None, None]
    path_BL, score_BL = (
        part.gather(1, best_B11.expand(-1, 1, part.shape[-1])).squeeze(1) for part in (paths_BPL, scores_BPL)
    )
    more = (0, length + 1 - chain.num_nodes)
    tokens_BN = F.pad(chain.tokens_BN, more)
    scores_BN = F.pad(chain.scores_BN.masked_fill(~chain.valid_BN, -torch.inf), more, value=-torch.inf)
    slot_BL = leaf_B[:, None] + 1 + counting(path_BL.shape[1], path_BL.device)
    tokens_BN = tokens_BN.scatter(1, slot_BL, path_BL)
    scores_BN = scores_BN.scatter(1, slot_BL, score_BL)
    return tree_from_paths(tokens_BN[:, 0], tokens_BN[:, None, 1:], scores_BN[:, None, 1:], cut)
