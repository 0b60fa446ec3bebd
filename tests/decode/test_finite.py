"""Logits that stop being numbers while a text is decoded end the decoding with an error, in place of a text of garbage."""

from __future__ import annotations

import pytest
import torch
from doubles import BOS, PlannedDrafter, random_target
from torch import Tensor, nn

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models import DraftLimits
from draftsmith.models.files.finite import broken_nodes

LIMITS = DraftLimits(beam_width=2, draft_length=3)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_request_whose_logits_turn_into_no_numbers_is_named(drafted: bool, value: float) -> None:
    target = random_target()
    drafter = PlannedDrafter(target, "half") if drafted else None
    engine, calls = Engine(target, drafter, LIMITS), []

    def poison(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(len(output))
        if len(calls) > 3 and len(output) == 2:
            output[1] = value

    target.ends.head.register_forward_hook(poison)
    with pytest.raises(
        ValueError, match=r"tiny-llama: the logits behind token \d+ of prompt 1 hold NaN or infinity \(float32\)"
    ):
        engine.generate([[BOS, 4, 5], [BOS, 9]], GenerationSettings(max_new_tokens=20))


def test_only_nodes_that_a_row_went_through_count() -> None:
    logits_BNV = torch.zeros(2, 3, 4)
    logits_BNV[0, 1, 2] = float("nan")  # a branch that the walk of row 0 leaves aside
    logits_BNV[1, 2] = -torch.inf  # where row 1 ends its path
    path_BE = torch.tensor([[0, 2, 0], [0, 2, 0]])
    assert broken_nodes(logits_BNV.amax(-1), path_BE).tolist() == [[False] * 3, [False, True, False]]
