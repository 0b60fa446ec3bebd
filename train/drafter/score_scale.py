"""How sharply a drafter's scores should be read: one factor on its logits, fitted to held-out text.

A drafter learns the target's whole distribution, while greedy decoding accepts nothing but its likeliest token. Scores rank the paths of a
draft by their chance of acceptance. So they must be sharper than what was learned. The factor is an inverse temperature (Guo et al.
2017, arXiv 1706.04599, section 4.2, with the target's choices as labels). It comes from a fixed grid in one pass.

Owns: the grid, the sums, the choice. Does not know: training, search.

Shape legend: A anchors, R rows of one piece, E head inputs, Vd draft vocabulary, S factors of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.returned_shapes import checked_head_inputs
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.drafter.objective import Objective, path_teacher_rows, prepare
from draftsmith.train.losses.chunk_rows import default_chunk_rows
from draftsmith.train.losses.sums import OUTSIDE

SCALES = tuple(0.5 * 2 ** (quarter / 4) for quarter in range(17))
"""From 0.5 to 8, four to an octave."""


@torch.no_grad()
def surprise_by_scale(
    batch: PackedBatch, drafter: Drafter, ends: TargetEnds, to_draft: Tensor, max_anchors: int | None = None
) -> Tensor:
    """Summed cross-entropy of the target's likeliest next tokens under the first draft step, for each factor.

    Tokens outside the draft vocabulary, and those that a drafter of few candidates never drafts there, are left out: no factor helps them.

    Args:
        batch: with the target's states before the final norm.
        drafter: to be scaled.
        ends: the target's.
        to_draft: int64 [V], maps target ids to draft ids.
        max_anchors: look at no more positions of the batch than this, spread evenly; None looks at all.

    Returns:
        float32 [S], nats.
    """
    prepared = prepare(Objective(1, max_anchors=max_anchors), batch, to_draft)
    head_inputs = checked_head_inputs(drafter, batch, prepared.rollout)[0]
    states = batch.hidden[PRE_NORM][path_teacher_rows(prepared.rollout, len(batch.input_ids))[:, 0]]
    valid = prepared.rollout.valid[:, 0]
    sums = torch.zeros(len(SCALES), device=head_inputs.device)
    rows = default_chunk_rows(ends.vocab_size)
    for inputs, seen in zip(head_inputs[valid].split(rows), states[valid].split(rows), strict=True):
        choices = to_draft[ends.logits(ends.final_norm(seen)).argmax(-1)]
        inside = choices != OUTSIDE
        logits, choices = drafter.logits(inputs[inside], 0).float(), choices[inside]
        drafted = logits.gather(1, choices[:, None]).squeeze(1) > -torch.inf
        for number, scale in enumerate(SCALES):
            surprise = torch.nn.functional.cross_entropy(scale * logits[drafted], choices[drafted], reduction="sum")
            sums[number] += surprise
    return sums


def best_scale(surprise: Tensor) -> float:
    """The factor with the least summed cross-entropy, interpolated between the grid's points by a parabola through the lowest and its
    neighbours.

    The sums are convex in the factor, so there is one minimum. Rounded to two decimals: more are noise.

    Example: sums that fall towards the grid's end -> 8.0; nothing but zeros, because no token was counted -> 1.0.

    Args:
        surprise: float32 [S], from `surprise_by_scale`, summed over batches.
    """
    if not bool(surprise.any()):
        return 1.0
    low = int(surprise.argmin())
    shift = 0.0
    if 0 < low < len(SCALES) - 1:
        left, middle, right = surprise[low - 1 : low + 2].double().tolist()
        bend = left - 2 * middle + right
        shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return round(float(0.5 * 2 ** ((low + shift) / 4)), 2)
