"""What the caller lends to decoding comes back as it was: drafters, adapters' drafters and judges, their targets, modes and configs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, greedy_by_hand, random_target

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.adapter_engine import AdapterEngine
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.models import Drafter, DraftLimits, Eagle, Eagle3, ReDrafter, Target
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.judge import POST_NORM, Judge, JudgeConfig
from draftsmith.models.lora.lora_adapter import AdapterBond, LoraSettings, add_adapter, save_adapter

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7]]
REQUEST = GenerationSettings(max_new_tokens=8)
FAMILIES = (ReDrafter, Eagle, Eagle3)


@pytest.fixture(scope="module")
def targets() -> tuple[Target, Target]:
    """Two targets of one shape and other weights; nothing says which is whose."""
    return random_target(), random_target(seed=1)


def fresh(family: type[Drafter], target: Target) -> Drafter:
    torch.manual_seed(0)
    drafter: Drafter = family.for_target(target.ends)  # type: ignore[attr-defined]
    drafter.config.target_fingerprint = ""
    return drafter.train()


def condition(drafter: Drafter) -> dict[str, Any]:
    """Everything about a drafter that a borrower could change."""
    return {
        "ends": drafter.ends,
        "config": drafter.config.to_dict(),
        "modules": [(name, type(part), part.training) for name, part in drafter.named_modules()],
        "weights": [(name, id(weight), weight.requires_grad) for name, weight in drafter.named_parameters()],
        "attributes": {name: id(value) for name, value in vars(drafter).items() if name != "config"},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_with_different_targets_share_one_drafter_in_turns(
    targets: tuple[Target, Target], family: type[Drafter]
) -> None:
    drafter = fresh(family, targets[0])
    before = condition(drafter)
    engines = [Engine(target, drafter, DraftLimits(2, 3, node_budget=4)) for target in targets]
    alone = [
        Engine(target, copy.deepcopy(drafter), DraftLimits(2, 3, node_budget=4)).generate(PROMPTS, REQUEST)
        for target in targets
    ]
    for _ in range(2):
        for engine, expected in zip(engines, alone, strict=True):
            replies = engine.generate(PROMPTS, REQUEST)
            assert [reply.token_ids for reply in replies] == [
                greedy_by_hand(engine.target, prompt, 8) for prompt in PROMPTS
            ]
            assert [reply.accepted for reply in replies] == [reply.accepted for reply in expected]
    assert condition(drafter) == before


def test_decoding_never_drops_out_even_while_the_drafter_trains(targets: tuple[Target, Target]) -> None:
    """Engines run in evaluation mode; afterwards each part is in the mode it was in."""
    drafter = fresh(ReDrafter, targets[0])
    assert isinstance(drafter, ReDrafter)
    first, second = drafter.lm_head[0], drafter.lm_head[1]
    modes: list[bool] = []
    first.register_forward_pre_hook(lambda part, inputs: modes.append(part.training))
    second.eval()
    Engine(targets[0], drafter).generate(PROMPTS, REQUEST)
    assert modes
    assert not any(modes)
    assert (first.training, second.training) == (True, False)


def test_a_drafter_comes_out_of_an_engine_that_refuses_it_as_it_was(targets: tuple[Target, Target]) -> None:
    drafter = fresh(Eagle, targets[0])
    drafter.config.target_fingerprint, targets[1].ends.fingerprint = "a" * 64, "b" * 64
    before = condition(drafter)
    with pytest.raises(ValueError, match="was trained for target"):
        Engine(targets[1], drafter)
    targets[1].ends.fingerprint = ""
    assert condition(drafter) == before


def test_a_view_for_any_target_decodes_with_a_foreign_one_and_the_drafter_still_refuses_it(
    targets: tuple[Target, Target],
) -> None:
    drafter = fresh(ReDrafter, targets[0])
    foreign = random_target(seed=2)
    drafter.config.target_fingerprint, foreign.ends.fingerprint = "a" * 64, "b" * 64
    [reply] = Engine(foreign, drafter.for_any_target()).generate(PROMPTS[:1], REQUEST)
    assert reply.token_ids == greedy_by_hand(foreign, PROMPTS[0], 8)
    with pytest.raises(ValueError, match="was trained for target"):
        drafter.bound(foreign.ends)
    assert drafter.config.target_fingerprint == "a" * 64


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_leave_the_drafter_below_them_as_it_was(
    targets: tuple[Target, Target], family: type[Drafter], tmp_path: Path
) -> None:
    drafter = fresh(family, targets[0])
    adapted = fresh(family, targets[0])
    add_adapter(adapted, LoraSettings(rank=2), "a")
    adapted.config.score_scale = 2.0
    (tmp_path / "sums").mkdir()
    save_adapter(adapted, tmp_path / "sums", "a", AdapterBond.of(adapted, "drafter", module_fingerprint(drafter)))
    before = condition(drafter)
    engine = AdapterEngine(targets[0], drafter, {"sums": tmp_path / "sums"})
    engine.generate(PROMPTS, REQUEST, ["sums", None])
    assert condition(drafter) == before


def test_a_rule_takes_a_copy_of_its_judge(targets: tuple[Target, Target]) -> None:
    target = targets[0]
    judge = Judge(JudgeConfig(hidden_size=target.ends.hidden_size, feature=POST_NORM, threshold=0.5))
    rule = JudgeRule(judge)
    drafter = fresh(ReDrafter, target)
    for each in targets:
        assert Engine(each, drafter, rule=rule).generate(PROMPTS, REQUEST)
    with pytest.raises(ValueError, match="attached to no target"):
        judge.log_odds(torch.zeros(target.ends.hidden_size))
