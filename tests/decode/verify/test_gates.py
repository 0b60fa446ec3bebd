"""Gates: a drafted line or reply stands whole, or is verified losslessly."""

from __future__ import annotations

import pytest
import torch
from doubles import random_target
from hypothesis import given, settings
from hypothesis import strategies as st
from ruling import PROMPTS, random_judge

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.verify.gates import Gate
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.models import DraftTree, Target
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.judge import Judge, JudgeConfig
from draftsmith.models.tree.shapes import parse_shape

END, NEWLINE = 2, 9
GREEDY = GenerationSettings(max_new_tokens=24, eos_token_ids=(END,))


def chain(tokens: list[int], valid: int | None = None) -> DraftTree:
    """A root and tokens below it, of which the first so many are real."""
    number = len(tokens) + 1
    places = torch.arange(number)[None]
    real = places <= (len(tokens) if valid is None else valid)
    return DraftTree(torch.tensor([[4, *tokens]]), places - 1, places, real, max_depth=len(tokens), chain=True)


def kept(gate: Gate, tokens: list[int], verdicts: str, approved: str = "", valid: int | None = None) -> str:
    """What a gate leaves of verdicts: `=` the target's own, `+` allowed, `-` neither."""
    tree = chain(tokens, valid)
    own = torch.tensor([[False, *(letter == "=" for letter in verdicts)]])
    allowed = torch.tensor([[False, *(letter == "+" for letter in verdicts)]])
    said = torch.tensor([[False, *(letter == "y" for letter in approved or "y" * len(tokens))]])
    stays = gate.kept(tree, own, allowed, said, (END,))[0, 1:].tolist()
    return "".join("+" if stands else letter for letter, stands in zip(verdicts.replace("+", "."), stays, strict=True))


LINES = Gate(torch.tensor([NEWLINE]), veto=False)
REPLY = Gate(None, veto=False)


@pytest.mark.parametrize(
    ("tokens", "verdicts", "expected"),
    [
        ([5, 6, NEWLINE, 7, 8], "=+=+=", "=+=.="),  # the second line does not end within the draft
        ([5, 6, NEWLINE, 7, END], "=+=+=", "=+=+="),  # it ends with the reply
        ([5, 6, NEWLINE, 7, NEWLINE], "+-=+=", ".-=+="),  # each line stands or falls for itself
        ([NEWLINE, 5, NEWLINE], "++-", "+.-"),
    ],
)
def test_a_line_stands_whole_or_not_at_all(tokens: list[int], verdicts: str, expected: str) -> None:
    assert kept(LINES, tokens, verdicts) == expected


@pytest.mark.parametrize(
    ("tokens", "verdicts", "expected"),
    [
        ([5, NEWLINE, 7, END], "+=+=", "+=+="),
        ([5, NEWLINE, 7, END], "+=--", ".=--"),
        ([5, NEWLINE, 7, 8], "+=+=", ".=.="),  # it does not end within the draft
        ([5, END, 7, 8], "+=--", "+=--"),  # what is drafted behind the end does not count
    ],
)
def test_a_reply_stands_whole_or_not_at_all(tokens: list[int], verdicts: str, expected: str) -> None:
    assert kept(REPLY, tokens, verdicts) == expected


def test_with_a_veto_own_tokens_that_the_judge_finds_wrong_break_the_reply() -> None:
    strict = Gate(None, veto=True)
    assert kept(strict, [5, 6, END], "+==", "yyn") == "+=="  # nobody judges the end of a reply
    assert kept(strict, [5, 6, END], "+==", "yny") == ".=="
    assert kept(REPLY, [5, 6, END], "+==", "yny") == "+=="


def test_padding_of_a_draft_that_stopped_early_is_no_part_of_it() -> None:
    assert kept(LINES, [5, NEWLINE, 7, NEWLINE], "+=+=", valid=2) == "+=.="


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_gate_keeps_what_a_loop_over_lines_keeps(seed: int, veto: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, 11, (12,), generator=generator).tolist()
    own, allowed, said = (torch.rand(1, 13, generator=generator) < 0.7 for _ in range(3))
    tree = chain(tokens)
    found = Gate(torch.tensor([NEWLINE]), veto).kept(tree, own, allowed, said, (END,))
    expected, line = [False] * 13, []
    for node in range(1, 13):
        line.append(node)
        if tokens[node - 1] == NEWLINE:
            if all(bool(allowed[0, at]) or (bool(own[0, at]) and (not veto or bool(said[0, at]))) for at in line):
                for at in line:
                    expected[at] = bool(allowed[0, at])
            line = []
    assert found[0, 1:].tolist() == expected[1:]


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def test_a_judge_with_a_gate_stays_within_what_it_accepts_without(target: Target) -> None:
    def by_rule(judge: Judge) -> tuple[int, int]:
        drafter = LMDrafter(random_target("llama", seed=5))
        replies = Engine(target, drafter, parse_shape("1x16"), rule=JudgeRule(judge)).generate(PROMPTS, GREEDY)
        return sum(len(reply.by_rule) for reply in replies), sum(len(reply.token_ids) for reply in replies)

    judge = random_judge(target, 0.2)
    everywhere = tuple(range(3, target.ends.vocab_size))
    free = by_rule(judge)
    assert by_rule(judge.with_gate("line", line_end_ids=everywhere)) == free  # each token is a line
    assert by_rule(judge.with_gate("line", line_end_ids=[0]))[0] < free[0]  # hardly a line ends
    assert free[0] > 0


def test_a_gate_is_for_chains(target: Target) -> None:
    rule = JudgeRule(random_judge(target, 0.5).with_gate("reply", veto=True))
    with pytest.raises(ValueError, match=r"the rule judge 0\.5, reply gate with a veto has a gate, .* draft a chain"):
        Engine(target, LMDrafter(random_target("llama", seed=5)), parse_shape("2x3"), rule=rule)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"gate": "word"}, "gate is 'word'; it is one of none, line, reply"),
        ({"veto": True}, "veto is True; .* only with a gate"),
        ({"gate": "line"}, "the gate of lines needs the tokens that end a line"),
        ({"gate": "reply", "line_end_ids": [3]}, "no other gate has any"),
        ({"gate": "line", "line_end_ids": [-1]}, "a list of token ids"),
        ({"drafters": [{"name": "a"}]}, "name, fingerprint and shapes"),
    ],
)
def test_gates_out_of_order_are_an_error(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Judge(JudgeConfig(hidden_size=8, **fields))  # type: ignore[arg-type]
