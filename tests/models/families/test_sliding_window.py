"""A sliding window of EAGLE's own layer is the same in training, in decoding, in trees and in ragged batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles import BOS, VOCAB, ragged_drafts, random_target, served_logits
from heads import shaken
from torch import Tensor
from transformers import AutoModel

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.export.layouts.llama import llama_fields
from draftsmith.models import DraftLimits, Eagle, Eagle3, PackedBatch, Target, data_rollout
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.eagle_base import EagleBase

FAMILIES = (Eagle, Eagle3)
WINDOW = 5
TEXT = [BOS, 5, 6, 20, 21, 22, 23, 24, 5, 9, 8, 40, 41, 3, 7, 30]
SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def windowed(family: type[Eagle] | type[Eagle3], target: Target, window: int | None = WINDOW) -> EagleBase:
    return shaken(family.for_target(target.ends, sliding_window=window))


def batch_of(target: Target, drafter: EagleBase, prompt_length: int) -> PackedBatch:
    output, places = target.prefix(torch.tensor([TEXT]), layers=drafter.features), torch.arange(len(TEXT))
    return PackedBatch(
        input_ids=torch.tensor(TEXT),
        loss_mask=places >= prompt_length,
        document_ids=torch.zeros_like(places),
        positions=places,
        hidden={name: output.feature(name)[0].clone() for name in drafter.features},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_serving_see_the_same_window(family: type[Eagle] | type[Eagle3], target: Target) -> None:
    steps, prompt_length = 4, 9
    drafter = windowed(family, target)
    batch = batch_of(target, drafter, prompt_length)
    with torch.no_grad():
        trained = drafter.rollout_logits(drafter.teacher_forced(batch, data_rollout(batch, steps)))
    served = served_logits(target, drafter, TEXT[: prompt_length + steps], steps)
    torch.testing.assert_close(served, trained[:, 0], rtol=1e-4, atol=1e-4)
    whole = served_logits(target, windowed(family, target, None), TEXT[: prompt_length + steps], steps)
    assert not torch.allclose(served, whole, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_text_changes_nothing(family: type[Eagle] | type[Eagle3], target: Target) -> None:
    logits = [served_logits(target, windowed(family, target, window), TEXT, 4) for window in (len(TEXT), None)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_of_a_tree_see_what_they_see_in_a_chain(family: type[Eagle] | type[Eagle3], target: Target) -> None:
    drafter = windowed(family, target)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch_of(target, drafter, 3), 11)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_have_the_logits_that_they_have_alone(
    family: type[Eagle] | type[Eagle3], target: Target
) -> None:
    drafter, limits = windowed(family, target), DraftLimits(2, 3, node_budget=6)
    texts = torch.randint(0, VOCAB, (3, 18), generator=torch.Generator().manual_seed(3)).tolist()
    roots = [[11, 1, 3], [12, 4, 6], [15, 6, 8]]
    layers = [([7, 9], [0, 0]), ([30, 4, 8], [0, 1, 0])]

    @torch.no_grad()
    def logits(rows: list[int], fixed: bool) -> list[Tensor]:
        places = [[each[row] for row in rows] for each in roots]
        drafts = []
        for draft in ragged_drafts(target, drafter, [texts[row] for row in rows], places, limits, fixed):
            nodes = [draft.begin()]
            for layer in layers:
                nodes.append(draft.extend(*(torch.tensor([numbers] * len(rows)) for numbers in layer)))
            drafts.append(torch.cat(nodes, dim=1))
        return drafts

    for fixed in (False, True):
        together = logits([0, 1, 2], fixed)
        for row in range(3):
            for ours, alone in zip(together, logits([row], fixed=False), strict=True):
                torch.testing.assert_close(ours[row], alone[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "limits", [DraftLimits(draft_length=4), DraftLimits(3, 3, node_budget=6)], ids=["chain", "tree"]
)
def test_a_batch_decodes_what_its_rows_decode_alone(limits: DraftLimits, target: Target) -> None:
    engine = Engine(target, windowed(Eagle, target), limits)
    prompts = [TEXT, TEXT[:3], TEXT[:9]]
    together = engine.generate(prompts, SETTINGS)
    for prompt, row in zip(prompts, together, strict=True):
        [alone] = engine.generate([prompt], SETTINGS)
        assert (row.token_ids, row.accepted) == (alone.token_ids, alone.accepted)
    assert [row.token_ids for row in together] == [row.token_ids for row in Engine(target).generate(prompts, SETTINGS)]


def test_the_window_is_saved_and_engines_do_not_read_it(target: Target, tmp_path: Path) -> None:
    drafter = windowed(Eagle3, target)
    drafter.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.sliding_window == WINDOW
    with pytest.raises(
        ValueError, match=r"sliding_window 5, and draftsmith writes no engine's layout.*--layout draftsmith"
    ):
        llama_fields(drafter.config, torch.float32, target.ends)


def test_no_draft_is_deeper_than_the_window(target: Target) -> None:
    with pytest.raises(ValueError, match="sliding_window is 5 and draft_length 6; a draft lies within the window"):
        windowed(Eagle, target).check_depth(DraftLimits(draft_length=6))
    for family in (EagleFamily(sliding_window=2), Eagle3Family(sliding_window=2)):
        with pytest.raises(ValueError, match="sliding_window is 2 and num_steps 3"):
            family.build(target.ends, None, 3, "")
    assert EagleFamily(sliding_window=3).build(target.ends, None, 3, "").config.sliding_window == 3
