"""The procedure itself, with scripted models: literal labels, ends, budgets, and the plain twin."""

from collections.abc import Callable

import pytest
from doubles import VOCAB, random_target

from draftsmith.label.mine.many_questions import Miner
from draftsmith.label.mine.plain import mine_plain
from draftsmith.label.mine.question_mining import MiningQuestion, MiningResult, QuestionMining, Rules, Swap

END = 1
PROMPT = [50]
Next = Callable[[list[int]], int]


def last_digit(reply: list[int]) -> str | None:
    """The answer is the last token before the end, where that is a digit."""
    body = [token for token in reply if token != END]
    return str(body[-1]) if body and body[-1] < 40 else None


def rules(**settings: object) -> Rules:
    return Rules(**({"parse": last_digit, "eos_token_ids": (END,), "max_new_tokens": 12} | settings))  # type: ignore[arg-type]


def script(*lines: list[int], otherwise: int = END) -> Next:
    """A model that continues the first line that a reply begins."""

    def follow(tokens: list[int]) -> int:
        reply = tokens[len(PROMPT) :]
        return next((line[len(reply)] for line in lines if line[: len(reply)] == reply and line != reply), otherwise)

    return follow


def driven(target: Next, draft: Next, question: MiningQuestion | None = None, **settings: object) -> MiningResult:
    """Walks a question with functions for models."""
    walk = QuestionMining(question or MiningQuestion("q", PROMPT), rules(**settings))
    while walk.phase != "done":
        while walk.wants_guess():
            walk.guess(draft(walk.target_tokens()[0]))
        ask, model = (walk.target_tokens, target) if walk.needs_target else (walk.draft_tokens, draft)
        tokens, num_asked = ask()
        said = [model(tokens[: len(tokens) - back]) for back in reversed(range(num_asked))]
        (walk.take_target if walk.needs_target else walk.take_draft)(said)
    return walk.mined()


@pytest.mark.parametrize("settings", [{}, {"draft_window": 0, "draft_length": 0, "look_ahead": 1}, {"draft_length": 9}])
def test_a_swap_that_keeps_the_answer_is_correct_and_stays_in_and_one_that_loses_it_is_wrong(
    settings: dict[str, int],
) -> None:
    target = script([41, 42, 43, 7, END], [41, 44, 43, 7, END], [41, 44, 45, 8, END])
    draft = script([41, 44, 45, 7, END], [41, 44, 43, 7, END], [41, 42, 43, 7, END])
    mined = driven(target, draft, **settings)
    assert mined.first_reply_ids == [41, 42, 43, 7, END]
    assert mined.swaps == (Swap(1, 42, 44, 1), Swap(2, 43, 45, 0))
    assert mined.reply_ids == [41, 44, 43, 7, END]
    assert mined.answer == "7"


def test_an_end_token_from_the_draft_ends_the_walk_whether_the_answer_stands_or_not() -> None:
    target = script([41, 7, 42, 7, END])
    early = driven(target, script([41, 7, END]))
    assert early.swaps == (Swap(2, 42, END, 1),)
    assert early.reply_ids == [41, 7, END]
    lost = driven(target, script([END], [41, 8, 9]))
    assert lost.swaps == (Swap(0, 41, END, 0),)
    assert lost.reply_ids == [41, 7, 42, 7, END]


def test_a_given_reply_is_walked_along_and_cut_at_its_end_token() -> None:
    target = script([41, 7, END], [43, 7, END])
    mined = driven(target, script([43, 7, END]), MiningQuestion("q", PROMPT, [41, 7, END, 3, 3]))
    assert mined.first_reply_ids == [41, 7, END]
    assert mined.swaps == (Swap(0, 41, 43, 1),)


def test_what_answers_nothing_or_not_as_the_reference_is_left_out_with_the_reason() -> None:
    target, draft = script([41, 42, END]), script([41, 43, END])
    assert driven(target, draft).left_out == "the target's reply has no answer that can be read"
    target, draft = script([41, 7, END]), script([43, 7, END])
    asked = MiningQuestion("q", PROMPT, reference="8")
    against = driven(target, draft, asked, against="reference")
    assert (against.left_out, against.swaps) == ("the target's answer is not the reference's", ())
    assert driven(target, draft, asked).left_out is None


def test_a_reply_ends_at_its_budget_and_an_alternative_has_one_token_at_least() -> None:
    loop: Next = lambda tokens: 7  # noqa: E731
    mined = driven(loop, lambda tokens: 8 if len(tokens) == 4 else 7, max_new_tokens=4)
    assert mined.first_reply_ids == [7, 7, 7, 7]
    assert mined.swaps == (Swap(3, 7, 8, 1),)
    assert mined.reply_ids == [7, 7, 7, 8, 7]


def test_max_length_bounds_an_alternative_by_the_first_answer() -> None:
    target = script([41, 7, END], [43, *[44] * 20], otherwise=44)
    mined = driven(target, script([43, 7, END], [41, 7, END]), max_new_tokens=40, max_length=2)
    assert mined.swaps == (Swap(0, 41, 43, 0),)
    kept = driven(
        lambda tokens: 7, lambda tokens: 8, MiningQuestion("q", PROMPT, [5, 7]), max_new_tokens=40, max_length=2
    )
    assert len(kept.reply_ids) == 5


def test_a_rejoined_alternative_takes_the_known_rest_for_granted_when_told_so() -> None:
    first = [41, 10, 11, 12, 13, 7, END]
    swapped = [42, 10, 11, 12, 14, 8, END]
    target, draft = script(first, swapped), script([42, 10, 11, 12, 13, 7, END])
    assert driven(target, draft).swaps[0] == Swap(0, 41, 42, 0)
    trusting = driven(target, draft, stop_on_rejoin=3)
    assert trusting.swaps == (Swap(0, 41, 42, 1),)
    assert trusting.reply_ids == [42, 10, 11, 12, 13, 7, END]
    assert driven(target, draft, stop_on_rejoin=4).swaps[0].label == 0


@pytest.mark.parametrize(
    "setting",
    [{"max_new_tokens": 0}, {"draft_window": -1}, {"look_ahead": 0}, {"max_length": 0.9}, {"stop_on_rejoin": 2}],
)
def test_numbers_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(setting))} is {next(iter(setting.values()))}; it must be at least"
    ):
        rules(**setting)


def remainder(reply: list[int]) -> str | None:
    """An answer that about half of all swaps change, and a few replies do not have."""
    rest = sum(reply) % 5
    return None if rest == 4 else str(rest % 2)


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", {}),
    ("llama", {"max_length": 1.5, "draft_window": 3}),
    ("mistral", {"draft_length": 0}),
    ("gpt2", {"draft_length": 3, "look_ahead": 4, "max_new_tokens": 14}),
    ("llama", {"context": 30}),
])  # fmt: skip
def test_batched_mining_of_random_models_equals_the_plain_procedure(family: str, settings: dict[str, int]) -> None:
    target, draft = random_target(family), random_target(family, seed=1)
    ends = tuple(range(2, 8))
    chosen = Rules(**({"parse": remainder, "eos_token_ids": ends, "max_new_tokens": 24, "context": 96} | settings))  # type: ignore[arg-type]
    questions = [MiningQuestion(str(n), [(7 * n + k) % VOCAB for k in range(3 + n % 5)]) for n in range(7)]
    expected = {question.id: mine_plain(target, draft, question, chosen) for question in questions}
    swaps = [swap for mined in expected.values() for swap in mined.swaps]
    assert {swap.label for swap in swaps} == {0, 1}
    assert any(swap.draft_token in ends for swap in swaps)
    for batch_rows in (1, 4):
        miner = Miner(target, draft, chosen, batch_rows)
        for mined in miner.mine(questions):
            plain = expected.pop(mined.id) if batch_rows == 4 else expected[mined.id]
            assert (mined.swaps, mined.reply_ids, mined.answer, mined.left_out) == (
                plain.swaps, plain.reply_ids, plain.answer, plain.left_out
            )  # fmt: skip
    assert expected == {}
