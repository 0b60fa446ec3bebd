"""Drafters that ride through the target: what enters, drafts in every shape, compiled cycles, folders, and what is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from doubles import BOS, draft, random_target, ridden
from every_family import batch_of
from heads import deep_target
from torch import Tensor

from draftsmith.decode.engine import Engine
from draftsmith.decode.runners import CompiledRunner
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.models import Drafter, DraftLimits, SampledChildren, Target, TargetEnds, data_rollout
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.riders.rider_drafter import (
    RiderConfig,
    RiderDrafter,
    RiderFamily,
    RiderKind,
    usual_entries,
)

STEPS = 3
PROMPTS = [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
every_kind = pytest.mark.parametrize("kind", get_args(RiderKind))


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, kind: RiderKind, draft_ids: Tensor | None = None, **settings: Any) -> RiderDrafter:
    """Random everywhere."""
    drafter = RiderFamily(riders=kind, **settings).build(target.ends, draft_ids, STEPS, "")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


@every_kind
@torch.no_grad()
def test_decoding_has_the_logits_of_training(target: Target, kind: RiderKind) -> None:
    drafter = made(target, kind, torch.arange(1, 64, 2))
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_logits(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_engine_hands_over_what_rode_behind_the_last_accepted_token(target: Target) -> None:
    drafter = made(target, "hidden_transfer")
    ids = batch_of(target, drafter).input_ids.tolist()
    seen: dict[int, Tensor] = {}
    drafted = RiderDrafter.expander

    def watched(self: RiderDrafter, state: Any, cycle: Any, limits: Any) -> Any:
        seen[cycle.host_lengths[0]] = state.context_BD[0].clone()
        return drafted(self, state, cycle, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RiderDrafter, "expander", watched)
        engine = Engine(target, drafter, DraftLimits(2, STEPS), prefill_chunk=4)
        [reply] = engine.generate([ids[:9]], GenerationSettings(max_new_tokens=14))
    text = torch.tensor([*ids[:9], *reply.token_ids])
    assert len(seen) > 3
    for length, state in seen.items():
        alone = ridden(target, drafter.riders, text[:length])
        torch.testing.assert_close(state, alone[-1], rtol=1e-4, atol=1e-4)


@every_kind
def test_rows_get_the_targets_own_tokens_in_every_shape(target: Target, kind: RiderKind) -> None:
    drafter = made(target, kind)
    shapes = (DraftLimits(1, 2), DraftLimits(3, STEPS, node_budget=7), DraftLimits(paths=((0,), (1,), (0, 0))))
    for temperature in (0.0, 1.0):
        settings = GenerationSettings(max_new_tokens=6, temperature=temperature)
        plain = [reply.token_ids for reply in Engine(target).generate(PROMPTS, settings)]
        for limits in shapes:
            replies = Engine(target, drafter, limits, prefill_chunk=4).generate(PROMPTS, settings, num_rows=2)
            assert [reply.token_ids for reply in replies] == plain
            fixed = Engine(target, drafter, limits, runner=lambda cycle: cycle).generate(PROMPTS, settings, num_rows=2)
            assert [reply.token_ids for reply in fixed] == plain, "with the shapes of a compiled cycle"


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_targets_with_windows_keep_their_own_tokens(family: str) -> None:
    target = random_target(family)
    drafter, settings = made(target, "hidden_transfer"), GenerationSettings(max_new_tokens=16)
    plain = [reply.token_ids for reply in Engine(target).generate(PROMPTS, settings)]
    replies = Engine(target, drafter, DraftLimits(2, STEPS)).generate(PROMPTS, settings, num_rows=2)
    assert [reply.token_ids for reply in replies] == plain


def test_a_cycle_with_riders_is_one_graph(target: Target, recwarn: pytest.WarningsRecorder) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    drafter, limits = made(target, "hidden_transfer"), DraftLimits(2, STEPS)
    settings = GenerationSettings(max_new_tokens=12)
    engine = Engine(target, drafter, limits, runner=lambda cycle: CompiledRunner(cycle, counting))
    replies = engine.generate(PROMPTS, settings, num_rows=2)
    plain = Engine(target).generate(PROMPTS, settings)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in plain]
    assert 1 <= graphs <= 2
    assert not [warning for warning in recwarn if "op by op" in str(warning.message)]


def test_sampled_drafts_are_verified_by_rejection(target: Target) -> None:
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
    sampled = Engine(target, made(target, "prompt"), DraftLimits(sampled=SampledChildren((2, 1))))
    assert [len(reply.token_ids) for reply in sampled.generate(PROMPTS, settings)] == [6, 6, 6]


@every_kind
def test_a_folder_is_read_back(target: Target, kind: RiderKind, tmp_path: Path) -> None:
    drafter = made(target, kind)
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert isinstance(again, RiderDrafter)
    assert again.config.entries == drafter.config.entries
    limits = DraftLimits(1, STEPS)
    tokens = [draft(target, each, [[BOS, 5, 8]], limits).tokens_BN.tolist() for each in (drafter, again)]
    assert tokens[0] == tokens[1]


@torch.no_grad()
def test_transfers_begin_as_the_tokens_own_state(target: Target) -> None:
    """At the last block's input, a fresh rider is its carrier's row at the next position, which sees one slot more."""
    drafter = RiderFamily(riders="firp", entries=[7, 7, 7]).build(target.ends, None, STEPS, "")
    states = torch.randn(1, 4, 32)
    for rider in range(STEPS):
        assert torch.equal(drafter.vectors(rider, states), states)


def test_usual_entries_rise_from_a_third_of_the_depth() -> None:
    assert usual_entries("prompt", 12, 3) == [0, 0, 0]
    assert usual_entries("firp", 12, 3) == [4, 4, 4]
    assert usual_entries("hidden_transfer", 12, 3) == [4, 6, 8]
    assert usual_entries("hidden_transfer", 12, 1) == [4]
    assert usual_entries("hidden_transfer", 1, 2) == [0, 0]


def test_what_does_not_fit_names_the_field(target: Target) -> None:
    with pytest.raises(
        ValueError, match=r"entries \[0, 9\] are not all blocks of the target; they must be within 0 to 7"
    ):
        RiderFamily(riders="hidden_transfer", entries=[0, 9]).build(target.ends, None, 2, "")
    with pytest.raises(ValueError, match=r"riders 'firp' and entries \[1, 2\]: all of its riders enter at one block"):
        RiderFamily(riders="firp", entries=[1, 2]).build(target.ends, None, 2, "")
    with pytest.raises(ValueError, match=r"1 entries and num_draft_steps 2: give an entry for each step"):
        RiderFamily(entries=[1]).build(target.ends, None, 2, "")
    with pytest.raises(ValueError, match=r"entries is \[2, 1\]"):
        RiderDrafter(RiderConfig(entries=[2, 1], num_draft_steps=2, hidden_size=4, vocab_size=4))
    gpt2 = random_target("gpt2")
    with pytest.raises(ValueError, match="takes no riders of this RiderDrafter: its blocks take no further rows"):
        RiderFamily().build(gpt2.ends, None, 2, "")
    ends = TargetEnds(target.model, "ends", "")
    alone: Drafter = RiderFamily().build(ends, None, 2, "")
    batch = batch_of(target, alone)
    with pytest.raises(ValueError, match="only the ends of 'ends' are loaded; load the whole target"):
        alone.teacher_forced(batch, data_rollout(batch, 2))
