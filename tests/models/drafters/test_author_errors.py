"""What the author of a family reads who got a method, a config or a build wrong: which one, what it gave, what it must give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubles import draft
from every_family import EVERY_FAMILY, fresh, name_of
from heads import deep_target
from parallel_heads import ParallelDraft, ParallelHeads, ParallelHeadsConfig, ParallelHeadsFamily
from torch import Tensor

from draftsmith.models import PRE_NORM, Drafter, DrafterConfig, DraftLimits, Family, PackedBatch, Target
from draftsmith.models.drafters.drafter_reader import drafter_config, read_drafter
from draftsmith.models.drafters.family import fresh_drafter
from draftsmith.models.files.field_rules import COUNT
from draftsmith.models.lora.lora_adapter import LoraSettings, add_adapter
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run

STEPS, LENGTH = 3, 12
LIMITS = DraftLimits(2, STEPS)
TEXT = [1, 5, 9, 20]


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target(num_layers=3)


def heads(target: Target) -> ParallelHeads:
    drafter = ParallelHeadsFamily().build(target.ends, None, STEPS, "")
    assert isinstance(drafter, ParallelHeads)
    return drafter


def train_on(target: Target, drafter: Drafter) -> None:
    """One batch through the training's loss."""
    generator = torch.Generator().manual_seed(0)
    batch = PackedBatch(
        input_ids=torch.randint(0, 64, (LENGTH,), generator=generator),
        loss_mask=torch.arange(LENGTH) >= 2,
        document_ids=torch.zeros(LENGTH, dtype=torch.int64),
        positions=torch.arange(LENGTH),
        hidden={PRE_NORM: torch.randn(LENGTH, 32, generator=generator)},
    )
    lesson = prepare(Objective(STEPS), batch, inverse_draft_ids(torch.arange(64), 64))
    run(Objective(STEPS), lesson, drafter, target.ends, torch.ones(STEPS), False)


WRONG_IN_TRAINING = {
    "no tensor": (
        "teacher_forced",
        lambda good: list(good),
        r"ParallelHeads.teacher_forced gave a list; .*\[3, 10, any\]: \[K, A, E\]",
    ),
    "steps and anchors swapped": (
        "teacher_forced",
        lambda good: good.transpose(0, 1),
        r"ParallelHeads.teacher_forced gave float32 \[10, 3, 32\]; it must give floats \[3, 10, any\]: \[K, A, E\]",
    ),
    "one step": ("teacher_forced", lambda good: good[0], r"teacher_forced gave float32 \[10, 32\]"),
    "token ids": ("teacher_forced", lambda good: good.long(), r"teacher_forced gave int64 .* must give floats"),
    "another width": (
        "teacher_forced",
        lambda good: good[..., :16],
        r"ParallelHeads.step_weight\(0\) gave float32 \[64, 32\]; it must give floats \[64, 16\]: \[Vd, E\]",
    ),
    "a transposed head": ("step_weight", lambda good: good.T, r"step_weight\(0\) gave float32 \[32, 64\]"),
    "no head": ("step_weight", lambda good: None, r"step_weight\(0\) gave a NoneType"),
}


@pytest.mark.parametrize("case", WRONG_IN_TRAINING)
def test_a_wrong_answer_in_training_names_the_method_and_both_shapes(
    target: Target, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, change, message = WRONG_IN_TRAINING[case]
    good = getattr(ParallelHeads, method)
    monkeypatch.setattr(ParallelHeads, method, lambda *given: change(good(*given)))
    with pytest.raises(ValueError, match=message):
        train_on(target, heads(target))


WRONG_IN_DECODING = {
    "begin without the node": (
        "begin",
        lambda good: good[:, 0],
        r"Draft.begin gave float32 \[1, 64\]; .* \[1, 1, 64\]: \[B, 1",
    ),
    "begin of another vocabulary": (
        "begin",
        lambda good: good[..., :9],
        r"ParallelDraft.begin gave float32 \[1, 1, 9\]",
    ),
    "extend of one node": (
        "extend",
        lambda good: good[:, :1],
        r"Draft.extend gave float32 \[1, 1, 64\]; .* \[1, 2, 64\]",
    ),
    "extend of ids": ("extend", lambda good: good.argmax(-1), r"ParallelDraft.extend gave int64 \[1, 2\]"),
}


@pytest.mark.parametrize("case", WRONG_IN_DECODING)
def test_a_wrong_answer_in_decoding_names_the_method_and_both_shapes(
    target: Target, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, change, message = WRONG_IN_DECODING[case]
    good = getattr(ParallelDraft, method)
    monkeypatch.setattr(ParallelDraft, method, lambda *given: change(good(*given)))
    with pytest.raises(ValueError, match=message):
        draft(target, heads(target), [TEXT], LIMITS)


WRONG_STATES: dict[str, tuple[str, Any, str]] = {
    "a state without select_rows": (
        "start",
        lambda *_: ("root", "context"),
        r"Heads.start or .*advance returned a tuple without select_rows",
    ),
    "a draft without its methods": (
        "expander",
        lambda *_: SimpleNamespace(root_B=0),
        r"SimpleNamespace without begin, extend, target_ids",
    ),
    "a string of features": (
        "features",
        "layer.0.output",
        r"ParallelHeads.features is 'layer.0.output'; it must be a tuple",
    ),
    "no depth": (
        "max_draft_steps",
        0,
        r"ParallelHeads.max_draft_steps is 0; it must be a whole number of at least 1, or None",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_a_wrong_state_draft_or_property_is_named(target: Target, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, message = WRONG_STATES[case]
    drafter = heads(target)
    monkeypatch.setattr(ParallelHeads, name, wrong)
    with pytest.raises(ValueError, match=message):
        draft(target, drafter, [TEXT], LIMITS)


def test_a_root_of_rows_that_have_left_is_named(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    good = ParallelDraft.__init__

    def with_all_rows(self: ParallelDraft, *given: Any) -> None:
        good(self, *given)
        self.root_B = torch.zeros(2, dtype=torch.int64)

    monkeypatch.setattr(ParallelDraft, "__init__", with_all_rows)
    with pytest.raises(
        ValueError, match=r"ParallelDraft.root_B gave int64 \[2\]; it must give int64 \[1\]: .*select_rows"
    ):
        draft(target, heads(target), [TEXT], LIMITS)


def test_a_family_without_a_head_is_told_which_two_it_can_give(target: Target) -> None:
    class Headless(ParallelHeads):
        step_weight = Drafter.step_weight

    with pytest.raises(
        ValueError, match=r"Headless overrides neither head_weight nor step_weight\(step\); override the one"
    ):
        Headless(heads(target).config).step_weight(0)


class OddConfig(ParallelHeadsConfig):
    """Its fields do not go together at one value."""

    model_type = "odd_heads"

    def fault(self) -> str:
        return "num_blocks 13, which is unlucky" if self.num_blocks == 13 else super().fault()


class OddHeads(ParallelHeads):
    config_class = OddConfig


class OddFamily(ParallelHeadsFamily):
    kind = OddHeads

    def build(self, ends, draft_token_ids, num_steps, tokenizer_fingerprint):  # type: ignore[no-untyped-def]
        given = (ends, draft_token_ids, num_steps, tokenizer_fingerprint)
        return OddHeads(OddConfig.for_target(*given, num_blocks=self.num_blocks)).attach(ends)


def test_a_fault_of_the_config_is_found_when_the_drafter_is_built(target: Target) -> None:
    with pytest.raises(ValueError, match="OddHeads has num_blocks 13, which is unlucky; change the settings"):
        fresh_drafter(OddFamily(num_blocks=13), target.ends, None, STEPS, "")
    with pytest.raises(ValueError, match="num_blocks 13, which is unlucky"):
        OddHeads(OddConfig(num_blocks=13, hidden_size=32, vocab_size=64))
    with pytest.raises(ValueError, match="num_blocks 13, which is unlucky"):
        drafter_config(OddHeads, {"num_blocks": 13, "hidden_size": 32, "vocab_size": 64}, "here")
    assert fresh_drafter(OddFamily(num_blocks=1), target.ends, None, STEPS, "").config.num_blocks == 1


def test_a_field_against_its_rule_is_found_when_the_drafter_is_built(target: Target) -> None:
    with pytest.raises(ValueError, match="OddHeads: num_blocks is 0, it must be a whole number of at least 1"):
        fresh_drafter(OddFamily(num_blocks=0), target.ends, None, STEPS, "")


def test_a_field_that_a_config_does_not_keep_is_named() -> None:
    class Forgetful(DrafterConfig):
        model_type = "forgetful"
        rules = {**DrafterConfig.rules, "width": COUNT}  # noqa: RUF012

        def __init__(self, width: int = 1, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.size = width

    with pytest.raises(ValueError, match=r"Forgetful keeps no width; in its __init__, set self.width = width"):
        Forgetful(hidden_size=4, vocab_size=8).check("here")


class SizedByHand(OddHeads):
    """Makes a module of what its config does not hold."""

    def widen(self) -> None:
        self.blocks.append(torch.nn.Linear(32, 32))


WRONG_BUILDS: dict[str, tuple[Any, str]] = {
    "another class": (
        lambda made, _: ParallelHeads(made.config),
        r"OddFamily.build gave a ParallelHeads; it must give a OddHeads",
    ),
    "another number of steps": (
        lambda made, _: setattr(made.config, "num_draft_steps", 9),
        r"num_draft_steps 9, this run has 3; fill",
    ),
    "another target": (
        lambda made, _: setattr(made.config, "target_fingerprint", "x"),
        r"target_fingerprint 'x', this run has",
    ),
    "a module beyond its config": (
        lambda made, _: SizedByHand.widen(made),
        r"OddFamily.build is not a whole OddHeads .*blocks.3.bias is unknown",
    ),
}


@pytest.mark.parametrize("case", WRONG_BUILDS)
def test_a_wrong_build_is_found_before_training(target: Target, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG_BUILDS[case]
    good = OddFamily.build

    def build(self: OddFamily, *given: Any) -> Drafter:
        made = good(self, *given)
        return change(made, given) or made

    monkeypatch.setattr(OddFamily, "build", build)
    with pytest.raises(ValueError, match=message):
        fresh_drafter(OddFamily(), target.ends, None, STEPS, "")


def test_a_draft_vocabulary_that_build_forgot_is_found_before_training(target: Target) -> None:
    with pytest.raises(ValueError, match=r"another draft vocabulary .* call drafter.set_draft_ids\(draft_token_ids\)"):
        fresh_drafter(OddFamily(), target.ends, torch.arange(1, 64, 2), STEPS, "")


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_every_family_builds_what_it_can_save(family: Family, target: Target) -> None:
    for ids in (None, torch.arange(1, 64, 2)):
        drafter = fresh_drafter(family.settings(), target.ends, ids, STEPS, "tokenizer")
        assert type(drafter) is family.drafter


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_a_folder_with_a_faulty_config_is_refused_by_name(family: Family, target: Target, tmp_path: Any) -> None:
    drafter = fresh(family, target.ends)
    drafter.config.draft_vocab_size = 65
    drafter.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"config.json has draft_vocab_size 65, which is above the target's vocabulary of 64"
    ):
        read_drafter(tmp_path, family.drafter)


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_an_adapted_drafter_passes_every_check(family: Family, target: Target) -> None:
    drafter = fresh(family, target.ends)
    add_adapter(drafter, LoraSettings(rank=2), "a")
    drafter.attach(target.ends)
    assert isinstance(draft(target, drafter.eval(), [TEXT, TEXT], LIMITS).tokens_BN, Tensor)
