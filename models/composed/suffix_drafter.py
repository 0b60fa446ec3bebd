"""A drafter without weights: it proposes what followed earlier places of the same text (suffix decoding, arXiv:2411.04975).

Owns its config, the text that it keeps of each row, and drafts of it alone or together with a head's. A row's drafts come from that row's
own prompt and reply, never from another request. Knows no verification.

Shape legend: B batch rows, E fresh tokens, T text slots, P places, L drafted tokens, N tree nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.composed.suffixes import SuffixRule, continuations
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.files.field_rules import COUNT, POSITIVE, TEXT, Rule, is_number
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander
from draftsmith.models.tree.tree import DraftTree, joined, prune, tree_from_paths
from draftsmith.models.trunk.riders import Riders

_SHARE: Rule = (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


class SuffixConfig(DrafterConfig):
    """What of a text's past is proposed; see :class:`~draftsmith.models.composed.suffixes.SuffixRule`.

    Attributes:
        longest_match: tokens that are compared.
        shortest_match: how many of them must agree.
        num_places: how many places of the text count.
        tokens_per_match: drafted tokens for each token that agrees.
        least_probability: rarer continuations are left out.
        head: folder of a drafter whose drafts are joined with these, relative to the config's own; empty for none.
    """

    model_type = "draftsmith_suffix"
    rules: ClassVar[Mapping[str, Rule]] = {
        "longest_match": COUNT,
        "shortest_match": COUNT,
        "num_places": COUNT,
        "tokens_per_match": POSITIVE,
        "least_probability": _SHARE,
        "head": TEXT,
    }

    def __init__(
        self,
        longest_match: int = 24,
        shortest_match: int = 1,
        num_places: int = 16,
        tokens_per_match: float = 2.0,
        least_probability: float = 0.1,
        head: str = "",
        **kwargs: Any,
    ) -> None:
        self.longest_match = longest_match
        self.shortest_match = shortest_match
        self.num_places = num_places
        self.tokens_per_match = tokens_per_match
        self.least_probability = least_probability
        self.head = head
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
class SuffixState:
    """What is kept between cycles.

    Attributes:
        text_BT: int64, the text, whose last slot takes what is behind a row's end.
        pending: tokens emitted since the last draft, which belong at the text's end; the last one is the root.
        head: of the head, where there is one.
    """

    text_BT: Tensor
    pending: Emitted
    head: DraftState | None = None

    def select_rows(self, kept: KeptRows) -> SuffixState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        head = None if self.head is None else self.head.select_rows(kept)
        return SuffixState(self.text_BT[kept.index], self.pending.select_rows(kept.index), head)


class SuffixDrafter(Drafter):
    """Proposes continuations that a row's own text has had before, for any target and tokenizer; with a head, its drafts too.

    Args:
        config: what is compared and kept.
        head: a drafter whose tree is joined with the continuations; None for these alone.

    Raises:
        ValueError: a field of the config breaks its rule.
    """

    config: SuffixConfig
    config_class: type[SuffixConfig] = SuffixConfig

    def __init__(self, config: SuffixConfig, head: Drafter | None = None) -> None:
        super().__init__(config)
        self.head = head

    @property
    def features(self) -> tuple[str, ...]:
        """Those of its head."""
        return () if self.head is None else self.head.features

    @property
    def riders(self) -> Riders | None:
        """Those of its head."""
        return None if self.head is None else self.head.riders

    @property
    def num_draft_tokens(self) -> int:
        """All of the target's."""
        return self.ends.vocab_size

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """Its head, where there is one."""
        return () if self.head is None else (self.head,)

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`. Any target will do, unless there is a head."""
        if self.head is not None:
            self.head = self.head.bound(ends)
        self._borrowed[:] = [ends]
        return self

    def check_tokenizer(self, fingerprint: str) -> None:
        """See :meth:`Drafter.check_tokenizer`: the head's."""
        if self.head is not None:
            self.head.check_tokenizer(fingerprint)

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
            self.head.check_depth(self._of_head(limits))

    def limits_of_parts(self, limits: DraftLimits) -> DraftLimits:
        """See :meth:`Drafter.limits_of_parts`: what the head drafts."""
        return self._of_head(limits)

    def _of_head(self, limits: DraftLimits) -> DraftLimits:
        """What the head drafts: no deeper than it can. Continuations of the text may be deeper."""
        most = None if self.head is None else self.head.max_draft_steps
        return limits if most is None else limits.no_deeper_than(most)

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

    @property
    def reads_choices(self) -> bool:
        """Its head's affair."""
        return self.head is not None and self.head.reads_choices

    def take_choices(self, state: SuffixState, tree: DraftTree, choices_BN: Tensor) -> SuffixState:  # type: ignore[override]
        """See :meth:`Drafter.take_choices`: for the head."""
        if self.head is None or state.head is None:
            return state
        return replace(state, head=self.head.take_choices(state.head, tree, choices_BN))

    def score_scale(self, temperature: float) -> float:
        """See :meth:`Drafter.score_scale`: shares of places are compared as they are."""
        return 1.0

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`: the head's reason."""
        return "" if self.head is None else self.head.needs_host()

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """Not for this drafter.

        Raises:
            ValueError: always.
        """
        raise ValueError("a drafter without weights is not trained; name it to decode, evaluate or tune")

    def start(self, opening: Opening) -> SuffixState:
        """Keep the prompts."""
        head = None if self.head is None else self.head.start(opening)
        return self._opened(opening, head)

    def start_in_steps(self, opening: Opening) -> Generator[None, None, SuffixState]:
        """See :meth:`Drafter.start_in_steps`."""
        head = None if self.head is None else (yield from self.head.start_in_steps(opening))
        return self._opened(opening, head)

    def _opened(self, opening: Opening, head: DraftState | None) -> SuffixState:
        prompt = opening.prompt
        text_BT = torch.cat([opening.first_B[:, None], prompt.tokens_BE], dim=1)
        slots = max(opening.room + 1, text_BT.shape[1]) + 1
        return SuffixState(
            F.pad(text_BT, (0, slots - text_BT.shape[1])), _tokens_of(prompt.last_only(opening.num_pending)), head
        )

    def advance(self, state: SuffixState, emitted: Emitted) -> SuffixState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        head = state.head
        if self.head is not None and head is not None:
            head = self.head.advance(head, emitted)
        return SuffixState(state.text_BT, _tokens_of(emitted), head)

    def follow(self, state: SuffixState, cycle: Cycle, limits: DraftLimits) -> SuffixState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: the pending tokens become text."""
        _write_pending(state, cycle)
        if self.head is None or state.head is None:
            return state
        return replace(state, head=self.head.follow(state.head, cycle, limits))

    def expander(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
        """Not for this drafter, which proposes whole continuations.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a drafter without a model scores no single node, which this command needs; compare its shapes with `draftsmith evaluate`"
        )

    def propose(self, state: SuffixState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """See :meth:`Drafter.propose`.

        Raises:
            ValueError: a shape that needs distributions (see :meth:`check_depth`), or a rule of verification that does.
        """
        root_B, text_BT = self._begun(state, cycle, limits)
        paths_BPL, scores_BPL = continuations(text_BT, cycle.lengths_B + 1, limits.draft_length, self.config.rule)
        cut = False if cycle.fixed_shapes else None
        if limits.is_chain:
            paths_BPL, scores_BPL = _best_path(paths_BPL, scores_BPL)
        if limits.min_probability > 0.0:
            scores_BPL = torch.where(scores_BPL.exp() >= limits.min_probability, scores_BPL, -torch.inf)
        if self.head is None or state.head is None:
            tree = tree_from_paths(root_B, paths_BPL, scores_BPL, cut)
        else:
            tree = joined(self.head.propose(state.head, cycle, self._of_head(limits)), paths_BPL, scores_BPL)
        return tree if limits.is_chain else prune(tree, limits.max_nodes - 1, cut)

    def _begun(self, state: SuffixState, cycle: Cycle, limits: DraftLimits) -> tuple[Tensor, Tensor]:
        """Check a draft and write the pending tokens: int64 [B], the roots; int64 [B, T], the part of the text that rows can have.

        Raises:
            ValueError: see :meth:`propose`.
        """
        self.check_depth(limits)
        if cycle.keep_probs:
            raise ValueError(
                "the rule compares the distributions of draft and target, and a drafter without a model has none; give another rule"
            )
        _write_pending(state, cycle)
        root_B1 = state.pending.tokens_BE.gather(1, state.pending.counts_B[:, None] - 1)
        visible = state.text_BT.shape[1] - 1 if cycle.fixed_shapes else max(cycle.host_lengths) + 1
        return root_B1.squeeze(1), state.text_BT[:, :visible]

    @classmethod
    def read(cls, folder: Path, fields: Mapping[str, Any], load: Callable[[str], Drafter]) -> Self:
        """See :func:`from_folder`.

        Raises:
            ValueError: a field is bad, or the head reads the text as well.
        """
        config = cls.config_class(**{name: fields[name] for name in cls.config_class.rules if name in fields})
        config.check(str(folder / "config.json"), "change the file")
        head = load(config.head) if config.head else None
        if isinstance(head, SuffixDrafter):
            raise ValueError(
                f"{folder / 'config.json'} has head {config.head!r}, which reads the text as well; name another drafter"
            )
        drafter = cls(config, head)
        drafter.loaded_from = folder
        return drafter.eval()


def _tokens_of(emitted: Emitted) -> Emitted:
    """Emitted tokens without the target's states."""
    return Emitted(emitted.tokens_BE, {}, emitted.counts_B)


def _write_pending(state: SuffixState, cycle: Cycle) -> None:
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


def from_folder(folder: Path, fields: Mapping[str, Any], load: Callable[[str], Drafter]) -> SuffixDrafter:
    """Make the drafter that a folder's config describes.

    Args:
        folder: where it lies.
        fields: of its config.
        load: gives a drafter by its name, relative to the folder.

    Returns:
        The drafter in evaluation mode.

    Raises:
        ValueError: a field breaks its rule, or the head cannot be had.
    """
    return SuffixDrafter.read(folder, fields, load)
