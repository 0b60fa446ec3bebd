"""Drafts of a head, scored again by a language model of the same vocabulary (arXiv:2404.09221, section 5).

Owns the config, the join of head and second opinion, and what is kept of both. The head's likeliest tokens at each node stay. An n-gram
table or a small LM then shifts their scores. Any search runs over the result, and verification is as exact as without it. Knows no family.

Shape legend: B batch rows, E fresh tokens, M nodes continued at once, C candidates of a node, K tokens of a context.
V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.files.field_rules import COUNT, NOT_NEGATIVE, TEXT, Rule
from draftsmith.models.ngrams.table import NgramTable, load_ngrams
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander

_TENSORS = ("keys_G", "log_probs_G", "backoffs_C", "links_C", "orders_C")


class RefinedConfig(DrafterConfig):
    """Which head is refined, and by what.

    Attributes:
        head: folder of a trained drafter, relative to the config's own.
        ngrams: folder of an n-gram table; empty where an LM refines.
        lm: folder or name of a causal LM with the target's tokenizer; empty where a table refines.
        alpha: weight of the second opinion; 0 only limits the candidates.
        num_candidates: how many of the head's tokens at a node are scored again; the others are not proposed.
    """

    model_type = "draftsmith_refined"
    rules: ClassVar[Mapping[str, Rule]] = {
        "head": TEXT,
        "ngrams": TEXT,
        "lm": TEXT,
        "alpha": NOT_NEGATIVE,
        "num_candidates": COUNT,
    }

    def __init__(
        self,
        head: str = "",
        ngrams: str = "",
        lm: str = "",
        alpha: float = 0.2,
        num_candidates: int = 16,
        **kwargs: Any,
    ) -> None:
        self.head = head
        self.ngrams = ngrams
        self.lm = lm
        self.alpha = alpha
        self.num_candidates = num_candidates
        super().__init__(**kwargs)

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if not self.head:
            return "no head; name the folder of a trained drafter"
        if bool(self.ngrams) == bool(self.lm):
            return f"ngrams {self.ngrams!r} and lm {self.lm!r}; name exactly one of the two"
        return ""


class Opinion(Protocol):
    """A second opinion in the middle of one draft, which follows the head from node to node."""

    def begin(self) -> None:
        """Begin at the root."""

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """Continue nodes; see :meth:`Expander.extend`."""

    def log_probs(self, ids_BMC: Tensor) -> Tensor:
        """Score tokens behind the current nodes: target ids int64 [B, M, C] -> float32 [B, M, C]."""


class Reviser(Protocol):
    """What gives second opinions, and keeps a state of its own between cycles."""

    def start(self, opening: Opening) -> DraftState:
        """See :meth:`Drafter.start`."""

    def advance(self, state: Any, emitted: Emitted) -> DraftState:
        """See :meth:`Drafter.advance`."""

    def follow(self, state: Any, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """See :meth:`Drafter.follow`."""

    def opinion(self, state: Any, cycle: Cycle, limits: DraftLimits) -> Opinion:
        """The opinion on one draft."""


@dataclass(frozen=True)
class TailState:
    """The last tokens of each row, int64 [B, K]; -1 before the first."""

    tokens_BK: Tensor

    def select_rows(self, kept: KeptRows) -> TailState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return TailState(self.tokens_BK[kept.index])


class NgramReviser(nn.Module):
    """Opinions of an n-gram table.

    Args:
        table: of the target's tokens.
    """

    def __init__(self, table: NgramTable) -> None:
        super().__init__()
        self._table = table
        for name in _TENSORS:
            self.register_buffer(name, getattr(table, name), persistent=False)

    @property
    def table(self) -> NgramTable:
        """The table, where this module lies."""
        return replace(self._table, **{name: getattr(self, name) for name in _TENSORS})

    @property
    def num_kept(self) -> int:
        """K: tokens that a context can have, at least 1."""
        return max(1, self._table.order - 1)

    def start(self, opening: Opening) -> TailState:
        """Keep the ends of the prompts."""
        whole_BT = torch.cat([opening.first_B[:, None], opening.prompt.tokens_BE], dim=1)
        return TailState(
            _tail(F.pad(whole_BT, (self.num_kept, 0), value=-1), opening.prompt.counts_B + 1, self.num_kept)
        )

    def advance(self, state: TailState, emitted: Emitted) -> TailState:
        """Keep the ends of what was emitted."""
        text_BT = torch.cat([state.tokens_BK, emitted.tokens_BE], dim=1)
        return TailState(_tail(text_BT, emitted.counts_B, self.num_kept))

    def follow(self, state: TailState, cycle: Cycle, limits: DraftLimits) -> TailState:
        """Nothing is pending."""
        return state

    def opinion(self, state: TailState, cycle: Cycle, limits: DraftLimits) -> Opinion:
        """See :class:`NgramOpinion`."""
        return NgramOpinion(self.table, state.tokens_BK)


def _tail(text_BT: Tensor, counts_B: Tensor, num_kept: int) -> Tensor:
    """int64 [B, K]: the last tokens of texts that begin with K others and have ``counts_B`` more."""
    return text_BT.gather(1, counts_B[:, None] + counting(num_kept, text_BT.device))


class NgramOpinion:
    """An n-gram table along one draft.

    Args:
        table: of the target's tokens.
        tail_BK: int64, the last tokens of each row, the root among them.
    """

    def __init__(self, table: NgramTable, tail_BK: Tensor) -> None:
        self._table = table
        self._context_BM = tail_BK[:, -1:]
        self._tail_BK = tail_BK

    def begin(self) -> None:
        """See :class:`Opinion`."""
        self._context_BM = self._table.context_of(self._tail_BK)[:, None]

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """See :class:`Opinion`."""
        self._context_BM = self._table.follow(self._context_BM.gather(1, above_BM), tokens_BM)

    def log_probs(self, ids_BMC: Tensor) -> Tensor:
        """See :class:`Opinion`."""
        return self._table.log_prob(self._context_BM[..., None], ids_BMC)


class LMReviser(nn.Module):
    """Opinions of a causal LM with the target's tokenizer.

    Args:
        lm: as a drafter, which follows the text by itself.
    """

    def __init__(self, lm: LMDrafter) -> None:
        super().__init__()
        self.lm = lm

    def start(self, opening: Opening) -> DraftState:
        """Read the prompts."""
        return self.lm.start(opening)

    def advance(self, state: Any, emitted: Emitted) -> DraftState:
        """What was emitted is pending."""
        return self.lm.advance(state, Emitted(emitted.tokens_BE, {}, emitted.counts_B))

    def follow(self, state: Any, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """Read what is pending."""
        return self.lm.follow(state, cycle, limits)

    def opinion(self, state: Any, cycle: Cycle, limits: DraftLimits) -> Opinion:
        """See :class:`LMOpinion`."""
        return LMOpinion(self.lm.expander(state, cycle, limits))


class LMOpinion:
    """A causal LM along one draft.

    Args:
        expander: its own.
    """

    def __init__(self, expander: Expander) -> None:
        self._expander = expander
        self._log_probs_BMV = torch.zeros(0)

    def begin(self) -> None:
        """See :class:`Opinion`."""
        self._log_probs_BMV = self._expander.begin().float().log_softmax(-1)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """See :class:`Opinion`."""
        self._log_probs_BMV = self._expander.extend(tokens_BM, above_BM).float().log_softmax(-1)

    def log_probs(self, ids_BMC: Tensor) -> Tensor:
        """See :class:`Opinion`. A token that the LM has not counts as its last one."""
        return self._log_probs_BMV.gather(-1, ids_BMC.clamp(max=self._log_probs_BMV.shape[-1] - 1))


@dataclass(frozen=True)
class RefinedState:
    """What is kept between cycles: the head's state and the reviser's."""

    head: DraftState
    reviser: DraftState

    def select_rows(self, kept: KeptRows) -> RefinedState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return RefinedState(self.head.select_rows(kept), self.reviser.select_rows(kept))


class RefinedDrafter(Drafter):
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

    def __init__(self, config: RefinedConfig, head: Drafter, reviser: NgramReviser | LMReviser) -> None:
        super().__init__(config)
        self.head = head
        self.reviser = reviser

    @property
    def _second(self) -> Reviser:
        """The reviser, whichever it is: what it keeps is its own affair."""
        return self.reviser

    @property
    def features(self) -> tuple[str, ...]:
        """The head's."""
        return self.head.features

    @property
    def num_draft_tokens(self) -> int:
        """The head's."""
        return self.head.num_draft_tokens

    @property
    def max_draft_steps(self) -> int | None:
        """The head's."""
        return self.head.max_draft_steps

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`.

        Raises:
            ValueError: the head is of another target, or the table has another vocabulary.
        """
        self.head = self.head.bound(ends)
        if isinstance(self.reviser, LMReviser):
            self.reviser = LMReviser(self.reviser.lm.bound(ends))
        elif self.reviser.table.vocab_size != ends.vocab_size:
            raise ValueError(
                f"the n-gram table {self.config.ngrams!r} has a vocabulary of {self.reviser.table.vocab_size} tokens, the target "
                f"{ends.vocab_size}; make the table with this target"
            )
        self._borrowed[:] = [ends]
        return self

    def check_tokenizer(self, fingerprint: str) -> None:
        """See :meth:`Drafter.check_tokenizer`: the head's and the reviser's.

        Args:
            fingerprint: of the target's tokenizer; empty if unknown.

        Raises:
            ValueError: one of the two is of another tokenizer.
        """
        self.head.check_tokenizer(fingerprint)
        if isinstance(self.reviser, LMReviser):
            self.reviser.lm.check_tokenizer(fingerprint)
            return
        own = self.reviser.table.tokenizer_fingerprint
        if own and fingerprint and own != fingerprint:
            raise ValueError(
                f"the n-gram table {self.config.ngrams!r} was made with another tokenizer ({own[:12]}) than this one ({fingerprint[:12]}); "
                "make it again with this target"
            )

    def score_scale(self, temperature: float) -> float:
        """The head's."""
        return self.head.score_scale(temperature)

    def needs_host(self) -> str:
        """The reason of the head, or else of the LM."""
        return self.head.needs_host() or (self.reviser.lm.needs_host() if isinstance(self.reviser, LMReviser) else "")

    def key_values(self) -> tuple[KeyValues, ...]:
        """Those of the head and of the LM."""
        more = self.reviser.lm.key_values() if isinstance(self.reviser, LMReviser) else ()
        return (*self.head.key_values(), *more)

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

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """Not for this drafter.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a refined drafter is not trained; train its head, and make its table with `draftsmith data ngrams`"
        )

    def start(self, opening: Opening) -> RefinedState:
        """Begin with both."""
        return RefinedState(self.head.start(opening), self._second.start(_tokens_only(opening)))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, RefinedState]:
        """See :meth:`Drafter.start_in_steps`."""
        head = yield from self.head.start_in_steps(opening)
        return RefinedState(head, self._second.start(_tokens_only(opening)))

    def advance(self, state: RefinedState, emitted: Emitted) -> RefinedState:  # type: ignore[override]
        """Both take in what was emitted."""
        return RefinedState(self.head.advance(state.head, emitted), self._second.advance(state.reviser, emitted))

    def follow(self, state: RefinedState, cycle: Cycle, limits: DraftLimits) -> RefinedState:  # type: ignore[override]
        """Both follow."""
        return RefinedState(
            self.head.follow(state.head, cycle, limits), self._second.follow(state.reviser, cycle, limits)
        )

    def expander(self, state: RefinedState, cycle: Cycle, limits: DraftLimits) -> RefinedDraft:  # type: ignore[override]
        """See :class:`RefinedDraft`."""
        return RefinedDraft(
            self.head.expander(state.head, cycle, limits),
            self._second.opinion(state.reviser, cycle, limits),
            float(self.config.alpha),
            self.config.num_candidates,
        )


def _tokens_only(opening: Opening) -> Opening:
    """The same without the target's states, which only the head reads."""
    prompt = opening.prompt
    return replace(opening, prompt=Emitted(prompt.tokens_BE, {}, prompt.counts_B))


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

    def _rescored(self, logits_BMV: Tensor) -> Tensor:
        count = min(self._count, logits_BMV.shape[-1])
        score_BMC, draft_BMC = logits_BMV.float().log_softmax(-1).topk(count, dim=-1)
        score_BMC = score_BMC + self._alpha * self._opinion.log_probs(self._head.target_ids(draft_BMC))
        return torch.full_like(logits_BMV, -torch.inf, dtype=torch.float32).scatter(-1, draft_BMC, score_BMC)


def from_folder(folder: Path, fields: Mapping[str, Any], load: Callable[[str], Drafter]) -> RefinedDrafter:
    """Make the drafter that a folder's config describes.

    Args:
        folder: where it lies.
        fields: of its config.
        load: gives a drafter by its name, relative to the folder.

    Returns:
        The drafter in evaluation mode.

    Raises:
        ValueError: a field breaks its rule, or what it names cannot be had.
    """
    config = RefinedConfig(**{name: fields[name] for name in RefinedConfig.rules if name in fields})
    config.check(str(folder / "config.json"), "change the file")
    head = load(config.head)
    if config.ngrams:
        table = folder / config.ngrams
        reviser: NgramReviser | LMReviser = NgramReviser(load_ngrams(table if table.is_dir() else Path(config.ngrams)))
    else:
        lm = load(config.lm)
        if not isinstance(lm, LMDrafter):
            raise ValueError(f"{folder / 'config.json'} has lm {config.lm!r}, which is no causal LM; name one")
        reviser = LMReviser(lm)
    drafter = RefinedDrafter(config, head, reviser)
    drafter.loaded_from = folder
    return drafter.eval()
