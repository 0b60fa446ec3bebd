"""A drafter without weights: it proposes what followed earlier places of the same text (suffix decoding, arXiv:2411.04975).

Owns its config, the text that it keeps of each row, and drafts of it alone or together with a head's. A row's drafts come from that row's
own prompt and reply, never from another request. Where the config names a shared pool, they come from that too. Knows no verification.

Shape legend: B batch rows, E fresh tokens, T text slots, P places, L drafted tokens, N tree nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.composed.composed_drafter import ComposedConfig, ComposedDrafter, ComposedState, MadeOfReplies
from draftsmith.models.composed.shared_pool import SharedPool, load_pool
from draftsmith.models.composed.suffixes import SuffixRule, continuations
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_NULL, POSITIVE, TEXT, Rule, is_number
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander
from draftsmith.models.tree.tree import DraftTree, joined, prune, tree_from_paths

_LOG = logging.getLogger(__name__)
_SHARE: Rule = (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


class SuffixConfig(ComposedConfig):
    """What of a text's past is proposed; see :class:`~draftsmith.models.composed.suffixes.SuffixRule`.

    Attributes:
        longest_match: tokens that are compared.
        shortest_match: how many of them must agree.
        num_places: how many places of the text count.
        tokens_per_match: drafted tokens for each token that agrees.
        least_probability: rarer continuations are left out.
        shared_pool: folder of a pool of earlier replies that every request is drafted from as well, relative to the config's own; empty
            for none, so that requests share nothing.
        head: folder of a drafter whose drafts are joined with these, relative to the config's own; empty for none.
        head_steps: the head drafts no deeper than this, and the text as deep as the shape; None for as deep as the head can.
    """

    model_type = "draftsmith_suffix"
    rules: ClassVar[Mapping[str, Rule]] = {
        **ComposedConfig.rules,
        "longest_match": COUNT,
        "shortest_match": COUNT,
        "num_places": COUNT,
        "tokens_per_match": POSITIVE,
        "least_probability": _SHARE,
        "shared_pool": TEXT,
        "head_steps": COUNT_OR_NULL,
    }

    def __init__(
        self,
        longest_match: int = 24,
        shortest_match: int = 1,
        num_places: int = 16,
        tokens_per_match: float = 2.0,
        least_probability: float = 0.1,
        shared_pool: str = "",
        head_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.longest_match = longest_match
        self.shortest_match = shortest_match
        self.num_places = num_places
        self.tokens_per_match = tokens_per_match
        self.least_probability = least_probability
        self.shared_pool = shared_pool
        self.head_steps = head_steps
        super().__init__(**kwargs)

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if self.shortest_match > self.longest_match:
            return f"shortest_match {self.shortest_match}, which is above longest_match {self.longest_match}"
        return ""

    @property
    def rule(self) -> SuffixRule:
        """The same, as the search takes it."""
        return SuffixRule(
            self.longest_match,
            self.shortest_match,
            self.num_places,
            float(self.tokens_per_match),
            float(self.least_probability),
        )


@dataclass(frozen=True)
class TextState:
    """The text of each row.

    Attributes:
        text_BT: int64, whose last slot takes what is behind a row's end.
        pending: tokens emitted since the last draft, which belong at the text's end; the last one is the root.
    """

    text_BT: Tensor
    pending: Emitted

    def select_rows(self, kept: KeptRows) -> TextState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return TextState(self.text_BT[kept.index], self.pending.select_rows(kept.index))


class SuffixDrafter(ComposedDrafter):
    """Proposes continuations that a row's own text has had before, for any target and tokenizer; with a head, its drafts too.

    Args:
        config: what is compared and kept.
        head: a drafter whose tree is joined with the continuations; None for these alone.
        pool: what every request is drafted from beside its own text; None for nothing. A warning says what a pool shows.

    Raises:
        ValueError: a field of the config breaks its rule, or it limits a head and there is none.
    """

    config: SuffixConfig
    config_class: type[SuffixConfig] = SuffixConfig
    untrained = "a drafter without weights is not trained; name it to decode, evaluate or tune"

    pool_T: Tensor | None

    def __init__(self, config: SuffixConfig, head: Drafter | None = None, pool: SharedPool | None = None) -> None:
        super().__init__(config, head)
        if head is None and config.head_steps is not None:
            raise ValueError(
                f"head_steps is {config.head_steps}, and there is no head that drafts; name one in head, or leave head_steps out"
            )
        self.pool = pool
        self.register_buffer("pool_T", None if pool is None else pool.tokens_T, persistent=False)
        if pool is not None:
            _LOG.warning(
                "every request is drafted from the shared pool %r (%d tokens of earlier replies) as well: drafts, and so the time that a "
                "reply takes, show one user's text to another. Replies themselves stay the target's own, token for token",
                config.shared_pool,
                pool.num_tokens,
            )

    @classmethod
    def composed(cls, config: SuffixConfig, head: Drafter | None, folder: Path, load: Callable[[str], Drafter]) -> Self:
        """See :meth:`ComposedDrafter.composed`.

        Raises:
            ValueError: the head reads the text as well, or the folder of the shared pool holds none.
        """
        if isinstance(head, SuffixDrafter):
            raise ValueError(
                f"{folder / 'config.json'} has head {config.head!r}, which reads the text as well; name another drafter"
            )
        if not config.shared_pool:
            return cls(config, head)
        pool = folder / config.shared_pool
        return cls(config, head, load_pool(pool if pool.is_dir() else Path(config.shared_pool)))

    @property
    def num_draft_tokens(self) -> int:
        """All of the target's."""
        return self.ends.vocab_size

    @property
    def made_of_replies(self) -> MadeOfReplies | None:
        """The shared pool, where there is one."""
        if self.pool is None:
            return None
        called = f"shared pool {self.config.shared_pool!r}"
        return MadeOfReplies("pool", called, self.pool.vocab_size, self.pool.tokenizer_fingerprint)

    def check_depth(self, limits: DraftLimits) -> None:
        """See :meth:`Drafter.check_depth`.

        Raises:
            ValueError: also for a manner of drafting that needs a distribution at each node, for merged nodes without a head, and for a
                chain where there is a head.
        """
        self._check_manner(limits)
        if self.head is not None:
            if limits.is_chain:
                raise ValueError(
                    f"the drafts of text and head {self.config.head!r} together are a tree; give a shape such as 10x5n24, no chain"
                )
            self.head.check_depth(self.limits_of_parts(limits))

    def limits_of_parts(self, limits: DraftLimits) -> DraftLimits:
        """See :meth:`Drafter.limits_of_parts`: the head is no deeper than it can and should be, the text may be deeper."""
        most = [self.config.head_steps, None if self.head is None else self.head.max_draft_steps]
        return limits.no_deeper_than(min([limits.draft_length, *(steps for steps in most if steps is not None)]))

    def _check_manner(self, limits: DraftLimits) -> None:
        if limits.paths is not None or limits.sampled is not None or limits.early_stop is not None:
            raise ValueError(
                "a drafter without a model has no distribution at its nodes, which static and sampled trees and the early stop need; give "
                "a chain such as 1x16 or a tree such as 4x16n24"
            )
        if limits.merge is not None and self.head is None:
            raise ValueError(
                f"merge is {limits.merge}, and a drafter without a head has no nodes whose continuations could be shared; leave "
                f"m{limits.merge} out of the shape"
            )

    def score_scale(self, temperature: float) -> float:
        """See :meth:`Drafter.score_scale`: shares of places are compared as they are."""
        return 1.0

    def start_own(self, opening: Opening) -> TextState:
        """Keep the prompts."""
        prompt = opening.prompt
        text_BT = torch.cat([opening.first_B[:, None], prompt.tokens_BE], dim=1)
        slots = max(opening.room + 1, text_BT.shape[1]) + 1
        return TextState(F.pad(text_BT, (0, slots - text_BT.shape[1])), prompt.last_only(opening.num_pending))

    def advance_own(self, own: TextState, emitted: Emitted) -> TextState:
        """What was emitted is pending until the next draft."""
        return TextState(own.text_BT, emitted)

    def follow_own(self, own: TextState, cycle: Cycle, limits: DraftLimits) -> TextState:
        """The pending tokens become text."""
        _write_pending(own, cycle)
        return own

    def expander(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
        """Not for this drafter, which proposes whole continuations.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a drafter without a model scores no single node, which this command needs; compare its shapes with `draftsmith evaluate`"
        )

    def propose(self, state: ComposedState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """See :meth:`Drafter.propose`.

        Raises:
            ValueError: a shape that needs distributions (see :meth:`check_depth`), or a rule of verification that does.
        """
        root_B, text_BT = self._begun(state.own, cycle, limits)
        paths_BPL, scores_BPL = continuations(
            text_BT, cycle.lengths_B + 1, limits.draft_length, self.config.rule, self.pool_T
        )
        cut = False if cycle.fixed_shapes else None
        if limits.is_chain:
            paths_BPL, scores_BPL = _best_path(paths_BPL, scores_BPL)
        if limits.min_probability > 0.0:
            scores_BPL = torch.where(scores_BPL.exp() >= limits.min_probability, scores_BPL, -torch.inf)
        if self.head is None or state.head is None:
            tree = tree_from_paths(root_B, paths_BPL, scores_BPL, cut)
        else:
            tree = joined(self.head.propose(state.head, cycle, self.limits_of_parts(limits)), paths_BPL, scores_BPL)
        return tree if limits.is_chain else prune(tree, limits.max_nodes - 1, cut)

    def _begun(self, own: TextState, cycle: Cycle, limits: DraftLimits) -> tuple[Tensor, Tensor]:
        """Check a draft and write the pending tokens: int64 [B], the roots; int64 [B, T], the part of the text that rows can have.

        Raises:
            ValueError: see :meth:`propose`.
        """
        self.check_depth(limits)
        if cycle.keep_probs:
            raise ValueError(
                "the rule compares the distributions of draft and target, and a drafter without a model has none; give another rule"
            )
        _write_pending(own, cycle)
        visible = own.text_BT.shape[1] - 1 if cycle.fixed_shapes else max(cycle.host_lengths) + 1
        return own.pending.root_B, own.text_BT[:, :visible]


def _write_pending(state: TextState, cycle: Cycle) -> None:
    """Write pending tokens to the end of each text, the root behind what the target has cached."""
    step_E = counting(state.pending.tokens_BE.shape[1], state.text_BT.device)
    counts_B1 = state.pending.counts_B[:, None]
    slot_BE = cycle.lengths_B[:, None] + 1 - counts_B1 + step_E
    slot_BE = torch.where(step_E < counts_B1, slot_BE, state.text_BT.shape[1] - 1)
    state.text_BT.scatter_(1, slot_BE, state.pending.tokens_BE)


def _best_path(paths_BPL: Tensor, scores_BPL: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, L] each: the path whose prefixes have the largest sum of shares."""
    best_B = scores_BPL.exp().sum(-1).argmax(1)
    index_B1L = best_B[:, None, None].expand(-1, 1, paths_BPL.shape[-1])
    return paths_BPL.gather(1, index_B1L), scores_BPL.gather(1, index_B1L)
