"""What a target thinks of a token: six numbers, from whole texts as from drafts."""

import math

import pytest
import torch
from doubles import random_target

from draftsmith.models.opinion import confidence, opinion, opinion_of_text
from draftsmith.models.target.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def test_the_six_numbers_by_hand() -> None:
    before = confidence(torch.tensor([3.0, 1.0]).log().log_softmax(-1))
    after = confidence(torch.tensor([1.0, 1.0]).log_softmax(-1))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = [math.log(0.25), math.log(0.75), math.log(1 / 3), entropy, math.log(2), math.log(0.5)]
    assert opinion(torch.tensor(0.25).log(), before, after).tolist() == pytest.approx(expected)


def test_a_token_that_the_request_rules_out_has_numbers_all_the_same() -> None:
    before = confidence(torch.tensor([0.0, -torch.inf]).log_softmax(-1))
    numbers = opinion(torch.tensor(-torch.inf), before, before)
    assert numbers.tolist() == [-30.0, 0.0, -30.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("logits_at_a_time", [1, 2**24])
def test_a_text_is_read_as_the_targets_own_forward_reads_it(
    target: Target, logits_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftsmith.models.opinion._LOGITS_AT_A_TIME", logits_at_a_time)
    ids = torch.tensor([1, 7, 9, 3, 30, 5, 11])
    read = target.prefix(ids[None])
    numbers = opinion_of_text(target.ends, read.pre_norm[0], ids, torch.tensor([1, 2, 5, 6]))
    log_probs = target.logits(read.normed)[0].log_softmax(-1)
    for row, position in zip(numbers, (1, 2, 5, 6), strict=True):
        before, after = log_probs[position - 1], log_probs[position]
        own = before[ids[position]]
        entropies = [float(-(at.exp() * at).sum()) for at in (before, after)]
        expected = [own, before.max(), own - before.max(), *entropies, after.max()]
        assert row.tolist() == pytest.approx([float(number) for number in expected], abs=1e-5)


def test_the_first_token_of_a_text_is_an_error(target: Target) -> None:
    with pytest.raises(ValueError, match="no opinion of a text's first token"):
        opinion_of_text(target.ends, torch.zeros(3, target.ends.hidden_size), torch.arange(3), torch.tensor([0, 1]))
