"""What a batch teaches: packing changes nothing, masked tokens matter to nobody, and each index shift by example."""

from dataclasses import replace

import pytest
import torch
from training import HIDDEN, VOCAB

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.drafter.family_settings import most_frequent
from draftsmith.train.drafter.metrics import means, pool
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, path_teacher_rows, prepare, run
from draftsmith.train.losses import OUTSIDE, StepSums

STEPS = 3


def make_batch(lengths: list[int], prompt: int = 2) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(
        input_ids=torch.randint(0, VOCAB, (total,), generator=generator),
        loss_mask=positions >= prompt,
        document_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        positions=positions,
        hidden={PRE_NORM: torch.randn(total, HIDDEN, generator=generator)},
        greedy_ids=torch.randint(0, VOCAB, (total, STEPS + 1), generator=generator),
    )


def slice_batch(batch: PackedBatch, start: int, stop: int) -> PackedBatch:
    assert batch.greedy_ids is not None
    return PackedBatch(
        batch.input_ids[start:stop],
        batch.loss_mask[start:stop],
        batch.document_ids[start:stop],
        batch.positions[start:stop],
        {PRE_NORM: batch.hidden[PRE_NORM][start:stop]},
        batch.greedy_ids[start:stop],
    )


@pytest.fixture
def drafter(target: Target) -> ReDrafter:
    torch.manual_seed(0)
    kept = torch.arange(1, VOCAB, 2)
    made = ReDrafter.for_target(target.ends, draft_token_ids=kept, num_draft_steps=STEPS)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made


LOSSES: dict[str, dict[str, object]] = {
    "none": {},
    "path": {},
    "local": {},
    "path, dspark": {"divergence": "l1", "text_weight": 0.1, "d_pace": 0.5},
}


def sums_of(batch: PackedBatch, drafter: Drafter, target: Target, name: str, acceptance: bool = False) -> StepSums:
    objective = Objective(STEPS, name.partition(",")[0], **LOSSES[name])  # type: ignore[arg-type]
    lesson = prepare(objective, batch, inverse_draft_ids(drafter.draft_ids(), VOCAB))
    sums = run(objective, lesson, drafter, target.ends, torch.ones(STEPS), True, acceptance=acceptance)
    torch.testing.assert_close(sums.loss_rows, lesson.loss_rows.float())
    return sums


@pytest.mark.parametrize("distillation", LOSSES)
def test_the_loss_of_packed_samples_is_that_of_the_single_ones(
    target: Target, drafter: ReDrafter, distillation: str
) -> None:
    lengths = [7, 2, 11, 5]
    batch = make_batch(lengths)
    packed = sums_of(batch, drafter, target, distillation)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    singles = [
        sums_of(slice_batch(batch, start, start + length), drafter, target, distillation)
        for start, length in zip(starts, lengths, strict=True)
    ]
    for name in ("total", "loss_sum", "loss_rows", "rows", "top1", "top5"):
        together = torch.stack([getattr(single, name) for single in singles]).sum(0)
        torch.testing.assert_close(getattr(packed, name), together, msg=name)
    assert packed.rows.min() > 0


@pytest.mark.parametrize("distillation", ["none", "path"])
def test_states_of_prompt_tokens_but_the_last_change_nothing(
    target: Target, drafter: ReDrafter, distillation: str
) -> None:
    batch = make_batch([9, 8], prompt=3)
    states = batch.hidden[PRE_NORM].clone()
    states[batch.positions < 2] = 1e4
    before = sums_of(batch, drafter, target, distillation)
    after = sums_of(replace(batch, hidden={PRE_NORM: states}), drafter, target, distillation)
    assert torch.equal(before.loss_sum, after.loss_sum)


def test_the_path_teacher_of_an_anchor_is_the_state_before_each_predicted_token() -> None:
    empty = torch.zeros(1, 2, dtype=torch.int64)
    rollout = Rollout(torch.tensor([3]), empty, empty, torch.ones(1, 2, dtype=torch.bool))
    assert path_teacher_rows(rollout, 10).tolist() == [[4, 5]]
    assert path_teacher_rows(rollout, 5).tolist() == [[4, 4]]


def test_a_perfect_path_teacher_is_matched_by_its_own_logits(target: Target) -> None:
    """At the first step a drafter that is the target's head over the right state has no divergence left."""
    batch = make_batch([8])

    class Cheat(ReDrafter):
        def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> torch.Tensor:
            rows = path_teacher_rows(rollout, len(batch.input_ids))
            return target.ends.final_norm(batch.hidden[PRE_NORM][rows.T])

    cheat = Cheat.for_target(target.ends, num_draft_steps=STEPS)
    sums = sums_of(batch, cheat, target, "path")
    torch.testing.assert_close(sums.loss_sum, torch.zeros(STEPS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("distillation", ["none", "path", "path, dspark"])
def test_the_acceptance_is_that_of_the_whole_target_by_a_drafter_of_some_tokens(
    target: Target, drafter: ReDrafter, distillation: str
) -> None:
    batch = make_batch([9, 8])
    accepted = sums_of(batch, drafter, target, distillation, acceptance=True).accepted
    lesson = prepare(Objective(STEPS), batch, inverse_draft_ids(drafter.draft_ids(), VOCAB))
    states = batch.hidden[PRE_NORM][path_teacher_rows(lesson.rollout, len(batch.input_ids))]
    target_probs = target.ends.logits(target.ends.final_norm(states)).softmax(-1)[..., drafter.draft_ids()]
    inputs = drafter.teacher_forced(batch, lesson.rollout)
    draft_probs = torch.stack([drafter.logits(inputs[step], step) for step in range(STEPS)]).softmax(-1)
    shared = torch.minimum(target_probs.transpose(0, 1), draft_probs).sum(-1)
    assert accepted is not None
    torch.testing.assert_close(accepted, torch.where(lesson.rollout.valid.T, shared, 0.0))
    assert not accepted.requires_grad


def test_acceptance_along_the_targets_own_continuation_is_not_claimed(target: Target, drafter: ReDrafter) -> None:
    """The states of the text say nothing about tokens that the text does not hold."""
    assert sums_of(make_batch([9]), drafter, target, "local", acceptance=True).accepted is None


def test_expected_tokens_add_up_the_chances_that_a_step_is_reached() -> None:
    accepted = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    ones = torch.ones(2)
    sums = StepSums(torch.zeros(()), ones, 2 * ones, 2 * ones, ones, ones, accepted=accepted)
    named = means(pool(sums), Objective(2), "val")
    assert (named["val/step0/acceptance"], named["val/step1/acceptance"]) == (0.75, 0.25)
    assert named["val/expected_tokens_per_step"] == 1.0 + 0.75 + (0.25 + 0.0) / 2
    assert "val/expected_tokens_per_step" not in means(pool(replace(sums, accepted=None)), Objective(2), "val")


def test_draft_ids_are_inverted() -> None:
    assert inverse_draft_ids(torch.tensor([1, 3]), 4).tolist() == [OUTSIDE, 0, OUTSIDE, 1]


def test_the_draft_vocabulary_is_the_most_frequent_tokens_in_order() -> None:
    assert most_frequent(torch.tensor([5, 0, 9, 5, 1]), 3).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="below the target's vocabulary of 5"):
        most_frequent(torch.zeros(5), 5)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"num_steps": 0}, "at least 1"), ({"horizon_decay": 1.5}, "at most 1"), ({"chunk_rows": 0}, "at least 1")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Objective(**({"num_steps": 2} | settings))  # type: ignore[arg-type]


def test_later_steps_weigh_less_under_a_horizon_decay() -> None:
    weights = Objective(3, horizon_decay=0.5).horizon_weights(torch.device("cpu"))
    assert weights.tolist() == [1.0, 0.5, 0.25]
