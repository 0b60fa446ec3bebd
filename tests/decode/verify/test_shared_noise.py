"""Drafts that know the target's random numbers: the text is that of plain decoding, and more of the draft is accepted."""

from __future__ import annotations

import pytest
import torch
from doubles import BOS, random_target
from every_family import EVERY_FAMILY, fresh, name_of
from joint_law import chi_square_pvalue
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import process
from draftsmith.decode.verify.lossy_rules import TopK
from draftsmith.models import DraftLimits, LMDrafter, SampledChildren, Target
from draftsmith.models.tree import noise as noises
from draftsmith.models.tree.noise import SharedNoise, draw_at, keys_behind, request_keys
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32], [BOS, 3, 4]]
DRAWN = GenerationSettings(max_new_tokens=24, temperature=0.9, seed=5)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def own_drafter() -> LMDrafter:
    """A drafter that knows the target's distributions."""
    return LMDrafter(random_target()).eval()


def cycles(
    target: Target, drafter: LMDrafter, shape: str, request: GenerationSettings = DRAWN, **options: object
) -> int:
    plain = Engine(target).generate(PROMPTS, request)
    replies = Engine(target, drafter, parse_shape(shape), **options).generate(PROMPTS, request)
    if not options:
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in plain]
    return sum(len(reply.accepted) for reply in replies)


@pytest.mark.parametrize(
    "request_settings", [DRAWN, GenerationSettings(24, 0.7, top_p=0.8, seed=1)], ids=["all", "top-p"]
)
@pytest.mark.parametrize("shape", ["1x4", "3x3", "3x3n6", "t2.2.1"])
def test_a_drafter_that_knows_the_distributions_guesses_every_draw(
    target: Target, shape: str, request_settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noises, "NOISE_SHARE", 1.0)
    depth = parse_shape(shape).draft_length
    fewest = sum(
        -(-(len(reply.token_ids) - 1) // (depth + 1)) for reply in Engine(target).generate(PROMPTS, request_settings)
    )
    guessed = cycles(target, own_drafter(), shape, request_settings)
    if "x3" not in shape:  # among several beams, the right one need not be likeliest
        assert guessed == fewest
    assert cycles(target, own_drafter(), f"{shape}l", request_settings) > 1.3 * guessed


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_every_family_guesses_and_the_text_is_that_of_plain_decoding(target: Target, family: type) -> None:
    drafter = fresh(family, target.ends)
    plain = Engine(target).generate(PROMPTS, DRAWN)
    drafts = {}
    for shape in ("2x3n5", "2x3n5l"):
        limits = parse_shape(shape).no_deeper_than(drafter.max_draft_steps or 3)
        replies = Engine(target, drafter, limits).generate(PROMPTS, DRAWN)
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in plain]
        drafts[shape] = [reply.accepted for reply in replies]
    assert drafts["2x3n5"] != drafts["2x3n5l"], "the noise reaches no draft"


@pytest.mark.parametrize(
    "processors", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.05}, {"min_p": 0.9}, {"repetition_penalty": 1.4}], ids=str
)
@pytest.mark.parametrize("shape", ["1x4", "3x3", "3x3n6", "3x3n6m1", "t3.2", "3x3n6p0.2", "1x4e0.5", "3x3e0.5"])
def test_few_tokens_left_by_the_processors_are_no_trouble(
    target: Target, shape: str, processors: dict[str, float]
) -> None:
    request = GenerationSettings(max_new_tokens=16, temperature=0.9, seed=5, **processors)
    drafter = LMDrafter(random_target(seed=3)).eval()
    assert cycles(target, drafter, shape, request) <= 4 * 16


def test_a_prompt_drafts_alone_what_it_drafts_in_a_batch(target: Target) -> None:
    engine = Engine(target, LMDrafter(random_target(seed=3)).eval(), DraftLimits(2, 3, node_budget=5))
    together = engine.generate(PROMPTS, DRAWN, num_rows=2)
    alone = [engine.generate([prompt], DRAWN, request_ids=[number])[0] for number, prompt in enumerate(PROMPTS)]
    assert [reply.accepted for reply in together] == [reply.accepted for reply in alone]


def test_texts_have_the_targets_own_law(target: Target) -> None:
    engine = Engine(target, LMDrafter(random_target(seed=3)).eval(), DraftLimits(2, 2, node_budget=3))
    request = GenerationSettings(max_new_tokens=2, temperature=0.3, top_k=5, seed=11)
    assert chi_square_pvalue(engine, PROMPTS[0], request, 2000) > 1e-3


def test_a_lossy_rule_judges_the_likeliest_tokens(target: Target) -> None:
    """What a rule lets stand is emitted, so such drafts must not depend on the draws."""
    drafter = LMDrafter(random_target(seed=3)).eval()
    assert cycles(target, drafter, "1x4", rule=TopK(3)) == cycles(target, drafter, "1x4l", rule=TopK(3))


def shared(temperature: float, request: GenerationSettings) -> tuple[SharedNoise, Tensor]:
    keys_B, first_B = request_keys(3, [0, 1], "choices", torch.device("cpu")), torch.tensor([4, 0])
    return SharedNoise(keys_B, first_B, temperature, lambda logits: process(logits, request)), keys_behind(
        keys_B, first_B, 3
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_noise_is_that_of_the_targets_draw_at_each_depth(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noises, "NOISE_SHARE", 1.0)
    monkeypatch.setattr(noises, "_PART", 50)  # so that it is made in parts
    request = GenerationSettings(temperature=temperature)
    noise, keys_BP = shared(temperature, request)
    logits_BSV = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 3.0
    drawn_BS = draw_at(process(logits_BSV, request), keys_BP, torch.arange(3).expand(2, 3))
    guesses_BS = noise.onto(logits_BSV, 0, torch.arange(40), each=True).argmax(-1)
    assert guesses_BS.tolist() == drawn_BS.tolist()
    for depth in range(3):
        assert (
            noise.onto(logits_BSV, depth, torch.arange(40))[:, depth].argmax(-1).tolist() == drawn_BS[:, depth].tolist()
        )
    rows_B = torch.tensor([1])
    assert (
        noise.select_rows(rows_B).onto(logits_BSV[1:], 0, torch.arange(40), each=True).argmax(-1).tolist()
        == drawn_BS[1:].tolist()
    )


def test_tokens_of_a_draft_vocabulary_have_the_noise_of_their_target_ids() -> None:
    noise, _ = shared(1.0, GenerationSettings(temperature=1.0))
    logits_BMV, ids_D = torch.zeros(2, 1, 40), torch.tensor([7, 3, 30])
    whole = noise.onto(logits_BMV, 1, torch.arange(40))
    assert torch.equal(noise.onto(logits_BMV[..., :3], 1, ids_D), whole[..., ids_D])


def test_close_to_temperature_0_guesses_are_the_likeliest_tokens() -> None:
    noise, _ = shared(1e-4, GenerationSettings(temperature=1e-4))
    logits_BMV = torch.randn(2, 1, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise.onto(logits_BMV, 0, torch.arange(40)), logits_BMV, atol=2e-3, rtol=0.0)


def test_a_sampled_tree_cannot_hold_the_likeliest_tokens() -> None:
    with pytest.raises(ValueError, match="draws its tokens"):
        DraftLimits(sampled=SampledChildren((2, 1)), likeliest=True)
    with pytest.raises(ValueError, match="draws its tokens"):
        parse_shape("s2.1l")
