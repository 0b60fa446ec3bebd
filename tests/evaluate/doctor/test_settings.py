"""Weights under another setting than the one they were trained with: the doctor names the setting that fits them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heads import deep_target
from torch import Tensor

from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.doctor import alignment
from draftsmith.evaluate.doctor.alignment import check_settings, guesses
from draftsmith.models import Drafter, Eagle3, PackedBatch, Target, data_rollout
from draftsmith.models.drafters.drafter_reader import assemble
from draftsmith.models.families.block import BlockDrafter
from draftsmith.models.families.riders.mtp import MtpHead

LAYERS = (*(f"layer.{number}.output" for number in range(7)), "last.pre_norm")
LENGTH = 40
READ = ["layer.1.output", "layer.3.output", "layer.5.output"]


@pytest.fixture(scope="module")
def target() -> Target:
    """Its final norm has weights of its own, so that states before and behind it differ in direction."""
    made_target = deep_target()
    with torch.no_grad():
        weight = made_target.ends.norm.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    return made_target


def made(target: Target, name: str) -> Drafter:
    """A drafter of random weights."""
    ends = target.ends
    fresh: Drafter
    if name == "block":
        fresh = BlockDrafter.for_target(ends, layers=READ, num_draft_layers=1, num_draft_steps=3, mask_token_id=63)
    elif name == "eagle3":
        fresh = Eagle3.for_target(ends, layers=READ)
    else:
        fresh = MtpHead.for_target(ends)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return fresh.eval()


def own_text(drafter: Drafter, size: int) -> CachedSample:
    """A text in which the drafter's first step is always right: token by token what it says over random states."""
    generator = torch.Generator().manual_seed(2)
    states = {name: torch.randn(LENGTH, size, generator=generator) for name in LAYERS}
    ids = torch.randint(0, 60, (LENGTH,), generator=generator)
    labelled = torch.arange(LENGTH) >= 2
    for anchor in range(LENGTH - 2):
        ids[anchor + 2] = first_guess(drafter, ids, states, anchor)
    return CachedSample("own", ids, labelled, states, None)


def first_guess(drafter: Drafter, ids: Tensor, states: dict[str, Tensor], anchor: int) -> int:
    batch = PackedBatch(
        input_ids=ids,
        loss_mask=torch.ones(LENGTH, dtype=torch.bool),
        document_ids=torch.zeros(LENGTH, dtype=torch.int64),
        positions=torch.arange(LENGTH),
        hidden={name: states[name] for name in drafter.features},
    )
    rollout = data_rollout(batch, 1)
    return int(guesses(drafter, batch, rollout)[rollout.anchors.tolist().index(anchor), 0])


def under(drafter: Drafter, target: Target, **changes: Any) -> Drafter:
    """The same weights with a config that says something else."""
    kind = type(drafter)
    config = kind.config_class.from_dict(drafter.config.to_dict() | changes)
    other: Drafter = assemble(kind, config, drafter.state_dict())
    return other.attach(target.ends)


WRONG = {
    "the place of EAGLE-3's norm": ("eagle3", {"norm_before_residual": True}, "norm_before_residual false"),
    "what an MTP layer reads first": ("mtp", {"state_first": True}, "state_first false"),
    "an MTP layer before the norm": ("mtp", {"reads_normed": False}, "reads_normed true"),
    "causality": ("block", {"causal": True}, "causal false"),
    "the first slot": ("block", {"sample_from_anchor": True}, "sample_from_anchor false"),
    "layers counted from 1": (
        "block",
        {"layers": ["layer.2.output", "layer.4.output", "layer.6.output"]},
        f"layers {', '.join(READ)}",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_setting_that_the_weights_were_not_trained_with_is_named(
    target: Target, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, named = WRONG[fault]
    right = made(target, name)
    sample = own_text(right, target.ends.hidden_size)
    monkeypatch.setattr(alignment, "_FED", 1)  # the text is right at the first step alone

    def looked_at(drafter: Drafter) -> Any:
        inputs = SimpleNamespace(folder="head")
        return check_settings(
            SimpleNamespace(trainable=drafter, samples=(sample,), ends=target.ends, target=None, inputs=inputs)  # type: ignore[arg-type]
        )

    finding = looked_at(right)
    assert (finding.verdict, finding.figures["as configured"]) == ("ok", 1.0)
    finding = looked_at(under(right, target, **changes))
    assert finding.verdict == "fault"
    assert f"trained with {named}: correct that in the config.json of head" in finding.remedy
    assert finding.figures[named] == 1.0


RIGHT_40 = torch.ones(40, 1, dtype=torch.int8)
NEVER = torch.zeros(40, 2, dtype=torch.int8)


def gained(count: int) -> Tensor:
    """Right at so many places of the first step, and nowhere else."""
    outcomes = NEVER.clone()
    outcomes[:count, 0] = 1
    return outcomes


@pytest.mark.parametrize(
    ("own", "other", "share", "verdict"),
    [
        pytest.param(NEVER, gained(9), 9 / 80, "ok", id="three deviations"),
        pytest.param(NEVER, gained(10), 10 / 80, "fault", id="more than three"),
        pytest.param(
            gained(40), torch.cat([RIGHT_40, -RIGHT_40], dim=1), 1.0, "ok", id="right as often, with a step less"
        ),
    ],
)
def test_a_lead_that_chance_explains_is_no_fault(
    target: Target, own: Tensor, other: Tensor, share: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another setting is right more often by five points and more, over the predictions that it makes."""
    drafter, rival = made(target, "eagle3"), made(target, "mtp")
    monkeypatch.setattr(alignment, "variants", lambda case: iter([("other", rival)]))
    monkeypatch.setattr(alignment, "_outcomes", lambda case, looked, steps: own if looked is drafter else other)
    case = SimpleNamespace(trainable=drafter, samples=(), target=None, inputs=SimpleNamespace(folder="head"))
    finding = check_settings(case)  # type: ignore[arg-type]
    assert (finding.verdict, finding.figures["other"]) == (verdict, share)


def test_a_setting_that_leads_clearly_is_named_behind_one_that_chance_explains(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The higher one wins 75 predictions and loses 45, the lower one wins 27 and loses 3."""
    names = ("own", "higher", "lower")
    drafters = dict(zip(names, (made(target, "eagle3"), made(target, "mtp"), made(target, "mtp")), strict=True))
    outcomes = {name: torch.zeros(200, 1, dtype=torch.int8) for name in names}
    outcomes["own"][:100] = 1
    outcomes["higher"][45:175] = 1
    outcomes["lower"][3:127] = 1
    of = {id(drafter): outcomes[name] for name, drafter in drafters.items()}
    monkeypatch.setattr(alignment, "variants", lambda case: ((name, drafters[name]) for name in names[1:]))
    monkeypatch.setattr(alignment, "_outcomes", lambda case, looked, steps: of[id(looked)])
    inputs = SimpleNamespace(folder="head")
    case = SimpleNamespace(trainable=drafters["own"], samples=(), target=None, inputs=inputs)
    finding = check_settings(case)  # type: ignore[arg-type]
    assert (finding.figures["higher"], finding.figures["lower"]) == (0.65, 0.62)
    assert (finding.verdict, finding.remedy[:35]) == ("fault", "the weights were trained with lower")
