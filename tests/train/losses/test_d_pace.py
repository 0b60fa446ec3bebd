"""D-PACE by hand, as the gradient of the expected number of accepted tokens, and its chunks of whole anchors."""

import pytest
import torch
from torch import Tensor

from draftsmith.train.losses.d_pace import DPace, d_pace_weights


def test_the_weights_of_two_steps_by_hand() -> None:
    chances, valid = torch.tensor([[0.5], [0.5]]), torch.ones(2, 1, dtype=torch.bool)
    assert d_pace_weights(chances, valid, 0.0).tolist() == [[0.75], [0.25]]
    assert d_pace_weights(chances, valid, 0.5).tolist() == [[0.75 + 0.75**2], [0.75**2]]


def test_steps_that_are_not_valid_end_nothing_and_depend_on_nothing() -> None:
    chances = torch.tensor([[0.5, 0.9], [0.1, 0.0], [0.1, 0.5]])
    valid = torch.tensor([[True, True], [False, False], [False, True]])
    weights = d_pace_weights(chances, valid, 0.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.9 + 0.45], [0.0, 0.45], [0.0, 0.45]]))


def test_with_the_negative_log_of_the_chances_they_give_the_gradient_of_the_expected_length() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    chances = torch.sigmoid(logits)
    [wanted] = torch.autograd.grad(-chances.cumprod(0).sum(), logits)
    weights = d_pace_weights(torch.sigmoid(logits).detach(), torch.ones(4, 3, dtype=torch.bool), 0.0)
    [found] = torch.autograd.grad((weights * -torch.sigmoid(logits).log()).sum(), logits)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 100])
def test_chunks_hold_whole_anchors_and_each_valid_row_once(chunk_rows: int) -> None:
    valid_KA = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)
    chunks: list[Tensor] = list(DPace(0.5, valid_KA).chunks(chunk_rows))
    assert all(len(chunk) <= max(2, chunk_rows) for chunk in chunks)
    rows = torch.cat(chunks).tolist()
    assert sorted(rows) == [0, 2, 3, 4, 5, 7, 8, 9], "an anchor without a valid row is left out"
    for chunk in chunks:
        steps, anchors = chunk // 5, chunk % 5
        assert torch.equal(anchors.view(2, -1)[0], anchors.view(2, -1)[1])
        assert steps.tolist() == sorted(steps.tolist())
