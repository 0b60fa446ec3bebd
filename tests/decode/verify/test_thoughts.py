"""Relaxed acceptance inside thoughts: the phase of a text against a plain reading of it, lossless outside, the formula inside."""

from __future__ import annotations

import pytest
import torch
from doubles import PlannedDrafter, random_target
from hypothesis import given, settings
from hypothesis import strategies as st
from ruling import PROMPTS, reread

from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.cycle import DecodeCycle
from draftsmith.decode.runners import Runner
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import TopK
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.decode.verify.uncertain_rules import Relaxed
from draftsmith.evaluate.lossy.wrong_tokens import accepted_tokens
from draftsmith.label.token_rows import LabelledRow
from draftsmith.models import Target, tree_from_paths
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.tree.shapes import parse_shape

GREEDY = GenerationSettings(max_new_tokens=40, eos_token_ids=(2,))
BEGIN, END, NEVER, NEVER_EITHER = 8, 9, 49, 60  # the last two are in no text here
MARKS = ThoughtMarks(BEGIN, END)
tokens_lists = st.lists(st.integers(5, 11), max_size=8)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def draft_lm() -> LMDrafter:
    return LMDrafter(random_target("llama", seed=5))


def is_inside(text: list[int], marks: ThoughtMarks = MARKS, before: bool = False) -> bool:
    """As anybody reads it, from left to right."""
    for token in text:
        before = True if token == marks.begin else False if token == marks.end else before
    return before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(tokens_lists, st.booleans(), st.integers(0, 3)), min_size=1, max_size=4))
def test_the_phase_of_a_text_is_that_of_its_last_mark(rows: list[tuple[list[int], bool, int]]) -> None:
    longest = max(len(tokens) + beyond for tokens, _, beyond in rows)
    # What is behind a row's own tokens is no part of it, marks included.
    padded = torch.tensor([(tokens + [BEGIN, END] * longest)[:longest] for tokens, _, _ in rows], dtype=torch.int64)
    counts = torch.tensor([len(tokens) for tokens, _, _ in rows])
    before = torch.tensor([inside for _, inside, _ in rows])
    expected = [is_inside(tokens, before=inside) for tokens, inside, _ in rows]
    if longest:
        assert MARKS.behind(padded, counts, before).tolist() == expected
        assert MARKS.behind_prompts(padded, counts).tolist() == [is_inside(tokens) for tokens, _, _ in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(6, 10), min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_the_phase_behind_a_node_is_that_of_its_own_path(paths: list[list[int]], inside: bool) -> None:
    tree = tree_from_paths(torch.tensor([BEGIN]), torch.tensor([paths]))
    got = MARKS.behind_nodes(tree, tree.ancestors(), torch.tensor([inside]))[0]
    stands = MARKS.may_stand(tree, got[None])[0]
    parents, tokens = tree.parents_BN[0].tolist(), tree.tokens_BN[0].tolist()
    for node in range(tree.num_nodes):
        path, at = [], node
        while at > 0:
            path.insert(0, tokens[at])
            at = parents[at]
        # The root is in the text already, so what it is counts in `inside` alone.
        assert bool(got[node]) == is_inside(path, before=inside)
        if node:
            assert bool(stands[node]) == (is_inside(path[:-1], before=inside) and path[-1] not in (BEGIN, END))


def decode(
    target: Target, drafter: LMDrafter | PlannedDrafter, shape: str, rule: LossyRule | None, prompts: list[list[int]]
) -> list[Generation]:
    return Engine(target, drafter, parse_shape(shape), rule=rule).generate(prompts, GREEDY)


def common_marks(target: Target) -> ThoughtMarks:
    """Two tokens that the target writes often, so that thoughts begin and end."""
    replies = Engine(target).generate(PROMPTS, GREEDY)
    counts = torch.bincount(torch.tensor([token for reply in replies for token in reply.token_ids]), minlength=50)
    counts[2] = 0
    begin, end = counts.topk(2).indices.tolist()
    return ThoughtMarks(begin, end)


@pytest.mark.parametrize(("drafter", "shape"), [("lm", "1x12"), ("random", "1x6"), ("random", "3x4"), ("half", "1x9")])
def test_outside_of_thoughts_every_token_is_the_targets_own_and_inside_the_formula_holds(
    target: Target, draft_lm: LMDrafter, drafter: str, shape: str
) -> None:
    marks = common_marks(target)
    prompts = [
        *PROMPTS,
        [*PROMPTS[0], marks.begin],
        [*PROMPTS[0], marks.begin, 5, marks.end],
        [*PROMPTS[1], marks.begin, 4],
    ]
    own = draft_lm if drafter == "lm" else PlannedDrafter(target, drafter)  # type: ignore[arg-type]
    rule = Relaxed(0.05, marks, 6)
    ruled = outside = 0
    for prompt, reply in zip(prompts, decode(target, own, shape, rule, prompts), strict=True):
        logits, _ = reread(target, prompt, reply.token_ids)
        for place, token in enumerate(reply.token_ids):
            is_own = token == int(logits[place].argmax())
            assert is_own == (place not in reply.by_rule)
            inside = is_inside([*prompt, *reply.token_ids[:place]], marks)
            outside += not inside
            if is_own:
                continue
            ruled += 1
            probs = logits[place].softmax(-1)
            assert inside
            assert token not in (marks.begin, marks.end, 2)
            assert token in logits[place].topk(6).indices
            assert float(probs[token]) >= float(probs.max()) - 0.05 - 1e-6
    assert outside > 20
    assert ruled > 0 or drafter == "half"


def test_without_a_thought_the_text_is_lossless_and_in_an_endless_one_the_rule_holds_everywhere(
    target: Target, draft_lm: LMDrafter
) -> None:
    lossless = decode(target, draft_lm, "1x12", None, PROMPTS)
    without = decode(target, draft_lm, "1x12", Relaxed(1.0, ThoughtMarks(NEVER, NEVER_EITHER), 5), PROMPTS)
    assert [reply.token_ids for reply in without] == [reply.token_ids for reply in lossless]
    assert [reply.accepted for reply in without] == [reply.accepted for reply in lossless]
    assert not any(reply.by_rule for reply in without)
    begun = [[*prompt, NEVER] for prompt in PROMPTS]
    endless = decode(target, draft_lm, "1x12", Relaxed(1.0, ThoughtMarks(NEVER, NEVER_EITHER), 5), begun)
    everywhere = decode(target, draft_lm, "1x12", TopK(5), begun)
    assert any(reply.by_rule for reply in endless)
    assert [reply.token_ids for reply in endless] == [reply.token_ids for reply in everywhere]
    strict = decode(target, draft_lm, "1x12", Relaxed(0.0, ThoughtMarks(NEVER, NEVER_EITHER)), begun)
    assert [reply.token_ids for reply in strict] == [
        reply.token_ids for reply in decode(target, draft_lm, "1x12", None, begun)
    ]


def test_rows_that_are_refilled_and_cycles_of_fixed_shapes_follow_the_same_phases(
    target: Target, draft_lm: LMDrafter
) -> None:
    marks = common_marks(target)
    prompts = [[*prompt, *more] for prompt in PROMPTS for more in ([], [marks.begin], [marks.begin, marks.end])]
    rule = Relaxed(0.05, marks, 6)
    alone = [decode(target, draft_lm, "1x6", rule, [prompt])[0] for prompt in prompts]
    assert any(reply.by_rule for reply in alone)

    def eager(cycle: DecodeCycle) -> Runner:
        return cycle

    for runner in (None, eager):
        engine = Engine(target, draft_lm, parse_shape("1x6"), rule=rule, runner=runner)
        for num_rows in (2, None):
            replies = engine.generate(prompts, GREEDY, num_rows=num_rows)
            assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone]
            assert [reply.by_rule for reply in replies] == [reply.by_rule for reply in alone]


def test_the_share_of_labelled_tokens_counts_those_inside_thoughts(target: Target, draft_lm: LMDrafter) -> None:
    reply = [20, 21, 22, 23]

    def share(prompt: list[int], reply: list[int]) -> float:
        row = LabelledRow("r", "q", "made", "rule", prompt, reply, [0, 1, 0, 1][: len(reply)])
        rules = [None, Relaxed(1.0, ThoughtMarks(BEGIN, END), 50)]
        own, relaxed = accepted_tokens(target, draft_lm, rules, [row])
        assert own is not None
        assert relaxed is not None
        return relaxed.wrong_share - own.wrong_share

    assert share([3, 4], reply) == share([3, BEGIN, END], reply) == 0.0
    assert share([3, BEGIN], reply) == 1.0
    assert share([3, BEGIN], [20, END, 22, 23]) == 0.5


def test_a_relaxed_rule_is_read_from_its_words_and_bad_ones_are_errors() -> None:
    name, rule = parse_rule("relaxed:7,8@0.6")
    assert (name, rule) == ("relaxed", Relaxed(0.6, ThoughtMarks(7, 8), 10))
    assert parse_rule("mine=relaxed:7,8,3@0.1") == ("mine", Relaxed(0.1, ThoughtMarks(7, 8), 3))
    assert str(rule) == "relaxed 0.6 of the likeliest 10, between tokens 7 and 8"
    for text, said in (
        ("relaxed@0.5", "write lossless"),
        ("relaxed:7@0.5", "write relaxed:BEGIN,END@0.5"),
        ("relaxed:<think>,</think>@0.5", "convert_tokens_to_ids"),
        ("relaxed:7,7@0.5", "two different token ids"),
        ("relaxed:7,8@1.5", "give 0 to 1"),
        ("relaxed:7,8,0@0.5", "give at least 1"),
        ("relaxed:7,8", "write relaxed:BEGIN,END@0.5"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_rule(text)
    with pytest.raises(ValueError, match="relaxed needs"):
        Relaxed(0.5, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("marks", [(BEGIN, 61), (61, END), (1000, 2000)])
def test_marks_beyond_the_vocabulary_are_an_error(target: Target, draft_lm: LMDrafter, marks: tuple[int, int]) -> None:
    rule = Relaxed(0.5, ThoughtMarks(*marks))
    told = f"with token {marks[0]} and end with {marks[1]}, and the vocabulary of .* ends at 60; give ids"
    with pytest.raises(ValueError, match=told):
        Engine(target, draft_lm, parse_shape("1x4"), rule=rule)
