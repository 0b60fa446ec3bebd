"""D-PACE: rows count as much as the draft tokens that depend on them (arXiv:2605.18810).

Owns: the weights, and chunks of whole anchors, since a weight depends on all rows of its anchor. Does not know: losses, heads.

At an anchor, step k is verified only if all steps before it are accepted. With a_k the chance that step k is accepted, the expected number
of accepted tokens is the sum over m of a_1 ... a_m. Step k is in all terms from m = k on, so its weight is

    w_k = sum over m >= k of P_m,     P_m = product over j <= m of ((1 - smoothing) a_j + smoothing)

Without smoothing, w_k times the negative log of a_k has the gradient of minus that expectation.

Shape legend: K draft steps, A anchors, N anchors of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def d_pace_weights(accepted_KN: Tensor, valid_KN: Tensor, smoothing: float) -> Tensor:
    """The weight of each row.

    Steps that are not valid end nothing and depend on nothing: they count as accepted, and their products are left out.

    Example: chances (0.5, 0.5) without smoothing have the products 0.5 and 0.25, so the weights 0.75 and 0.25.

    Args:
        accepted_KN: float, the chance that each step is accepted once all before it are.
        valid_KN: bool, rows that count.
        smoothing: at least 0 and below 1; 1 would weigh all rows alike but for how many come behind.

    Returns:
        The same dtype, [K, N].
    """
    chance_KN = torch.where(valid_KN, (1.0 - smoothing) * accepted_KN + smoothing, 1.0)
    reached_KN = chance_KN.cumprod(0) * valid_KN
    return reached_KN.flip(0).cumsum(0).flip(0)


@dataclass(frozen=True)
class DPace:
    """The weighting of one batch.

    Attributes:
        smoothing: see :func:`d_pace_weights`.
        valid_KA: bool, rows that count.
    """

    smoothing: float
    valid_KA: Tensor

    def chunks(self, chunk_rows: int) -> Iterator[Tensor]:
        """Flat rows (step * A + anchor) of whole anchors, step by step, without anchors that have no valid row.

        Args:
            chunk_rows: at most so many rows at a time, but at least one anchor.

        Yields:
            int64 [K * N].
        """
        num_steps, num_anchors = self.valid_KA.shape
        steps_K1 = torch.arange(num_steps, device=self.valid_KA.device)[:, None]
        for anchors_N in torch.nonzero(self.valid_KA.any(0)).squeeze(1).split(max(1, chunk_rows // num_steps)):
            yield (steps_K1 * num_anchors + anchors_N).reshape(-1)

    def weights(self, row_ids: Tensor, accepted: Tensor) -> Tensor:
        """The weights of the rows of one chunk.

        Args:
            row_ids: int64 [K * N], one of :meth:`chunks`.
            accepted: float [K * N], the chance that each is accepted.

        Returns:
            The same dtype, [K * N].
        """
        num_steps = len(self.valid_KA)
        valid_KN = self.valid_KA.reshape(-1)[row_ids].view(num_steps, -1)
        return d_pace_weights(accepted.view(num_steps, -1), valid_KN, self.smoothing).reshape(-1)
