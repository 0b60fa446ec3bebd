"""Logits that stop being numbers while a text is decoded end the decoding with an error, in place of a text of garbage."""

from __future__ import annotations

import pytest
import torch
from doubles import BOS, PlannedDrafter, random_target
from torch import Tensor, nn

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import Choices, GenerationSettings
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


@pytest.mark.parametrize("asks_for_probs", [False, True])
def test_only_nodes_that_a_row_went_through_count(asks_for_probs: bool) -> None:
    logits_BNV = torch.zeros(2, 3, 4)
    logits_BNV[0, 1, 2] = float("nan")  # a branch that the walk of row 0 leaves aside
    logits_BNV[1, 2] = -torch.inf  # where row 1 ends its path
    path_BE = torch.tensor([[0, 2, 0], [0, 2, 0]])
    choices = Choices(logits_BNV, GenerationSettings(temperature=1.0), None, torch.zeros(2, 3, dtype=torch.int64))
    if asks_for_probs:
        choices.probs()
    assert broken_nodes(choices.soundness(), path_BE).tolist() == [[False] * 3, [False, True, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("asked", ["probs", "tokens", "nothing"])
def test_logits_are_called_sound_by_the_same_rule_whatever_was_asked_for_before(asked: str, value: float) -> None:
    """Of 700 tokens, one that holds NaN or infinity is enough; minus infinity rules a token out, and is no fault unless all hold it."""
    logits_BNV = torch.randn(1, 4, 700, generator=torch.Generator().manual_seed(0))
    logits_BNV[0, 1, 650] = value
    logits_BNV[0, 2] = value
    choices = Choices(logits_BNV, GenerationSettings(temperature=1.0), None, torch.zeros(1, 4, dtype=torch.int64))
    if asked != "nothing":
        getattr(choices, asked)()
    assert choices.soundness().isnan().tolist() == [[False, value != -float("inf"), True, False]]
