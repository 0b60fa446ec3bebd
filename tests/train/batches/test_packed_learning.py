"""Packed, bucketed and single samples teach the same."""

from dataclasses import replace

import pytest
import torch
from every_family import EVERY_FAMILY, TWO_LAYERS, for_two_layers
from training import VOCAB

from draftsmith.data.shards.eight_bit import EightBitStates, quantise
from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run
from draftsmith.train.judge.data import JudgeTokens
from draftsmith.train.judge.fit import SweepProblem, measure_scaling
from draftsmith.train.losses import TopEmphasis

STEPS = 3
LAYERS = TWO_LAYERS
DRAFT_IDS = torch.arange(1, VOCAB, 2)
# Losses and settings that suit some families, and every family with the loss that suits all.
RECIPES: dict[str, tuple[DrafterFamily, Objective, torch.Tensor | None]] = {
    "redrafter, none": (ReDrafterFamily(), Objective(STEPS, "none"), None),
    "redrafter, local": (ReDrafterFamily(), Objective(STEPS, "local"), None),
    "eagle, none": (EagleFamily(), Objective(1, "none"), None),
    "eagle, path, features": (EagleFamily(), Objective(1, "path", feature_weight=1.0, logit_weight=0.1), DRAFT_IDS),
    "hass": (
        EagleFamily(),
        Objective(STEPS, "path", feature_weight=1.0, logit_weight=0.1, emphasis=TopEmphasis(1.0, 5)),
        None,
    ),
    "eagle3": (Eagle3Family(layers=list(LAYERS)), Objective(STEPS, "path", 0.8), None),
    "eagle3, half the tokens": (
        Eagle3Family(layers=list(LAYERS)),
        Objective(STEPS, "path", 0.8, skip_outside=True),
        DRAFT_IDS,
    ),
    **{
        f"{family.name}, path, half the tokens": (for_two_layers(family), Objective(STEPS, "path"), DRAFT_IDS)
        for family in EVERY_FAMILY
    },
}


@pytest.fixture(scope="module")
def samples(target: Target) -> list[CachedSample]:
    """Texts of very different lengths with the target's own states; the shortest has nothing to learn from."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate([9, 30, 4, 17, 12, 2]):
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        with torch.no_grad():
            states = target.prefix(ids[None], layers=LAYERS)
        found.append(
            CachedSample(
                id=f"s{number}",
                input_ids=ids,
                loss_mask=torch.arange(length) >= 2,
                hidden={layer: states.feature(layer)[0] for layer in LAYERS},
                greedy_ids=torch.randint(0, VOCAB, (length, STEPS + 1), generator=generator),
            )
        )
    return found


def shaken(family: DrafterFamily, target: Target, draft_ids: torch.Tensor | None) -> Drafter:
    torch.manual_seed(0)
    drafter = family.build(target.ends, draft_ids, STEPS, "")
    for weight in drafter.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return drafter


def learn(
    drafter: Drafter, target: Target, objective: Objective, batches: list[PackedBatch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss over the rows of all batches together, and its gradients."""
    lessons = [prepare(objective, batch, inverse_draft_ids(drafter.draft_ids(), VOCAB)) for batch in batches]
    rows = torch.stack([lesson.loss_rows for lesson in lessons]).sum(0)
    weights = objective.horizon_weights(rows.device) / rows
    drafter.zero_grad()
    total = torch.zeros(())
    for lesson in lessons:
        sums = run(objective, lesson, drafter, target.ends, weights, metrics=True)
        sums.total.backward()
        total = total + sums.total.detach()
    return total, {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_bucketed_and_single_samples_teach_the_same(
    target: Target, samples: list[CachedSample], recipe: str
) -> None:
    family, objective, draft_ids = RECIPES[recipe]
    drafter = shaken(family, target, draft_ids)
    by_length = sorted(samples, key=lambda sample: len(sample.input_ids))
    layouts = {
        "single": [pack([sample]) for sample in samples],
        "packed": [pack(samples)],
        "two packs": [pack(samples[:2]), pack(samples[2:])],
        "padded": [pack(samples, pad_to=8)],
        "bucketed": [pack(by_length[:3], pad_to=4), pack(by_length[3:], pad_to=4)],
    }
    expected, gradients = learn(drafter, target, objective, layouts.pop("single"))
    assert float(expected) != 0.0
    assert gradients
    for name, batches in layouts.items():
        loss, found = learn(drafter, target, objective, batches)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert found.keys() == gradients.keys()
        for weight, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[weight], rtol=1e-4, atol=1e-6, msg=f"{name}: {weight}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_stands_in_the_padding_matters_to_nobody(target: Target, samples: list[CachedSample], recipe: str) -> None:
    family, objective, draft_ids = RECIPES[recipe]
    drafter = shaken(family, target, draft_ids)
    batch = pack(samples, pad_to=16)
    is_padding = batch.document_ids >= len(samples)
    assert 0.3 < is_padding.float().mean() < 0.7
    other = replace(
        batch,
        input_ids=batch.input_ids.masked_fill(is_padding, 5),
        hidden={name: states.masked_fill(is_padding[:, None], 1e3) for name, states in batch.hidden.items()},
    )
    loss, gradients = learn(drafter, target, objective, [batch])
    other_loss, other_gradients = learn(drafter, target, objective, [other])
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_padding_lies_behind_each_sample_in_documents_of_its_own(samples: list[CachedSample]) -> None:
    chosen = [samples[2], samples[5]]
    batch = pack(chosen, pad_to=3)
    assert batch.document_ids.tolist() == [0, 0, 0, 0, 2, 2, 1, 1, 3, 3, 3, 3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
    assert batch.loss_mask.tolist() == [False, False, True, True, *[False] * 8]
    assert batch.input_ids[:4].tolist() == chosen[0].input_ids.tolist()
    assert batch.input_ids[[4, 5, 8, 9, 10, 11]].tolist() == [0] * 6
    assert batch.hidden[PRE_NORM][[4, 5, 8, 9, 10, 11]].abs().sum() == 0
    torch.testing.assert_close(batch.hidden[PRE_NORM][6:8], chosen[1].hidden[PRE_NORM])
    assert batch.greedy_ids is not None
    assert batch.greedy_ids.shape == (12, STEPS + 1)
    with pytest.raises(ValueError, match="pad_to is 0"):
        pack(chosen, pad_to=0)


@pytest.mark.parametrize("pad_to", [None, 8])
def test_states_of_eight_bits_are_packed_as_each_sample_has_them(
    samples: list[CachedSample], pad_to: int | None
) -> None:
    narrow = []
    for sample in samples:
        pairs = {layer: quantise(states) for layer, states in sample.hidden.items()}
        codes, scales = ({layer: [pair[place]] for layer, pair in pairs.items()} for place in (0, 1))
        narrow.append(replace(sample, hidden=EightBitStates(codes, scales, [sample.id])))
    wide = [replace(sample, hidden=dict(sample.hidden)) for sample in narrow]
    for layers in (None, [PRE_NORM]):
        found, expected = pack(narrow, layers, pad_to), pack(wide, layers, pad_to)
        assert found.hidden.keys() == expected.hidden.keys()
        assert all(torch.equal(states, expected.hidden[layer]) for layer, states in found.hidden.items())
    assert expected.hidden[PRE_NORM].dtype == torch.bfloat16


def test_the_judges_loss_is_the_same_over_any_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator)
    labels = torch.rand(50, generator=generator) > 0.3
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    l2 = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    theta = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    found = []
    for part_tokens in (1, 7, 50, 4096):
        tokens = JudgeTokens(features, labels, torch.arange(50), part_tokens, on_device=True)
        scaling = measure_scaling(tokens, 6, torch.device("cpu"), lambda values: values)
        problem = SweepProblem(tokens, labels, weights / weights.sum(), scaling, l2, lambda values: values)
        problem.open(theta)
        found.append((problem.losses(theta), problem.gradient(theta)))
    for losses, gradient in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-10, atol=1e-13)
