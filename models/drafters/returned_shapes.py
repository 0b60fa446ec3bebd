"""What a family's methods return, checked where the package calls them, with errors for the family's author.

Owns the shapes and dtypes that the drafter seam promises. Only shapes are compared, so that nothing waits for a device. Knows no family.

Shape legend: B batch rows, M nodes, A anchors, K draft steps, E head inputs, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftsmith.models.tree.noise import SharedNoise
from draftsmith.models.tree.search import ConfidentExpander, Expander
from draftsmith.models.tree.shortlist import Shortlist, ShortlistExpander

if TYPE_CHECKING:
    from draftsmith.models.drafters.draft_records import Cycle, DraftState
    from draftsmith.models.drafters.drafter import Drafter
    from draftsmith.models.drafters.rollout import PackedBatch, Rollout
    from draftsmith.models.tree.limits import DraftLimits

_PARTS_OF_A_DRAFT = ("root_B", "begin", "extend", "target_ids")


def checked_head_inputs(drafter: Drafter, batch: PackedBatch, rollout: Rollout) -> Tensor:
    """[K, A, E]: what the drafter's ``teacher_forced`` returns.

    Raises:
        ValueError: it is of another shape, or holds no floats.
    """
    num_anchors, num_steps = rollout.tokens.shape
    inputs = drafter.teacher_forced(batch, rollout)
    _check(f"{type(drafter).__name__}.teacher_forced", inputs, "[K, A, E]", (num_steps, num_anchors, None))
    return inputs


def checked_heads(drafter: Drafter, num_steps: int, width: int) -> Tensor | list[Tensor]:
    """The output head [Vd, E] of all steps, or those of the first ``num_steps`` steps.

    Args:
        drafter: whose heads.
        num_steps: K.
        width: E of what ``teacher_forced`` returned, or E + r with a correction.

    Raises:
        ValueError: a head is of another shape.
    """
    name, correction = type(drafter).__name__, drafter.correction_weight
    if correction is not None:
        _check(f"{name}.correction_weight", correction, "[Vd, r]", (drafter.config.num_draft_tokens, None))
        width -= correction.shape[1]
    shape = (drafter.config.num_draft_tokens, width)
    if drafter.has_one_head:
        head = drafter.head_weight
        _check(f"{name}.head_weight", head, "[Vd, E], with the E of teacher_forced", shape)
        return head
    heads = [drafter.step_weight(step) for step in range(num_steps)]
    for step, head in enumerate(heads):
        _check(f"{name}.step_weight({step})", head, "[Vd, E], with the E of teacher_forced", shape)
    return heads


def check_features(drafter: Drafter) -> None:
    """Check what names the layers that a drafter reads, and its depth.

    Raises:
        ValueError: ``features`` is no tuple of names, or ``max_draft_steps`` no count.
    """
    name, features, most = type(drafter).__name__, drafter.features, drafter.max_draft_steps
    if not isinstance(features, tuple) or not all(isinstance(feature, str) for feature in features):
        raise ValueError(
            f"{name}.features is {features!r:.80}; it must be a tuple of layer names, such as ('last.pre_norm',)"
        )
    if most is not None and (not isinstance(most, int) or most < 1):
        raise ValueError(f"{name}.max_draft_steps is {most!r:.80}; it must be a whole number of at least 1, or None")


def checked_expander(drafter: Drafter, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
    """What the drafter's ``expander`` returns, with a check of each of its answers.

    Raises:
        ValueError: the state has no ``select_rows``, or the draft lacks a method.
    """
    name = type(drafter).__name__
    if not callable(getattr(state, "select_rows", None)):
        raise ValueError(
            f"{name}.start or {name}.advance returned a {type(state).__name__} without select_rows(kept); give the state this method"
        )
    draft = drafter.expander(state, cycle, limits)
    if absent := [part for part in _PARTS_OF_A_DRAFT if not hasattr(draft, part)]:
        raise ValueError(
            f"{name}.expander returned a {type(draft).__name__} without {', '.join(absent)}; a draft needs all four of them"
        )
    return CheckedDraft(draft, cycle.lengths_B.shape[0], drafter.num_draft_tokens)


class CheckedDraft:
    """An expander whose answers are checked.

    Args:
        draft: the family's own.
        num_rows: B.
        num_draft_tokens: Vd.

    Attributes:
        root_B: see :class:`Expander`.

    Raises:
        ValueError: here and from each method, an answer of another shape than the :class:`Expander` promises.
    """

    def __init__(self, draft: Expander, num_rows: int, num_draft_tokens: int) -> None:
        self._draft, self._name = draft, type(draft).__name__
        self._num_rows, self._num_draft_tokens, self._num_nodes = num_rows, num_draft_tokens, 1
        self._num_candidates = 0
        self.root_B = draft.root_B
        what = "[B], the rows of the batch; select_rows(kept) keeps those of kept.index"
        _check(f"{self._name}.root_B", self.root_B, what, (num_rows,), torch.int64)

    def begin(self) -> Tensor:
        """See :class:`Expander`."""
        return self._logits("begin", "[B, 1, Vd]", self._draft.begin(), 1)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`."""
        return self._logits("extend", "[B, M, Vd]", self._draft.extend(tokens_BM, above_BM), tokens_BM.shape[1])

    def shortlist(self, count: int, scale: float, noise: SharedNoise | None) -> Shortlist | None:
        """See :class:`ShortlistExpander`."""
        draft = self._draft
        shortlist = draft.shortlist(count, scale, noise) if isinstance(draft, ShortlistExpander) else None
        if shortlist is not None:
            name, what = f"{self._name}.shortlist", "[B, S, C], with a C of at least what was asked for, or Vd"
            self._num_candidates = shortlist.draft_BSC.shape[-1]
            _check(f"{name}: draft_BSC", shortlist.draft_BSC, what, (self._num_rows, None, None), torch.int64)
            _check(f"{name}: log_probs_BSC", shortlist.log_probs_BSC, what, tuple(shortlist.draft_BSC.shape))
        return shortlist

    def rescore(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor | None:
        """See :class:`ShortlistExpander`."""
        assert isinstance(self._draft, ShortlistExpander)
        self._num_nodes = tokens_BM.shape[1]
        added_BMC = self._draft.rescore(tokens_BM, above_BM)
        if added_BMC is not None:
            shape = (self._num_rows, self._num_nodes, self._num_candidates)
            _check(f"{self._name}.rescore", added_BMC, "[B, M, C], with the C of shortlist", shape)
        return added_BMC

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """See :class:`Expander`."""
        ids = self._draft.target_ids(draft_ids)
        _check(f"{self._name}.target_ids", ids, "the shape of its argument", tuple(draft_ids.shape), torch.int64)
        return ids

    def acceptance(self) -> Tensor | None:
        """See :class:`ConfidentExpander`."""
        chances_BM = self._draft.acceptance() if isinstance(self._draft, ConfidentExpander) else None
        if chances_BM is not None:
            what = "[B, M], chances for the nodes of the last call"
            _check(f"{self._name}.acceptance", chances_BM, what, (self._num_rows, self._num_nodes))
        return chances_BM

    def _logits(self, method: str, what: str, logits_BMV: Tensor, num_nodes: int) -> Tensor:
        self._num_nodes = num_nodes
        _check(f"{self._name}.{method}", logits_BMV, what, (self._num_rows, num_nodes, self._num_draft_tokens))
        return logits_BMV


def _check(
    method: str, value: object, what: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Check one tensor.

    Args:
        method: that returned it.
        value: what it returned.
        what: the shape in words.
        shape: the sizes; None for any.
        dtype: which; None for any float.

    Raises:
        ValueError: naming the method, what it returned and what it must return.
    """
    kind = "floats" if dtype is None else str(dtype).removeprefix("torch.")
    if isinstance(value, Tensor):
        right_dtype = value.is_floating_point() if dtype is None else value.dtype == dtype
        right_shape = len(value.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(value.shape, shape, strict=True)
        )
        if right_dtype and right_shape:
            return
        given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    else:
        given = f"a {type(value).__name__}"
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{method} gave {given}; it must give {kind} [{sizes}]: {what}")
