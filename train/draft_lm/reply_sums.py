"""The divergence of a draft LM along replies: both models' states, then the sums over the tokens of the replies.

Owns: the order of both forwards, and which of the target's states are kept. Does not know: where texts come from, how divergences are
computed, the mean over ranks.

Shape legend: B batch rows, T positions, R rows of the loss (positions whose next token is trained on), C rows of one chunk, D and E
hidden sizes of draft LM and target.
"""

from __future__ import annotations

from torch import Tensor

from draftsmith.data.cache.features import prompt_lengths
from draftsmith.models.target.target import Target
from draftsmith.train.draft_lm.losses import DivergenceSums, divergence_sums
from draftsmith.train.draft_lm.padded_texts import PaddedTexts
from draftsmith.train.draft_lm.student import Student
from draftsmith.train.losses.divergences import DivergenceLoss


def reply_sums(
    divergence: DivergenceLoss,
    padded: PaddedTexts,
    student: Student,
    target: Target | None,
    row_weight: Tensor | float,
    chunk_rows: int | None,
) -> DivergenceSums:
    """The divergence over all reply tokens of a batch, summed.

    Args:
        divergence: which.
        padded: the texts.
        student: the draft LM in training.
        target: the frozen target, which may be on other devices; None only with `cross_entropy`.
        row_weight: of every reply token in `total`.
        chunk_rows: rows whose logits are in memory at a time; None chooses.

    Raises:
        ValueError: a divergence without a target.
    """
    device = padded.ids_BT.device

    def target_logits(states_CE: Tensor) -> Tensor:
        assert target is not None
        return target.logits(states_CE.to(target.ends.device)).to(device)

    # Before the draft LM, whose activations then do not lie beside what the target's forward needs.
    states_RE = None if target is None else _target_states(target, padded)
    states_RD = student.states(padded.ids_BT)[padded.keep_mask_BT]
    return divergence_sums(
        divergence,
        states_RD,
        student.as_target().ends.logits,
        student.head_parameters(),
        states_RE,
        None if target is None else target_logits,
        padded.labels_R,
        row_weight,
        chunk_rows,
    )


def _target_states(target: Target, padded: PaddedTexts) -> Tensor:
    """[R, E], on the target's device, which may be another one. Only the states of the rows are kept."""
    # The state before the first reply token is the prompt's last.
    read_B = prompt_lengths(padded.keep_mask_BT.cpu().roll(1, dims=1), target.device)
    normed_BTE = target.prefix(padded.ids_BT.to(target.device), read=read_B).normed
    return normed_BTE[padded.keep_mask_BT.to(normed_BTE.device)]
