"""The loss among candidates, by hand."""

import torch

from draftsmith.train.losses.selector import selector_loss
from draftsmith.train.losses.sums import OUTSIDE


def test_rows_are_scored_among_the_candidates_of_decoding_and_their_own_token() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 4 + 2, generator=generator).requires_grad_()
    head, correction = (torch.randn(7, size, generator=generator) for size in (4, 2))
    correction.requires_grad_()
    targets = torch.tensor([[1, 3], [6, OUTSIDE], [2, 0]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    step_weights, row_weights = torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 1.0], [0.25, 1.0], [1.0, 1.0]])
    sums = selector_loss(inputs, head, correction, targets, valid, step_weights, 3, 2, row_weights)
    expected, recalled = torch.zeros(()), [0.0, 0.0]
    for step, anchor in ((0, 0), (0, 1), (0, 2), (1, 0)):
        base = (inputs[step, anchor, :4].detach() @ head.T).log_softmax(-1)
        target = int(targets[anchor, step])
        ids = base.topk(3).indices.tolist()
        recalled[step] += target in ids
        ids = ids if target in ids else [*ids[:2], target]
        scores = base[ids] + correction[ids] @ inputs[step, anchor, 4:]
        weight = step_weights[step] * row_weights[anchor, step]
        expected = expected - weight * scores.log_softmax(-1)[ids.index(target)]
    torch.testing.assert_close(sums.total, expected)
    assert sums.recalled.tolist() == recalled
    assert 0 < sum(recalled) < 4, "both kinds of rows are here"
    wanted = torch.autograd.grad(expected, [inputs, correction], retain_graph=True)
    grads = torch.autograd.grad(sums.total, [inputs, correction])
    torch.testing.assert_close(grads, wanted)
    assert not grads[0][..., :4].any(), "the block learns by its own loss"
