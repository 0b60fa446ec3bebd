"""The drafter that is validated, decoded with and saved, where that is not the one in training.

Owns: the copy that holds a running average, or the whole of weights that several processes divide; and its place in a checkpoint.
Does not know: losses, metrics, when a validation comes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.target import TargetEnds
from draftsmith.train.run.averaging import AVERAGE
from draftsmith.train.run.strategies import whole


class ServedCopy:
    """A second drafter with the running average of the weights, or with all weights of a divided one.

    Between validations it waits on the CPU.

    Args:
        trained: the drafter in training.
        ends: the target's ends, which both share.
        averaged: whether it holds the average instead of the weights.
    """

    def __init__(self, trained: Drafter, ends: TargetEnds, averaged: bool) -> None:
        self.trained, self.averaged = trained, averaged
        self.drafter: Drafter = copy.deepcopy(trained, {id(ends): ends}).requires_grad_(False).eval()

    def move(self, device: torch.device | str) -> None:
        """Moves the copy's weights, and not the ends that it shares.

        Args:
            device: where to.
        """
        torch.nn.Module.to(self.drafter, device)

    @torch.no_grad()
    def refresh(self, strategy: pl.strategies.Strategy, device: torch.device) -> None:
        """Takes the weights of this moment, in full. Collective.

        Args:
            strategy: of the run; knows how weights are divided.
            device: where to put the copy.
        """
        self.move(device)
        names = dict(self.drafter.named_parameters())
        for name, weight in self.trained.named_parameters():
            average = whole(strategy, weight, AVERAGE) if self.averaged else None
            value = whole(strategy, weight) if average is None else average
            assert value is not None
            names[name].copy_(value)
        for name, buffer in self.drafter.named_buffers():
            buffer.copy_(self.trained.get_buffer(name))

    def save_average(self, checkpoint: dict[str, Any], writes: bool) -> None:
        """Puts the average among the weights of a checkpoint, once, instead of among the optimiser's states.

        Args:
            checkpoint: what Lightning is about to write.
            writes: whether this process writes it; others would only spend memory.
        """
        if writes:
            weights = self.drafter.state_dict()
            average = {f"{AVERAGE}.{name}": tensor.to("cpu", copy=True) for name, tensor in weights.items()}
            checkpoint["state_dict"].update(average)
        for saved in checkpoint.get("optimizer_states", []):
            saved["state"] = {number: _without_average(state) for number, state in saved["state"].items()}

    def load_average(
        self, average: Mapping[str, Tensor], checkpoint: dict[str, Any], groups: Iterable[dict[str, Any]]
    ) -> None:
        """Undoes save_average.

        Args:
            average: what pop_average took out of the checkpoint's weights.
            checkpoint: the rest of it.
            groups: the optimiser's, in the order in which its states are numbered.
        """
        self.drafter.load_state_dict({name.removeprefix(f"{AVERAGE}."): tensor for name, tensor in average.items()})
        names = {id(weight): name for name, weight in self.trained.named_parameters()}
        trained = [names[id(weight)] for group in groups for weight in group["params"]]
        for saved in checkpoint.get("optimizer_states", []):
            for number, state in saved["state"].items():
                state[AVERAGE] = average[f"{AVERAGE}.{trained[number]}"].clone()


def pop_average(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes the average out of a checkpoint's weights.

    Args:
        weights: by name; loses the average.
    """
    return {name: weights.pop(name) for name in [*weights] if name.startswith(f"{AVERAGE}.")}


def _without_average(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != AVERAGE}
