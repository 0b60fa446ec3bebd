"""Chimera: by hand from its three equations, an EAGLE-1 as it begins, and drafts that know their trigrams."""

import pytest
import torch
from every_family import LENGTH, assert_equal_logits, batch_of
from heads import deep_target, shaken
from torch.nn import functional as F

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.models import PRE_NORM, Chimera, DraftLimits, Eagle, PackedBatch, SampledChildren, Target, data_rollout
from draftsmith.models.families.riders.chimera import ChimeraFamily

STEPS = 4


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


@pytest.fixture(scope="module")
def drafter(target: Target) -> Chimera:
    made = shaken(ChimeraFamily().build(target.ends, None, STEPS, ""))
    assert isinstance(made, Chimera)
    return made


def trigrams_by_hand(drafter: Chimera, text: list[int]) -> torch.Tensor:
    """[T, D]: what stands for each token of a text."""
    embedded = drafter.embed(torch.tensor(text))
    rows = []
    for place in range(len(text)):
        window = [embedded[place - back] if place >= back else torch.zeros_like(embedded[0]) for back in range(3)]
        hidden = F.silu(drafter.trigram_in.weight @ torch.cat(window))
        rows.append(window[0] + drafter.trigram_out.weight @ hidden)
    return torch.stack(rows)


@torch.no_grad()
def test_every_step_is_an_eagle_1_over_trigrams_with_a_residual_block(target: Target, drafter: Chimera) -> None:
    batch, roots = batch_of(target, drafter), [2, 3, 9]
    text, states = batch.input_ids.tolist(), drafter.read(batch.hidden)
    trained = trained_logits(drafter, batch, roots, STEPS)
    trigrams, layer = trigrams_by_hand(drafter, text), drafter.layer
    for number, root in enumerate(roots):
        known = states[:root]
        for step in range(STEPS):
            joined = torch.cat([trigrams[1 : root + step + 1], known], dim=-1) @ drafter.fc.weight.T
            positions = torch.arange(len(joined))
            queries, keys, values = layer.queries_keys_values(joined, drafter.rotation(positions, joined))
            keys, values = (part.repeat_interleave(2, dim=1) for part in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) / keys.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
            output = layer.finish(joined, torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))[-1]
            head_input = output + F.silu(drafter.residual.weight @ output + drafter.residual.bias)
            assert_equal_logits(trained[number, step], target.ends.head_weight @ head_input)
            known = torch.cat([known, head_input[None]])


@torch.no_grad()
def test_it_begins_as_a_fresh_eagle_1(target: Target) -> None:
    fresh = ChimeraFamily().build(target.ends, None, STEPS, "").eval()
    eagle = Eagle.for_target(target.ends).eval()
    eagle.load_state_dict({name: tensor for name, tensor in fresh.state_dict().items() if name in eagle.state_dict()})
    batch = batch_of(target, eagle)
    ours, theirs = (trained_logits(made, batch, [2, 9], STEPS) for made in (fresh, eagle))
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_a_packed_text_reads_no_token_of_the_text_before_it(target: Target, drafter: Chimera) -> None:
    alone = batch_of(target, drafter)
    half = LENGTH // 2
    packed = PackedBatch(
        input_ids=alone.input_ids,
        loss_mask=alone.loss_mask,
        document_ids=(torch.arange(LENGTH) >= half).long(),
        positions=torch.arange(LENGTH) % half,
        hidden=alone.hidden,
    )
    second = PackedBatch(
        input_ids=alone.input_ids[half:],
        loss_mask=torch.ones(half, dtype=torch.bool),
        document_ids=torch.zeros(half, dtype=torch.int64),
        positions=torch.arange(half),
        hidden={PRE_NORM: alone.hidden[PRE_NORM][half:]},
    )
    together = drafter.teacher_forced(packed, data_rollout(packed, STEPS))
    apart = drafter.teacher_forced(second, data_rollout(second, STEPS))
    kept = (data_rollout(packed, STEPS).anchors >= half).nonzero().flatten()
    places = data_rollout(second, STEPS).anchors
    shared = torch.isin(places, data_rollout(packed, STEPS).anchors[kept] - half)
    valid = data_rollout(second, STEPS).valid[shared]
    assert_equal_logits(together[:, kept].transpose(0, 1)[valid], apart[:, shared].transpose(0, 1)[valid])


@torch.no_grad()
def test_the_first_pairs_of_a_text_are_served_as_trained(target: Target, drafter: Chimera) -> None:
    batch = batch_of(target, drafter)
    roots = [2, 3, 11]
    served = served_logits(drafter, batch, roots, STEPS)
    assert_equal_logits(served, trained_logits(drafter, batch, roots, STEPS))


def test_rows_of_different_lengths_get_the_targets_own_tokens(target: Target, drafter: Chimera) -> None:
    prompts = [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    for limits, temperature in (
        (DraftLimits(1, 1), 0.0),
        (DraftLimits(3, STEPS, node_budget=7), 0.0),
        (DraftLimits(2, 3), 1.0),
    ):
        settings = GenerationSettings(max_new_tokens=8, temperature=temperature)
        plain = Engine(target).generate(prompts, settings)
        for engine in (Engine(target, drafter, limits), Engine(target, drafter, limits, prefill_chunk=2)):
            assert [reply.token_ids for reply in engine.generate(prompts, settings)] == [r.token_ids for r in plain]
    sampled = Engine(target, drafter, DraftLimits(sampled=SampledChildren((2, 1))))
    assert len(sampled.generate(prompts, settings)) == len(prompts)
