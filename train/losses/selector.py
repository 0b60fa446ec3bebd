"""The loss of a drafter that chooses among the few likeliest tokens of each step (DFlash 2's candidate selector).

    L = CE over C scores: log-probability of each candidate before the correction, held constant, + what the correction adds

The candidates are those of decoding. Where the text's token is not among them, it takes the place of the last one, so that every row
teaches something. The block itself learns by its own loss over the vocabulary.

Owns: the loss. Does not know: drafters, batches.

Shape legend: K draft steps, A anchors, E head inputs, r columns of the correction, C candidates, R rows, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.train.losses.chunk_rows import default_chunk_rows
from draftsmith.train.losses.sums import OUTSIDE


@dataclass(frozen=True)
class SelectorSums:
    """Sums over the rows of each draft step.

    Attributes:
        total: [] differentiable, the sum over k of step_weights[k] times the weighted loss of its rows.
        recalled: [K], rows whose token is among the candidates of decoding, all rows alike.
    """

    total: Tensor
    recalled: Tensor


def selector_loss(
    head_inputs: Tensor,
    head: Tensor,
    correction: Tensor,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    num_candidates: int,
    chunk_rows: int | None = None,
    row_weights: Tensor | None = None,
) -> SelectorSums:
    """Cross-entropy of the text's token among the candidates of its step, with the text's own token before it.

    Args:
        head_inputs: float [K, A, E + r].
        head: float [Vd, E], constant here.
        correction: float [Vd, r].
        targets: int64 [A, K], draft ids, OUTSIDE where there is none: such a row is not in the loss.
        valid: bool [A, K], rows that count.
        step_weights: float [K].
        num_candidates: C.
        chunk_rows: rows of logits in memory at a time; None chooses.
        row_weights: float [A, K], of each row; None is 1 everywhere.
    """
    num_steps, width = head_inputs.shape[0], head.shape[1]
    kept_KA = (valid & (targets != OUTSIDE)).T
    rows_RE = head_inputs[kept_KA]
    target_R, steps_R = targets.T[kept_KA], torch.nonzero(kept_KA)[:, 0]
    inputs_RE = rows_RE[:, :width].detach()
    scores_RC, ids_RC, missing_R = _candidates(inputs_RE, head.detach(), target_R, num_candidates, chunk_rows)
    added_RC = torch.einsum("rd,rcd->rc", rows_RE[:, width:].to(correction.dtype), correction[ids_RC])
    is_target_RC = ids_RC == target_R[:, None]
    log_probs_RC = (scores_RC + added_RC.to(scores_RC.dtype)).log_softmax(-1)
    weights_R = step_weights.to(log_probs_RC.dtype)[steps_R]
    if row_weights is not None:
        weights_R = weights_R * row_weights.T[kept_KA].to(weights_R.dtype)
    recalled = scores_RC.new_zeros(num_steps).index_add_(0, steps_R, (~missing_R).to(scores_RC.dtype))
    return SelectorSums(-(weights_R * (log_probs_RC * is_target_RC).sum(-1)).sum(), recalled)


@torch.no_grad()
def _candidates(
    inputs_RE: Tensor, head: Tensor, target_R: Tensor, count: int, chunk_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities float32 [R, C] and draft ids int64 [R, C] of the likeliest tokens and the target; bool [R], where it was none."""
    rows = chunk_rows or default_chunk_rows(len(head))
    scores, ids, was_missing = [], [], []
    for inputs, target in zip(inputs_RE.split(rows), target_R.split(rows), strict=True):
        log_probs = torch.log_softmax(inputs.to(head.dtype) @ head.T, dim=-1, dtype=torch.float32)
        best, best_ids = log_probs.topk(min(count, len(head)), dim=-1)
        missing = ~(best_ids == target[:, None]).any(-1)
        best_ids[missing, -1] = target[missing]
        best[missing, -1] = log_probs[missing, target[missing]]
        scores.append(best)
        ids.append(best_ids)
        was_missing.append(missing)
    return torch.cat(scores), torch.cat(ids), torch.cat(was_missing)
