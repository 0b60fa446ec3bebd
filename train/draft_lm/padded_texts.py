"""Texts of different lengths as one batch, with the tokens to learn.

Owns: the padding, and the one shift from a position to its next token. Does not know: models, losses.

Shape legend: B batch rows, T positions, R rows of the loss (positions whose next token is trained on).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.train.draft_lm.texts import DistilText


@dataclass(frozen=True)
class PaddedTexts:
    """Texts side by side.

    Attributes:
        ids_BT: int64, padded on the right.
        keep_mask_BT: bool, True at positions whose next token is trained on.
        labels_R: int64, those next tokens, row by row.
    """

    ids_BT: Tensor
    keep_mask_BT: Tensor
    labels_R: Tensor


def pad_texts(texts: Sequence[DistilText], device: torch.device | str = "cpu") -> PaddedTexts:
    """Pads texts to the longest. The one place that shifts: the state at t meets the token at t + 1.

    Worked example: the prompt 5 6 with the reply 7 8, and the prompt 9 with the reply 4. The ids are (5 6 7 8), (9 4 0 0). The mask is
    (0 1 1 0), (1 0 0 0). The labels are 7 8 4. Padding is behind every token, so causal attention alone hides it.

    Args:
        texts: the rows, at least one.
        device: where to put the tensors.
    """
    longest = max(len(text.ids) for text in texts)
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.int64)
    labelled_BT = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text.ids)] = torch.tensor(text.ids)
        labelled_BT[row, : len(text.ids)] = torch.tensor(text.labelled)
    keep_mask_BT = torch.cat([labelled_BT[:, 1:], torch.zeros(len(texts), 1, dtype=torch.bool)], dim=1)
    labels_R = ids_BT.roll(-1, dims=1)[keep_mask_BT]
    return PaddedTexts(ids_BT.to(device), keep_mask_BT.to(device), labels_R.to(device))
