"""AdamW that also keeps a running average of the weights.

Owns: the update of the average. Does not know: drafters, processes, how weights are spread over them.

The average is one more state of the optimiser, like its moments. So FSDP2, ZeRO and checkpoints divide, gather, save and restore it like
the other states. With ZeRO-2 each process keeps no more than its share of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

AVERAGE = "average"
"""The name of the average among a parameter's optimiser states."""


class AveragingAdamW(torch.optim.AdamW):
    """AdamW; after each step `average = decay * average + (1 - decay) * weight`, beginning at the weight before the first step.

    Args:
        groups: as torch.optim.AdamW takes them.
        lr: peak learning rate.
        betas: AdamW's.
        decay: of the average, between 0 and 1.
        fused: as torch.optim.AdamW takes it.

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        decay: float,
        fused: bool | None = None,
    ) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of the average is {decay}; it must be between 0 and 1")
        super().__init__(groups, lr=lr, betas=betas, fused=fused)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, then the average follows.

        Args:
            closure: computes the loss and its gradients.

        Returns:
            what the closure returned.
        """
        starts: dict[Tensor, Tensor] = {}
        for weight in self._weights():
            if AVERAGE not in self.state.get(weight, {}):
                starts[weight] = weight.detach().clone()
        loss = super().step(closure)
        for weight in self._weights():
            # Adam makes its own states only where there are none, so the average may not be there before them.
            state = self.state.get(weight)
            if state:
                state.setdefault(AVERAGE, starts.get(weight)).lerp_(weight, 1.0 - self.decay)
        return loss

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]
