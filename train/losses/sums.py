"""What goes into the losses of draft heads and what comes out.

Owns: the records that the losses share with those who call them. Does not know: how anything is computed.

Shape legend: K draft steps, A anchors, E head inputs, V target vocabulary, Vd draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Heads = Tensor | Sequence[Tensor]
"""Output heads: one [Vd, E] for all draft steps, or one for each of the K."""

OUTSIDE = -1
"""Draft id of a target token that the draft vocabulary does not hold."""


@dataclass(frozen=True)
class TeacherLogits:
    """What a target says at n positions.

    Attributes:
        logits: [n, Vd], over the draft vocabulary.
        kept: bool [n], False where nothing is to be learned from a position; None keeps all.
        log_mass: float [n], log of what the target gives to the draft vocabulary; None where that is everything.
    """

    logits: Tensor
    kept: Tensor | None = None
    log_mass: Tensor | None = None


@dataclass(frozen=True)
class TopEmphasis:
    """HASS's top-K distillation (arXiv 2408.15766, section 3.1): an extra loss beside the whole divergence.

    Attributes:
        weight: of the extra loss.
        count: K; the extra loss is the cross-entropy restricted to this many of the target's likeliest tokens.
    """

    weight: float
    count: int = 10


@dataclass(frozen=True)
class StepSums:
    """Sums over the rows of each draft step. Divide by the counts of all ranks to get means.

    Attributes:
        total: [] differentiable, the sum over k of step_weights[k] * loss_sum[k].
        loss_sum: [K] detached, each row times its weight, in nats or, for total variation, as a share; of a divergence without the
            target's entropy, the soft cross-entropy.
        loss_rows: [K], rows in the loss, each as much as its weight.
        rows: [K], valid rows, those outside the draft vocabulary included. Accuracies are relative to these.
        top1: [K], rows whose target is the best token; None when not asked for.
        top5: [K], rows whose target is among the 5 best tokens; None when not asked for.
        feature_sum: [K], summed smooth L1; None where features are not learned.
        accepted: [K, A] detached, the chance that the target accepts a draw of each row at temperature 1, and 0 in rows that are not valid;
            None when not asked for.
        chances: [K], summed chances of acceptance that a confidence head gives; None where none is learned.
        recalled: [K], rows whose token is among the few that can be drafted; None where all can.
    """

    total: Tensor
    loss_sum: Tensor
    loss_rows: Tensor
    rows: Tensor
    top1: Tensor | None
    top5: Tensor | None
    feature_sum: Tensor | None = None
    accepted: Tensor | None = None
    chances: Tensor | None = None
    recalled: Tensor | None = None
