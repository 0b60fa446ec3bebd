"""EAGLE in the engine: lossless with every manner of drafting, and a cache of its own that follows accepted paths only."""

from __future__ import annotations

import pytest
import torch
from doubles import BOS, greedy_by_hand, random_target
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import DraftLimits, Eagle, Eagle3, EarlyStop, Emitted, Target
from draftsmith.models.drafters.draft_records import CacheState
from draftsmith.models.families.eagle_base import EagleBase

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 33, 34, 35, 36]]
FAMILIES = (Eagle, Eagle3)
MANNERS = {
    "chain": DraftLimits(1, 4),
    "beams": DraftLimits(4, 3),
    "dynamic": DraftLimits(4, 4, node_budget=9),
    "static": DraftLimits(paths=((0,), (1,), (0, 0), (0, 2), (1, 0), (0, 0, 0))),
    "stopped": DraftLimits(3, 4, node_budget=7, early_stop=EarlyStop(0.3)),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module", params=FAMILIES)
def drafter(request: pytest.FixtureRequest, target: Target) -> EagleBase:
    torch.manual_seed(0)
    made = request.param.for_target(target.ends).eval()
    with torch.no_grad():
        for parameter in made.layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("limits", MANNERS.values(), ids=MANNERS)
def test_greedy_equals_the_models_own_greedy(target: Target, drafter: EagleBase, limits: DraftLimits) -> None:
    expected = [greedy_by_hand(target, prompt, 20) for prompt in PROMPTS]
    engine = Engine(target, drafter, limits)
    request = GenerationSettings(max_new_tokens=20)
    assert [one.token_ids for one in engine.generate(PROMPTS, request)] == expected
    assert [engine.generate([prompt], request)[0].token_ids for prompt in PROMPTS] == expected


@pytest.mark.parametrize("limits", MANNERS.values(), ids=MANNERS)
def test_sampled_text_is_that_of_plain_decoding_under_one_seed(
    target: Target, drafter: EagleBase, limits: DraftLimits
) -> None:
    request = GenerationSettings(max_new_tokens=16, temperature=1.0, top_k=20, seed=5)
    plain = [one.token_ids for one in Engine(target).generate(PROMPTS, request)]
    assert [one.token_ids for one in Engine(target, drafter, limits).generate(PROMPTS, request)] == plain


def test_rows_that_end_early_leave_the_others_undisturbed(target: Target, drafter: EagleBase) -> None:
    plain = Engine(target).generate(PROMPTS, GenerationSettings(max_new_tokens=24))
    ends = (plain[0].token_ids[3], plain[2].token_ids[9])
    request = GenerationSettings(max_new_tokens=24, eos_token_ids=ends)
    expected = Engine(target).generate(PROMPTS, request)
    assert len({len(one.token_ids) for one in expected}) > 1
    got = Engine(target, drafter, DraftLimits(3, 4, node_budget=8)).generate(PROMPTS, request)
    assert [(one.token_ids, one.finish) for one in got] == [(one.token_ids, one.finish) for one in expected]


@pytest.mark.parametrize("limits", MANNERS.values(), ids=MANNERS)
def test_after_many_cycles_the_cached_keys_are_those_of_the_accepted_text(
    target: Target, drafter: EagleBase, limits: DraftLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[CacheState] = []
    advance = type(drafter).advance

    def noted(self: EagleBase, state: CacheState, emitted: Emitted) -> CacheState:
        states.append(state)
        return advance(self, state, emitted)

    monkeypatch.setattr(type(drafter), "advance", noted)
    prompt = PROMPTS[0]
    reply = Engine(target, drafter, limits).generate([prompt], GenerationSettings(max_new_tokens=14))[0]
    # The last draft had read the prompt's pairs and those of every cycle before it.
    held = len(prompt) + sum(accepted + 1 for accepted in reply.accepted[:-1])
    keys, values = states[-1].cache.layer(0)
    known_keys, known_values = _pairs_by_hand(target, drafter, [*prompt, *reply.token_ids])
    torch.testing.assert_close(keys[0, :, :held], known_keys[:, :held], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[0, :, :held], known_values[:, :held], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def _pairs_by_hand(target: Target, drafter: EagleBase, text: list[int]) -> tuple[Tensor, Tensor]:
    """[G, T - 1, Dh] each: keys and values of every (state, next token) pair of a text, from the target's states alone."""
    output = target.prefix(torch.tensor([text]), layers=drafter.features)
    embedded = drafter.embed(torch.tensor(text[1:]))
    known = drafter.read({name: output.feature(name)[0, :-1] for name in drafter.features})
    inputs = drafter.layer.inputs(embedded, drafter.join(embedded, known))
    keys, values = drafter.layer.keys_values(inputs, drafter.rotation(torch.arange(len(text) - 1), embedded))
    return keys.transpose(0, 1), values.transpose(0, 1)
