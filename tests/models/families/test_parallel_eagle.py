"""P-EAGLE: an EAGLE-3 whose later steps read a mask, by hand and in decoding; no drafted token changes a draft."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_family import batch_of
from heads import DRAFT_IDS, TEXT, FilesForward, deep_target, our_logits, shaken
from safetensors.torch import load_file, save_file

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.evaluate.roofline.bytes_read import draft_bytes
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.models import DraftLimits, Eagle3, Eagle3Config, SampledChildren, Target, data_rollout
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.rollout import fewer_depths
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.train.drafter.objective import Objective

STEPS, MASK = 3, 63


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, **settings: object) -> Eagle3:
    """Random everywhere."""
    family = Eagle3Family(mask_token_id=MASK, **settings)  # type: ignore[arg-type]
    drafter = shaken(family.build(target.ends, torch.tensor(DRAFT_IDS), STEPS, ""))
    assert isinstance(drafter, Eagle3)
    return drafter


@torch.no_grad()
def test_every_step_is_that_of_an_eagle_3_over_masks(target: Target, tmp_path: Path) -> None:
    drafter, anchor = made(target), 5
    fields = drafter.config.to_dict() | {"parallel": False, "mask_token_id": None}
    ordinary = Eagle3(Eagle3Config.from_dict(fields)).eval()
    ordinary.load_state_dict({name: part for name, part in drafter.state_dict().items() if name != "mask_hidden"})
    ordinary.attach(target.ends)
    write(ordinary, tmp_path, "eagle3", target.ends)
    files, logits = FilesForward(tmp_path, target), our_logits(target, drafter, STEPS)
    assert drafter.mask_hidden is not None
    masked = drafter.mask_hidden[0] @ files.tensors["fc.weight"].T
    for step in range(STEPS):
        embedded = files.embedded(TEXT[1 : anchor + 2] + [MASK] * step)
        known = torch.cat([files.known(TEXT[: anchor + 1]), masked[None].expand(-1, step, -1)], dim=1)
        by_hand = files.logits(files.outputs(embedded, known))[-1]
        torch.testing.assert_close(logits[step, anchor], by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_decoding_has_the_logits_of_training_and_a_tree_those_of_its_chains(target: Target, window: int | None) -> None:
    drafter = made(target, sliding_window=window)
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_logits(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)
    batch.input_ids[8] = (batch.input_ids[8] + 1) % 64
    torch.testing.assert_close(trained_logits(drafter, batch, [7], STEPS)[0], trained[1])


def test_rows_of_different_lengths_get_the_targets_own_tokens(target: Target) -> None:
    drafter, prompts = made(target), [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    for limits, temperature in (
        (DraftLimits(1, 1), 0.0),
        (DraftLimits(3, STEPS, node_budget=7), 0.0),
        (DraftLimits(2, STEPS), 1.0),
    ):
        settings = GenerationSettings(max_new_tokens=6, temperature=temperature)
        plain = Engine(target).generate(prompts, settings)
        drafted = Engine(target, drafter, limits).generate(prompts, settings, num_rows=2)
        assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]
        fixed = Engine(target, drafter, limits, runner=lambda cycle: cycle).generate(prompts, settings, num_rows=2)
        assert [reply.token_ids for reply in fixed] == [reply.token_ids for reply in plain]
    sampled = Engine(target, drafter, DraftLimits(sampled=SampledChildren((1,) * STEPS)))
    assert [len(reply.token_ids) for reply in sampled.generate(prompts, settings)] == [6, 6, 6]


def test_a_draft_is_one_pass_and_a_folder_keeps_the_mask(target: Target, tmp_path: Path) -> None:
    drafter = made(target)
    assert len(draft_bytes(drafter, DraftLimits(1, STEPS)).steps) == 1
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert isinstance(again, Eagle3)
    assert again.config.mask_token_id == MASK
    assert torch.equal(again.state_dict()["mask_hidden"], drafter.state_dict()["mask_hidden"])


@torch.no_grad()
def test_steps_that_do_not_count_are_not_computed(target: Target) -> None:
    drafter = made(target)
    batch = batch_of(target, drafter)
    whole = data_rollout(batch, STEPS)
    torch.manual_seed(0)
    fewer = fewer_depths(whole, 0.6)
    outputs, drawn = drafter.teacher_forced(batch, whole), drafter.teacher_forced(batch, fewer)
    kept_KA = fewer.valid.T
    torch.testing.assert_close(drawn[kept_KA], outputs[kept_KA])
    zeros = drafter.head_inputs(torch.zeros(drafter.config.hidden_size))
    assert torch.equal(drawn[1:][~kept_KA[1:]], zeros.expand(int((~kept_KA[1:]).sum()), -1))
    assert 0 < int(kept_KA[2].sum()) < int(whole.valid[:, 2].sum())


def test_a_deeper_step_is_kept_where_the_one_before_is_and_at_a_falling_share(target: Target) -> None:
    valid = torch.ones(1000, 5, dtype=torch.bool)
    valid[900:, 2:] = False
    whole = replace(data_rollout(batch_of(target, made(target)), 5), valid=valid)
    torch.manual_seed(3)
    kept = fewer_depths(whole, 0.5).valid
    assert kept.sum(0).tolist() == [1000, 500, 225, 180, 180], "a fifth at the least"
    assert bool((kept[:, 1:] <= kept[:, :-1]).all())
    assert not bool((kept & ~valid).any())
    assert torch.equal(fewer_depths(whole, 1.0).valid, valid)


@pytest.mark.parametrize("layout", ["peagle", "speculators"])
@torch.no_grad()
def test_a_folder_for_engines_comes_back_and_names_its_mask(target: Target, tmp_path: Path, layout: str) -> None:
    drafter = made(target)
    write(drafter, tmp_path, layout, target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["mask_token_id"], fields["norm_before_residual"]) == (MASK, False)
    assert fields.get("pard_token") == (MASK if layout == "peagle" else None), (
        "vLLM copies it for folders of the package"
    )
    kind = fields.get("speculators_model_type", fields["architectures"][0])
    assert kind == {"peagle": "LlamaForCausalLMEagle3", "speculators": "peagle"}[layout]
    assert load_file(tmp_path / "model.safetensors")["mask_hidden"].shape == (1, 1, 3 * 32)
    again = load_any(tmp_path, target.ends)
    assert isinstance(again, Eagle3)
    before, after = drafter.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch = batch_of(target, drafter)
    torch.testing.assert_close(
        trained_logits(again.bound(target.ends), batch, [5], STEPS), trained_logits(drafter, batch, [5], STEPS)
    )
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"mask_hidden": tensors["mask_hidden"][0].clone()}, file)  # [1, n D], as some software has it
    assert torch.equal(load_any(tmp_path, target.ends).state_dict()["mask_hidden"], before["mask_hidden"])
    del fields["mask_token_id"]
    fields.pop("pard_token", None)
    for own in ({"ptd_token_id": MASK}, {"pard_token": MASK, "parallel_drafting": True}):
        (tmp_path / "config.json").write_text(json.dumps(fields | own))
        assert load_any(tmp_path, target.ends).config.mask_token_id == MASK
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="so it is a P-EAGLE, and names no mask_token_id"):
        load_any(tmp_path, target.ends)


def test_a_p_eagle_that_does_not_fit_is_an_error(target: Target, tmp_path: Path) -> None:
    drafter = made(target)
    for layout in ("eagle3", "tensorrt-llm"):
        with pytest.raises(ValueError, match="is a P-EAGLE"):
            write(drafter, tmp_path, layout, target.ends)
    ordinary = shaken(Eagle3Family().build(target.ends, None, STEPS, ""))
    with pytest.raises(ValueError, match=r"no P-EAGLE .* use --layout eagle3"):
        write(ordinary, tmp_path, "peagle", target.ends)
    with pytest.raises(ValueError, match=r"depth_share is 0\.7, and Eagle3 computes every step; set it to 1"):
        Objective(STEPS, depth_share=0.7).check(ordinary)
    with pytest.raises(ValueError, match="detach_steps is true, and no step of a P-EAGLE"):
        Eagle3Family(mask_token_id=MASK, detach_steps=True).build(target.ends, None, STEPS, "")
    with pytest.raises(ValueError, match="mask_token_id 64, which is not below the target's vocabulary of 64"):
        Eagle3Family(mask_token_id=64).build(target.ends, None, STEPS, "")
    with pytest.raises(
        ValueError, match="parallel True and mask_token_id None, of which a drafter has both or neither"
    ):
        Eagle3(Eagle3Config.from_dict(drafter.config.to_dict() | {"mask_token_id": None}))
