"""Lossy decoding under what a request may ask: penalties, temperature, ends of replies, small draft vocabularies; and the command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from doubles import random_target
from ruling import PROMPTS, random_judge, reread
from torch import Tensor

from draftsmith.cli import main
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.sampling import choose, process
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import Divergence, Everything, JudgeRule, TopK
from draftsmith.models import Drafter, DraftTree, Eagle, ReDrafter, Target, load_tokenizer
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.judge import POST_NORM, Judge, JudgeConfig
from draftsmith.models.target.target import TargetOutput
from draftsmith.models.tree.kept_logits import KeptLogits
from draftsmith.models.tree.noise import keys_at, request_keys
from draftsmith.models.tree.shapes import parse_shape

GREEDY = GenerationSettings(max_new_tokens=24)
SMALL = torch.arange(3, 50, 2)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def draft_lm() -> LMDrafter:
    return LMDrafter(random_target("llama", seed=5))


def decode(
    target: Target, drafter: Drafter, shape: str, rule: LossyRule | None, request: GenerationSettings = GREEDY
) -> list[Generation]:
    return Engine(target, drafter, parse_shape(shape), rule=rule).generate(PROMPTS, request)


def small_drafter(target: Target, family: str) -> Drafter:
    """One that knows half of the target's tokens."""
    torch.manual_seed(1)
    made = Eagle if family == "eagle" else ReDrafter
    return made.for_target(target.ends, draft_token_ids=SMALL)


def test_a_judge_of_normed_states_reads_them_normed(target: Target, draft_lm: LMDrafter) -> None:
    judge = random_judge(target, 0.6, POST_NORM)
    ruled = 0
    for prompt, generation in zip(PROMPTS, decode(target, draft_lm, "1x8", JudgeRule(judge)), strict=True):
        _, states = reread(target, prompt, generation.token_ids)
        with torch.inference_mode():
            accepted = random_judge(target, 0.6).accepts(target.ends.final_norm(states))
        assert bool(accepted[generation.by_rule].all())
        ruled += len(generation.by_rule)
    assert ruled > 0


def test_states_that_are_no_numbers_stand_by_no_judge(target: Target, draft_lm: LMDrafter) -> None:
    judge = random_judge(target, 0.0)
    assert any(one.by_rule for one in decode(target, draft_lm, "1x8", JudgeRule(judge)))
    with torch.no_grad():
        judge.mean[3] = torch.nan
    broken = decode(target, draft_lm, "1x8", JudgeRule(judge))
    assert [one.token_ids for one in broken] == [one.token_ids for one in decode(target, draft_lm, "1x8", None)]


def test_an_end_that_was_only_drafted_does_not_end_a_reply(target: Target, draft_lm: LMDrafter) -> None:
    for row, free in enumerate(decode(target, draft_lm, "1x8", Everything())):
        place = next(one for one in free.by_rule if free.token_ids[one] not in free.token_ids[:one])
        ends = replace(GREEDY, eos_token_ids=(free.token_ids[place],))
        reply = decode(target, draft_lm, "1x8", Everything(), ends)[row]
        assert reply.token_ids[:place] == free.token_ids[:place]
        logits, _ = reread(target, PROMPTS[row], reply.token_ids)
        assert reply.token_ids[place] == int(logits[place].argmax()) != free.token_ids[place]
        assert not any(reply.token_ids[one] in ends.eos_token_ids for one in reply.by_rule)


@pytest.mark.parametrize("shape", ["1x8", "3x4"])
def test_rows_that_end_at_different_times_decode_as_they_would_alone(
    target: Target, draft_lm: LMDrafter, shape: str
) -> None:
    for rule in (Everything(), JudgeRule(random_judge(target, 0.5)), TopK(5)):
        engine = Engine(target, draft_lm, parse_shape(shape), rule=rule)
        free = engine.generate(PROMPTS, GREEDY)[0]
        own = next(token for place, token in enumerate(free.token_ids) if place > 2 and place not in free.by_rule)
        request = replace(GREEDY, eos_token_ids=(own,))
        together = engine.generate(PROMPTS, request)
        assert len({len(one.token_ids) for one in together}) > 1, "all rows ended together, so nothing was tested"
        assert together == [engine.generate([prompt], request)[0] for prompt in PROMPTS]


def test_under_a_penalty_the_rule_reads_penalised_logits(target: Target, draft_lm: LMDrafter) -> None:
    request = replace(GREEDY, repetition_penalty=1.7)
    ruled = 0
    for prompt, reply in zip(PROMPTS, decode(target, draft_lm, "1x8", TopK(6), request), strict=True):
        logits, _ = reread(target, prompt, reply.token_ids)
        for place, token in enumerate(reply.token_ids):
            seen = torch.zeros(1, 1, logits.shape[-1], dtype=torch.bool)
            seen[..., prompt + reply.token_ids[:place]] = True
            penalised = process(logits[None, place, None], request, seen)[0, 0]
            assert (token == int(penalised.argmax())) == (place not in reply.by_rule)
            assert token in penalised.topk(6).indices
        ruled += len(reply.by_rule)
    assert ruled > 0


def test_with_temperature_what_does_not_stand_by_the_rule_is_the_targets_draw(
    target: Target, draft_lm: LMDrafter
) -> None:
    request = replace(GREEDY, temperature=0.8, seed=4)
    ruled = 0
    for number, (prompt, reply) in enumerate(
        zip(PROMPTS, decode(target, draft_lm, "1x8", TopK(4), request), strict=True)
    ):
        logits, _ = reread(target, prompt, reply.token_ids)
        place_1N = torch.arange(len(reply.token_ids))[None]
        keys_1P = keys_at(request_keys(request.seed, [number], "choices", target.device)[:, None], place_1N)
        drawn = choose(process(logits[None], request), request, keys_1P, place_1N)[0].tolist()
        differ = [place for place, token in enumerate(reply.token_ids) if token != drawn[place]]
        assert differ == reply.by_rule
        assert all(reply.token_ids[place] in logits[place].topk(4).indices for place in differ)
        ruled += len(differ)
    assert ruled > 0


def as_chain(tokens: list[int]) -> DraftTree:
    """A root and a chain of tokens below it."""
    tokens_1N = torch.tensor([[0, *tokens]])
    place_1N = torch.arange(len(tokens) + 1)[None]
    return DraftTree(
        tokens_1N, place_1N - 1, place_1N, torch.ones_like(tokens_1N, dtype=torch.bool), len(tokens), chain=True
    )


def test_top_k_by_hand_lets_nothing_stand_that_the_requests_own_top_k_ruled_out() -> None:
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, 9.0, 9.0, 9.0]]])
    nothing = TargetOutput(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))
    tree = as_chain([2, 2])
    assert TopK(3).allows(tree, logits, nothing)[0, 1:].tolist() == [True, True]
    assert TopK(2).allows(tree, logits, nothing)[0, 1:].tolist() == [False, True]
    processed = process(logits, GenerationSettings(temperature=1.0, top_k=2))
    assert TopK(3).allows(tree, processed, nothing)[0, 1:].tolist() == [False, True]


class Said:
    """An expander over three draft tokens that stand for the target's 4, 1 and 6."""

    root_B = torch.tensor([0])
    ids = torch.tensor([4, 1, 6])

    def __init__(self) -> None:
        self.logits = torch.log(torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6]]]))[:, None]

    def begin(self) -> Tensor:
        return self.logits[0]

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        return self.logits[1]

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return self.ids[draft_ids]


def test_kept_distributions_stand_at_the_targets_ids_and_are_cut_with_the_chain() -> None:
    kept = KeptLogits(Said())
    kept.begin()
    kept.extend(torch.tensor([[4]]), torch.tensor([[0]]))
    probs = kept.onto(as_chain([4, 6]), 8).draft_probs_BMV
    assert probs is not None
    assert probs[0].tolist() == [
        pytest.approx([0, 0.3, 0, 0, 0.5, 0, 0.2, 0]),
        pytest.approx([0, 0.1, 0, 0, 0.1, 0, 0.8, 0]),
    ]
    stopped = kept.onto(as_chain([4]), 8).draft_probs_BMV
    assert stopped is not None
    assert stopped.shape == (1, 1, 8)


@pytest.mark.parametrize("family", ["eagle", "redrafter"])
@pytest.mark.parametrize("shape", ["1x6", "1x6e0.4", "1x6p0.001"])
def test_small_draft_vocabularies_go_with_rules(target: Target, family: str, shape: str) -> None:
    drafter = small_drafter(target, family)
    lossless = decode(target, drafter, shape, None)
    assert [one.token_ids for one in decode(target, drafter, shape, Divergence(0.0))] == [
        one.token_ids for one in lossless
    ]
    for rule in (Divergence(1e6), Everything()):
        replies = decode(target, drafter, shape, rule)
        assert any(one.by_rule for one in replies)
        assert all(one.token_ids[place] in SMALL for one in replies for place in one.by_rule)
    # A divergence is finite wherever the target leaves no token out, so that a high threshold allows all.
    assert replies == decode(target, drafter, shape, Divergence(1e6))


def test_a_rule_needs_something_that_drafts(target: Target) -> None:
    with pytest.raises(ValueError, match="rule top-k 2 lets draft tokens stand, and nothing drafts"):
        Engine(target, rule=TopK(2))


def test_a_judge_of_another_tokenizer_is_refused_when_the_engine_is_made(target: Target, draft_lm: LMDrafter) -> None:
    judge = Judge(JudgeConfig(hidden_size=target.ends.hidden_size, tokenizer_fingerprint="a" * 64))
    with pytest.raises(ValueError, match="this judge was trained with another tokenizer"):
        Engine(target, draft_lm, tokenizer=load_tokenizer("embedded:target"), rule=JudgeRule(judge))


PROMPT = ["--prompt", "Nina has 3 boxes of 12 pens and gives 5 away. How many has she?", "--max-new-tokens", "40"]
DRAFTED = ["--target", "embedded:target", "--drafter", "embedded:draft_lm", "--shape", "1x16"]


def test_the_command_says_lossy_with_a_rule_and_only_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", *PROMPT, *DRAFTED, "--rule", "everything"]) == 0
    ruled = capsys.readouterr().out
    assert "LOSSY by the rule everything: " in ruled
    assert "LOSSY by the rule everything: 0 tokens" not in ruled
    assert main(["decode", *PROMPT, *DRAFTED]) == 0
    lossless = capsys.readouterr().out
    assert "LOSSY" not in lossless
    assert main(["decode", *PROMPT, "--target", "embedded:target"]) == 0
    assert lossless.splitlines()[0] == capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*DRAFTED, "--rule", "topk@3"], "rule 'topk@3' is not known"),
        ([*DRAFTED, "--rule", "judge:/nowhere"], "does not exist"),
        ([*DRAFTED[:4], "--shape", "s1.1", "--rule", "top-k@3"], "verified by rejection"),
        (["--target", "embedded:target", "--rule", "top-k@3"], "nothing drafts"),
    ],
)
def test_the_command_refuses_rules_that_cannot_work(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["decode", *PROMPT, *words]) == 1
    assert told in capsys.readouterr().err
