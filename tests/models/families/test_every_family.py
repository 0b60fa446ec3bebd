"""What every family promises: training and decoding agree, tokens stay the target's, and folders are read back whole or not at all."""

from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from every_family import EVERY_FAMILY, LENGTH, OUR_FAMILIES, assert_equal_logits, batch_of, fresh, name_of
from heads import deep_target
from safetensors.torch import load_file, save_file

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.export.layouts.layouts import layouts_of, load_any, write
from draftsmith.models import Drafter, DraftLimits, Eagle3, Family, Target, TargetEnds, data_rollout
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.registry import default_limits, recorded_settings
from draftsmith.models.lora.lora_adapter import LoraSettings, add_adapter
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, path_teacher_rows, prepare, run
from draftsmith.train.drafter.starting_drafter import adopt
from draftsmith.train.losses.eager import head_cross_entropy_eager

STEPS = 3
DRAFT_IDS = torch.arange(1, 64, 2)
every_family = pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


@every_family
def test_decoding_has_the_logits_of_training_at_every_step(family: Family, target: Target) -> None:
    drafter = fresh(family, target.ends, DRAFT_IDS)
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    served = served_logits(drafter, batch, roots, STEPS)
    assert trained.shape == (3, STEPS, len(DRAFT_IDS))
    assert_equal_logits(served, trained)


@every_family
def test_a_run_of_the_same_settings_has_nothing_to_say_of_the_drafter_that_it_starts_from(
    family: Family, target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    switched_on = {"prefix_layer": True} if "prefix_layer" in signature(family.settings).parameters else {}
    for settings in (family.settings(), family.settings(**switched_on)):
        settings.build(target.ends, None, STEPS, "").save_pretrained(tmp_path)
        adopt(tmp_path, settings, target.ends, "")
    assert "not used" not in caplog.text


@every_family
def test_a_tree_has_the_logits_of_its_chains(family: Family, target: Target) -> None:
    drafter = fresh(family, target.ends, DRAFT_IDS)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch_of(target, drafter), 7)
    assert len(in_tree) > STEPS, "it has branches"
    assert_equal_logits(in_tree, in_chain)


@pytest.mark.parametrize("family", [*OUR_FAMILIES, "p-eagle"], ids=lambda each: getattr(each, "name", each))
@torch.no_grad()
def test_a_drafter_says_whether_its_steps_read_what_was_drafted(family: Family | str, target: Target) -> None:
    if isinstance(family, str):
        drafter: Drafter = Eagle3.for_target(target.ends, num_draft_steps=STEPS, mask_token_id=63).eval()
    else:
        drafter = fresh(family, target.ends)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    other_tokens = torch.cat([rollout.tokens[:, :1], (rollout.tokens[:, 1:] + 1) % 64], dim=1)
    own, other = (drafter.teacher_forced(batch, each) for each in (rollout, replace(rollout, tokens=other_tokens)))
    assert torch.equal(own, other) == (not drafter.reads_drafted)


@every_family
def test_the_tokens_are_the_targets_own(family: Family, target: Target) -> None:
    drafter, prompts = fresh(family, target.ends), [[1, 5, 9], [1, 7, 7, 30, 2]]
    settings = GenerationSettings(max_new_tokens=16)
    plain = Engine(target).generate(prompts, settings)
    for limits in (default_limits(drafter, DraftLimits(2, STEPS)), DraftLimits(3, STEPS, node_budget=6)):
        drafted = Engine(target, drafter, limits).generate(prompts, settings)
        assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]


@every_family
@pytest.mark.parametrize("distillation", ["none", "path", "acceptance"])
def test_the_loss_is_that_of_each_steps_own_head(family: Family, target: Target, distillation: str) -> None:
    drafter = fresh(family, target.ends, DRAFT_IDS)
    objective = {
        "none": Objective(STEPS),
        "path": Objective(STEPS, "path"),
        "acceptance": Objective(STEPS, "path", divergence="lk_hybrid", text_weight=0.1, d_pace=0.5),
    }[distillation]
    lesson = prepare(objective, batch_of(target, drafter), inverse_draft_ids(drafter.draft_ids(), 64))
    weights = torch.tensor([1.0, 0.5, 0.25])
    sums = run(objective, lesson, drafter, target.ends, weights, True)
    inputs = drafter.teacher_forced(lesson.batch, lesson.rollout)
    assert sums.top1 is not None
    for step in range(STEPS):
        one = slice(step, step + 1)
        place = (lesson.draft_targets[:, one], lesson.rollout.valid[:, one], weights[one])
        alone = head_cross_entropy_eager(inputs[one], drafter.step_weight(step), *place, drafter.correction_weight)
        assert alone.top1 is not None
        assert sums.top1[step] == alone.top1[0]
        assert sums.rows[step] == alone.rows[0]
        if distillation == "none":
            torch.testing.assert_close(sums.loss_sum[step], alone.loss_sum[0])
    torch.testing.assert_close(sums.total, (weights * sums.loss_sum).sum())
    sums.total.backward()
    trained = [weight for weight in drafter.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)


@every_family
def test_path_distillation_asks_for_the_targets_distribution_once_a_position(
    family: Family, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = fresh(family, target.ends)
    lesson = prepare(Objective(STEPS, "path"), batch_of(target, drafter), inverse_draft_ids(drafter.draft_ids(), 64))
    rows: list[int] = []
    logits = TargetEnds.logits

    def counted(ends: TargetEnds, states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return logits(ends, states)

    monkeypatch.setattr(TargetEnds, "logits", counted)
    run(Objective(STEPS, "path"), lesson, drafter, target.ends, torch.ones(STEPS), True)
    predicted = path_teacher_rows(lesson.rollout, LENGTH)[lesson.rollout.valid]
    assert sum(rows) == len(predicted.unique()) < len(predicted)


@every_family
def test_a_folder_is_read_back_whole_or_not_at_all(family: Family, target: Target, tmp_path: Path) -> None:
    drafter = fresh(family, target.ends, DRAFT_IDS)
    for layout in layouts_of(family)[::-1][:1] + layouts_of(family)[:1]:
        folder = tmp_path / layout.name
        folder.mkdir()
        write(drafter, folder, layout.name, target.ends)
        again = load_any(folder, target.ends)
        assert type(again) is family.drafter
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in drafter.state_dict().items())
    file = tmp_path / "draftsmith" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN|finite"):
        load_drafter(file.parent)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_drafter(file.parent)


@every_family
def test_provenance_holds_the_name_of_the_record(family: Family) -> None:
    settings = family.settings()
    recorded = recorded_settings(settings)
    assert recorded.pop("family") == family.name
    assert recorded == settings.settings()


@every_family
def test_a_fresh_adapter_changes_nothing(family: Family, target: Target) -> None:
    drafter = fresh(family, target.ends)
    batch = batch_of(target, drafter)
    before = trained_logits(drafter, batch, [2, 9], STEPS)
    add_adapter(drafter, LoraSettings(rank=2), "a")
    torch.testing.assert_close(trained_logits(drafter, batch, [2, 9], STEPS), before)
    assert_equal_logits(served_logits(drafter, batch, [2, 9], STEPS), before)
