"""The confidence head of a block drafter: its equation, the drafts that it ends, and a text that stays the target's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doubles import BOS, random_target
from every_family import batch_of
from heads import deep_target
from joint_law import chi_square_pvalue
from torch import Tensor

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.export.layouts.layouts import write
from draftsmith.models import DraftLimits, EarlyStop, SampledChildren, Target, data_rollout
from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.block import BlockDrafter
from draftsmith.models.families.block.block_correction import MarkovCorrection
from draftsmith.models.tree.search import ConfidentExpander
from draftsmith.models.tree.shapes import parse_shape

STEPS = 3


def sure_drafter(
    target: Target, correction: str = "vanilla", confidence: bool = True, with_markov: bool = True
) -> BlockDrafter:
    """A block drafter of one layer with a head that is unsure behind some tokens, random everywhere."""
    drafter = BlockDrafter.for_target(
        target.ends,
        layers=["layer.1.output"],
        sample_from_anchor=True,
        correction=correction,  # type: ignore[arg-type]
        correction_rank=5,
        correction_state=6,
        confidence=confidence,
        confidence_with_markov=with_markov,
        num_draft_steps=STEPS,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


@pytest.mark.parametrize(
    ("correction", "with_markov"),
    [("none", True), ("vanilla", True), ("vanilla", False), ("recurrent", True), ("gated", False), ("gru", True)],
)
@torch.no_grad()
def test_decoding_has_the_chances_of_training_and_of_the_equation(
    target: Target, correction: str, with_markov: bool
) -> None:
    drafter = sure_drafter(target, correction, with_markov=with_markov)
    batch, limits, root = batch_of(target, drafter), DraftLimits(1, STEPS), 7
    rollout = data_rollout(batch, STEPS)
    place = rollout.anchors.tolist().index(root - 1)
    inputs_KAE = drafter.teacher_forced(batch, rollout)
    trained_K = drafter.confidence(inputs_KAE, rollout.tokens.T)[:, place].sigmoid()
    states = {name: batch.hidden[name][None, :root] for name in drafter.features}
    known = Emitted(batch.input_ids[None, 1 : root + 1], states, torch.tensor([root]))
    draft = drafter.expander(
        drafter.start(Opening(known, batch.input_ids[:1], limits, room=24)),
        Cycle(torch.tensor([root]), [root], [root]),
        limits,
    )
    draft.begin()
    served = [draft.acceptance()]
    for step in range(1, STEPS):
        draft.extend(batch.input_ids[None, root + step, None], torch.zeros(1, 1, dtype=torch.int64))
        served.append(draft.acceptance())
    torch.testing.assert_close(torch.cat(served, 1)[0], trained_K, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    hidden_KD, tokens_K = inputs_KAE[:, place, :32], rollout.tokens[place]
    parts = [hidden_KD]
    if with_markov and isinstance(drafter.correction, MarkovCorrection):
        parts.append(drafter.correction.tokens.weight[tokens_K])
    assert drafter.confidence_head is not None
    weight, bias = drafter.confidence_head.proj.weight[0], drafter.confidence_head.proj.bias
    torch.testing.assert_close(trained_K, (torch.cat(parts, 1) @ weight + bias).sigmoid(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_chance_reads_the_token_before_it_and_none_behind(target: Target) -> None:
    drafter = sure_drafter(target)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    tokens_AK = rollout.tokens.clone()
    tokens_AK[:, 1] = (tokens_AK[:, 1] + 1) % 64

    def chances(tokens: Tensor) -> Tensor:
        changed = replace(rollout, tokens=tokens)
        return drafter.confidence(drafter.teacher_forced(batch, changed), changed.tokens.T)

    same_KA = chances(tokens_AK) == chances(rollout.tokens)
    assert same_KA.all(1).tolist() == [True, False, True], "step 1 is fed the token that step 0 would draw"


@torch.no_grad()
def test_a_head_without_markov_reads_no_token_of_the_draft(target: Target) -> None:
    drafter = sure_drafter(target, with_markov=False)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    inputs_KAE = drafter.teacher_forced(batch, rollout)
    others_KA = (rollout.tokens.T + 1) % 64
    assert torch.equal(drafter.confidence(inputs_KAE, others_KA), drafter.confidence(inputs_KAE, rollout.tokens.T))
    with pytest.raises(ValueError, match="confidence_with_markov false without confidence, whose head it is about"):
        sure_drafter(target, confidence=False, with_markov=False)


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", ["1x3e{}s0", "3x3n7e{}s0", "t2.1.1e{}s0"])
def test_the_threshold_shortens_drafts_and_changes_no_token(
    target: Target, shape: str, temperature: float, with_markov: bool
) -> None:
    drafter, prompts = sure_drafter(target, with_markov=with_markov), [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    settings = GenerationSettings(max_new_tokens=12, temperature=temperature)
    plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
    drafted = []
    for threshold in (0.0, 0.5, 0.999):
        replies = Engine(target, drafter, parse_shape(shape.format(threshold))).generate(prompts, settings)
        assert [reply.token_ids for reply in replies] == plain
        drafted.append(sum(len(reply.accepted) for reply in replies))
    assert drafted[0] <= drafted[1] <= drafted[2], "shorter drafts take more cycles"


@torch.no_grad()
def test_a_threshold_decides_node_by_node_and_costs_no_new_shapes(target: Target) -> None:
    drafter, batch = sure_drafter(target), batch_of(target, sure_drafter(target))
    known = Emitted(
        batch.input_ids[None, 1:6], {n: batch.hidden[n][None, :5] for n in drafter.features}, torch.tensor([5])
    )
    trees = []
    for threshold in (0.0, 0.5, 0.9999):
        limits = DraftLimits(2, STEPS, early_stop=EarlyStop(threshold, step=0.0))
        state = drafter.start(Opening(known, batch.input_ids[:1], limits, room=24, fixed_shapes=True))
        cycle = Cycle(torch.tensor([5]), [5], [5], torch.tensor([threshold]), fixed_shapes=True)
        trees.append(drafter.propose(state, cycle, limits))
    assert len({tree.tokens_BN.shape for tree in trees}) == 1
    sizes = [int(tree.valid_BN.sum()) for tree in trees]
    assert sizes[0] > sizes[2] > 1, "the root is always continued"
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("rule", ["mcsd", "block"])
def test_sampled_chains_that_end_where_it_is_unsure_keep_the_targets_law(rule: str) -> None:
    target = random_target()
    drafter = sure_drafter(target)
    limits = DraftLimits(
        sampled=SampledChildren((1, 1, 1), rule),  # type: ignore[arg-type]
        early_stop=EarlyStop(0.5, step=0.0),
    )
    request = GenerationSettings(max_new_tokens=3, temperature=1.2, top_k=2, seed=11)
    assert chi_square_pvalue(Engine(target, drafter, limits), [BOS, 5, 9], request, num_draws=400) > 1e-3


@pytest.mark.parametrize("with_markov", [True, False])
def test_a_folder_keeps_the_head(target: Target, tmp_path: Path, with_markov: bool) -> None:
    drafter = sure_drafter(target, with_markov=with_markov)
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert isinstance(again, BlockDrafter)
    assert again.has_confidence
    assert again.config.confidence_with_markov == with_markov
    assert torch.equal(again.state_dict()["confidence_head.proj.weight"], drafter.confidence_head.proj.weight)  # type: ignore[union-attr]


def test_a_layout_that_lacks_the_head_refuses_it(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a confidence head and the correction 'gru'"):
        write(sure_drafter(target, "gru"), tmp_path, "domino", target.ends)


def test_a_drafter_without_the_head_knows_no_chances(target: Target) -> None:
    drafter = sure_drafter(target, confidence=False)
    assert not drafter.has_confidence
    batch = batch_of(target, drafter)
    known = Emitted(
        batch.input_ids[None, 1:6], {n: batch.hidden[n][None, :5] for n in drafter.features}, torch.tensor([5])
    )
    state = drafter.start(Opening(known, batch.input_ids[:1], DraftLimits(1, STEPS), room=24))
    draft = drafter.expander(state, Cycle(torch.tensor([5]), [5], [5]), DraftLimits(1, STEPS))
    assert isinstance(draft, ConfidentExpander)
    draft.begin()
    assert draft.acceptance() is None
