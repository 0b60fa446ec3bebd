"""ReDrafter's head: its search against brute force, training against serving, its vocabulary and its bond to a target."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from doubles import BOS, draft, random_target, served_logits
from transformers import AutoModel

from draftsmith.models import (
    PRE_NORM,
    DraftLimits,
    PackedBatch,
    ReDrafter,
    Target,
    data_rollout,
    local_rollout,
)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def shaken(drafter: ReDrafter, seed: int = 0) -> ReDrafter:
    """Random weights everywhere, so that no part of the head is an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter


def packed(target: Target, texts: list[list[int]], masks: list[list[int]]) -> PackedBatch:
    hidden = [target.prefix(torch.tensor([text])).pre_norm[0] for text in texts]
    return PackedBatch(
        input_ids=torch.tensor([token for text in texts for token in text]),
        loss_mask=torch.tensor([kept for mask in masks for kept in mask]).bool(),
        document_ids=torch.tensor([i for i, text in enumerate(texts) for _ in text]),
        positions=torch.tensor([p for text in texts for p in range(len(text))]),
        hidden={PRE_NORM: torch.cat(hidden).clone()},
    )


def test_data_rollout_never_crosses_samples_or_reaches_prompt_tokens(target: Target) -> None:
    batch = packed(target, [[BOS, 5, 6, 7], [BOS, 8, 9]], [[0, 1, 1, 1], [0, 0, 1]])
    rollout = data_rollout(batch, 2)
    assert rollout.anchors.tolist() == [0, 1, 2, 5]
    assert rollout.tokens[:2].tolist() == [[5, 6], [6, 7]]
    assert rollout.targets[:2, 0].tolist() == [6, 7]
    assert rollout.valid.tolist() == [[True, True], [True, False], [False, False], [False, False]]


def test_a_supervised_gap_ends_the_rollout(target: Target) -> None:
    batch = packed(target, [[BOS, 5, 6, 7, 8]], [[0, 1, 0, 1, 1]])
    rollout = data_rollout(batch, 3)
    assert rollout.anchors.tolist() == [0, 2, 3]
    assert rollout.valid.tolist() == [[False] * 3, [True, False, False], [False] * 3]


def test_local_rollout_follows_the_greedy_tokens_and_says_how_to_get_them(target: Target) -> None:
    batch = packed(target, [[BOS, 5, 6]], [[0, 1, 1]])
    with pytest.raises(ValueError, match="--local-horizon 3"):
        local_rollout(batch, 2)
    with_greedy = PackedBatch(**{**vars(batch), "greedy_ids": torch.arange(9).reshape(3, 3)})
    rollout = local_rollout(with_greedy, 2)
    assert rollout.anchors.tolist() == [0, 1]
    assert rollout.tokens.tolist() == [[0, 1], [3, 4]]
    assert rollout.targets.tolist() == [[1, 2], [4, 5]]
    assert rollout.valid.all()
    ended = local_rollout(with_greedy, 2, eos_token_ids=(1, 3))
    assert ended.valid.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("exit_dim", [32, 64, 48])
@pytest.mark.parametrize("rnn", [True, False])
def test_training_and_serving_give_the_same_scores_at_every_step(target: Target, exit_dim: int, rnn: bool) -> None:
    drafter = shaken(ReDrafter.for_target(target.ends, exit_dim=exit_dim, head_init="random", rnn=rnn)).eval()
    text, prompt_length = [BOS, 5, 6, 20, 21, 22, 23, 24], 3
    batch = packed(target, [text], [[0] * prompt_length + [1] * 5])
    rollout = data_rollout(batch, 4)
    taught = torch.nn.functional.linear(drafter.teacher_forced(batch, rollout), drafter.head_weight).log_softmax(-1)
    served = served_logits(target, drafter, text[: prompt_length + 4], 4).log_softmax(-1)
    torch.testing.assert_close(served, taught[:, 0], rtol=1e-4, atol=1e-4)


def test_the_beam_holds_the_likeliest_paths_among_all(target: Target) -> None:
    ids = torch.tensor([3, 9, 17, 30, 44])
    drafter = shaken(ReDrafter.for_target(target.ends, draft_token_ids=ids, head_init="random"), seed=5).eval()
    batch = packed(target, [[BOS, 7, 9, 3]], [[0, 0, 1, 1]])
    scores = {}
    for path in itertools.product(range(5), repeat=2):
        text = torch.tensor([BOS, 7, 9, *(int(ids[place]) for place in path)])
        trial = PackedBatch(text, torch.tensor([0, 0, 1, 1, 1]).bool(), torch.zeros(5, dtype=torch.int64), torch.arange(5),
                            {PRE_NORM: torch.cat([batch.hidden[PRE_NORM], batch.hidden[PRE_NORM][:1]])})  # fmt: skip
        logits = torch.nn.functional.linear(drafter.teacher_forced(trial, data_rollout(trial, 2)), drafter.head_weight)
        steps = logits.log_softmax(-1)[:, 0]
        scores[tuple(int(ids[place]) for place in path)] = (steps[0, path[0]] + steps[1, path[1]]).item()
    tree = draft(target, drafter, [[BOS, 7, 9]], DraftLimits(5, 2))
    leaves = {}
    for node in range(tree.num_nodes):
        if tree.depths_BN[0, node] == 2:
            parent = int(tree.parents_BN[0, node])
            leaves[(int(tree.tokens_BN[0, parent]), int(tree.tokens_BN[0, node]))] = tree.scores_BN[0, node].item()  # type: ignore[index]
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:5]
    assert set(leaves) == set(best)
    for path, score in leaves.items():
        assert score == pytest.approx(scores[path], abs=1e-4)


def test_more_nodes_than_the_budget_are_never_proposed(target: Target) -> None:
    drafter = shaken(ReDrafter.for_target(target.ends, head_init="random")).eval()
    texts = [[BOS, 7], [BOS, 8]]
    for limits in (DraftLimits(1, 5), DraftLimits(6, 4), DraftLimits(6, 4, node_budget=7)):
        assert draft(target, drafter, texts, limits).num_nodes <= limits.max_nodes
    likely = draft(target, drafter, texts, DraftLimits(6, 4, min_probability=0.02))
    assert likely.scores_BN is not None
    assert float(likely.scores_BN[likely.valid_BN].min().exp()) >= 0.02
    with pytest.raises(ValueError, match="the draft vocabulary has"):
        draft(target, drafter, texts, DraftLimits(100, 2))


def test_a_head_from_the_target_starts_as_its_next_token_guess(target: Target) -> None:
    for exit_dim in (32, 64):
        drafter = ReDrafter.for_target(target.ends, exit_dim=exit_dim, head_init="target")
        if exit_dim == 32:
            with torch.no_grad():
                drafter.input_proj.weight[:, 32:].zero_()
        context = torch.randn(4, 1, 32)
        got = drafter.step_logits(context, torch.randn(4, 3, 32))
        torch.testing.assert_close(got, target.ends.head(context).expand(-1, 3, -1))


def test_saving_and_loading_keeps_weights_vocabulary_and_bond(target: Target, tmp_path: Path) -> None:
    drafter = shaken(ReDrafter.for_target(target.ends, draft_token_ids=torch.tensor([1, 5, 9, 60])))
    drafter.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, ReDrafter)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drafter.state_dict().items())
    assert again.draft_ids().tolist() == [1, 5, 9, 60]
    assert again.d2t is not None
    assert again.d2t.tolist() == [1, 4, 7, 57]
    again.attach(target.ends)
    with pytest.raises(ValueError, match="trained for target 'tiny-llama'"):
        again.attach(random_target("llama", seed=1).ends)
    with pytest.raises(ValueError, match="strictly increasing"):
        again.set_draft_ids(torch.tensor([5, 1, 9, 60]))


def test_another_tokenizer_is_refused(target: Target) -> None:
    drafter = ReDrafter.for_target(target.ends, tokenizer_fingerprint="a" * 64)
    drafter.check_tokenizer("a" * 64)
    with pytest.raises(ValueError, match="another tokenizer"):
        drafter.check_tokenizer("b" * 64)
