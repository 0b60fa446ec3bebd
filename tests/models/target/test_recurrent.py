"""Targets that keep a recurrent state: their states are those of the model, chains decode exactly, the engine takes no trees."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from doubles import PlannedDrafter
from recurrent_models import CLASSES, Wavering, recurrent_model

from draftsmith.decode.engine import Engine
from draftsmith.decode.greedy_continuations import greedy_continuations
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models import DraftLimits, Target, TargetEnds
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.slots.row_caches import snapshot
from draftsmith.models.target.key_values import key_values_of
from draftsmith.models.trunk import recurrent
from draftsmith.models.trunk.trunk import PRE_NORM

PROMPTS = [[5, 9, 11], [7, 3, 8, 8, 21, 40, 17, 5, 6, 33, 12], [4], [30, 31, 32, 33, 34, 35]]
CHAIN = DraftLimits(draft_length=4)
GREEDY = GenerationSettings(max_new_tokens=24)
DRAWN = GenerationSettings(max_new_tokens=24, temperature=1.0, seed=3)


@pytest.fixture(scope="module", params=CLASSES)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.from_model(recurrent_model(request.param), f"tiny-{request.param}")


@pytest.fixture(scope="module")
def lfm2() -> Target:
    return Target.from_model(recurrent_model("Lfm2"), "tiny-Lfm2")


def replies(
    target: Target, prompts: list[list[int]], settings: GenerationSettings, num_rows: int | None = None, chunk: int = 4
) -> list[list[int]]:
    engine = Engine(target, Wavering(target), CHAIN, prefill_chunk=chunk)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generations = engine.generate(prompts, settings, num_rows=num_rows)
    assert any(0 < count < 4 for each in generations for count in each.accepted), "no draft was accepted in part"
    return [each.token_ids for each in generations]


def test_greedy_chains_give_what_transformers_generates(target: Target) -> None:
    expected = []
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([prompt])
        own = copy.deepcopy(target.model).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        expected.append(own[0, len(prompt) :].tolist())
    assert replies(target, PROMPTS[:2], GREEDY) == expected


def test_sampled_chains_of_ragged_rows_give_what_plain_decoding_gives(target: Target) -> None:
    plain = [Engine(target).generate([prompt], DRAWN, request_ids=[row])[0] for row, prompt in enumerate(PROMPTS)]
    assert replies(target, PROMPTS, DRAWN) == [each.token_ids for each in plain]


def test_states_of_a_padded_batch_are_those_of_its_texts_alone(target: Target) -> None:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in PROMPTS], batch_first=True)
    layers = ("layer.0.output", "layer.1.output")
    batch = target.prefix(ids, layers)
    for row, prompt in enumerate(PROMPTS):
        alone = target.prefix(torch.tensor([prompt]), layers)
        for name in (PRE_NORM, *layers):
            torch.testing.assert_close(
                batch.feature(name)[row, : len(prompt)], alone.feature(name)[0], atol=1e-4, rtol=1e-3
            )


def test_the_ends_load_without_the_trunk(target: Target, tmp_path: Path) -> None:
    target.model.save_pretrained(tmp_path)
    ends = TargetEnds.load(str(tmp_path))
    states = torch.randn(3, ends.hidden_size)
    torch.testing.assert_close(ends.logits(ends.final_norm(states)), target.logits(target.ends.final_norm(states)))


def test_rows_that_wait_take_the_places_of_those_that_ended(lfm2: Target) -> None:
    ends = GenerationSettings(max_new_tokens=24, eos_token_ids=(7, 11, 29))
    assert replies(lfm2, PROMPTS, ends, num_rows=2) == replies(lfm2, PROMPTS, ends)


def test_accepted_tokens_stay_pending_only_so_long(lfm2: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    often = replies(lfm2, PROMPTS, GREEDY)
    monkeypatch.setattr(recurrent, "MOST_PENDING", 6)
    assert replies(lfm2, PROMPTS, GREEDY) == often


@pytest.mark.parametrize(
    "limits", [DraftLimits(2, 3), DraftLimits(paths=((0,), (1,))), DraftLimits(3, 2, 4)], ids=["beams", "static", "dynamic"]
)  # fmt: skip
def test_trees_are_refused_by_name(lfm2: Target, limits: DraftLimits) -> None:
    with pytest.raises(ValueError, match=r"is a tree, but tiny-Lfm2 keeps a recurrent state.*draft a chain such as 1x"):
        Engine(lfm2, Wavering(lfm2), limits)


def test_a_drafter_that_proposes_a_tree_all_the_same_is_an_error(lfm2: Target) -> None:
    engine = Engine(lfm2, PlannedDrafter(lfm2, "random", width=2, depth=2), DraftLimits(draft_length=2))
    with pytest.raises(ValueError, match=r"proposed a tree.*recurrent state"):
        engine.generate(PROMPTS[:1], GREEDY)


def test_that_rows_are_read_one_by_one_is_said_once(lfm2: Target) -> None:
    engine = Engine(lfm2)
    with pytest.warns(UserWarning, match="tiny-Lfm2 keeps a recurrent state: its rows are read one by one"):
        engine.generate(PROMPTS, GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(PROMPTS, GREEDY)


def test_reading_with_masks_is_refused_by_name(lfm2: Target) -> None:
    with pytest.raises(ValueError, match=r"tiny-Lfm2 keeps a recurrent state.*give a target whose layers all attend"):
        greedy_continuations(lfm2, torch.tensor([[5, 6, 7]]), num_tokens=2)


def test_a_snapshot_stays_as_it_was(target: Target) -> None:
    cache = target._trunk.row_cache()  # type: ignore[attr-defined]
    ids = torch.tensor([[5, 9, 11, 12]])

    def read(part: torch.Tensor, into: object) -> torch.Tensor:
        return target(part, cache=into, positions=torch.arange(2, 3)[None], mask=None).normed

    target(ids[:, :2], cache=cache, positions=torch.arange(2)[None], mask=None)
    kept, again = snapshot(cache), snapshot(cache)
    expected = read(ids[:, 2:3], kept)
    read(ids[:, 3:], cache)
    torch.testing.assert_close(read(ids[:, 2:3], again), expected)


def test_layers_with_a_recurrent_state_count_no_keys_and_values(target: Target) -> None:
    kinds = target.config.layer_types
    sizes = [layer.token_bytes for layer in key_values_of(target)]
    assert [size > 0 for size in sizes] == [kind == "full_attention" for kind in kinds]


def test_a_draft_lm_with_a_recurrent_state_is_refused_by_name(lfm2: Target) -> None:
    with pytest.raises(ValueError, match="tiny-Lfm2 keeps a recurrent state, which a draft LM cannot take back"):
        LMDrafter(lfm2)
