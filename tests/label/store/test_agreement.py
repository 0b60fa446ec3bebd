from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data.chats.messages import Message
from draftsmith.label.page.markable_spans import words
from draftsmith.label.schema import Answer, Label, Span, Verdict
from draftsmith.label.store.agreement import (
    Agreement,
    are_comparable,
    cohens_kappa,
    compared,
    speaks_of_all,
    token_distance,
)


def labelled(item: str, author: str, verdict: Verdict, error: Span | None = None) -> Answer:
    messages = (Message(role="user", content="1+1?"),)
    label = Label(verdict, author, "person", error)
    return Answer(item, messages, "1 + 1 = 3, so 3", "model", "MIT", "tests", label)


def cut(answer: Answer) -> tuple[Span, ...]:
    return words(answer.response)


def test_kappa_is_that_of_a_table_worked_out_by_hand() -> None:
    # 20 both correct, 5 and 10 only one of them, 15 both wrong: observed 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert cohens_kappa(pairs) == pytest.approx(0.4)


def test_kappa_is_zero_where_one_annotator_never_varies_and_minus_one_in_full_contradiction() -> None:
    assert cohens_kappa([(True, True), (True, False)]) == 0
    assert cohens_kappa([(True, False), (False, True)]) == -1


@pytest.mark.parametrize("pairs", [[], [(True, True)] * 3, [(False, False)]])
def test_kappa_is_not_told_where_it_is_not_defined(pairs: list[tuple[bool, bool]]) -> None:
    assert cohens_kappa(pairs) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_kappa_knows_neither_order_nor_sides_and_is_one_only_for_full_agreement(pairs: list[tuple[bool, bool]]) -> None:
    kappa = cohens_kappa(pairs)
    assert kappa == cohens_kappa([(other, one) for one, other in reversed(pairs)])
    assert kappa == cohens_kappa([(not one, not other) for one, other in pairs])
    if kappa is not None:
        assert -1 <= kappa <= 1
        assert (kappa == 1) == all(one == other for one, other in pairs)


def test_a_distance_is_counted_from_the_first_token_of_each_mark() -> None:
    tokens = [(0, 2), (2, 3), (3, 7)]
    assert token_distance((1, 3), (4, 5), tokens) == 2
    assert token_distance((4, 5), (1, 3), tokens) == 2
    assert token_distance((2, 3), (2, 7), tokens) == 0, "a longer mark that begins at the same token"
    assert token_distance((1, 3), (7, 8), tokens) is None, "no token there"


def test_two_annotators_are_compared_on_what_both_labelled() -> None:
    pairs = [
        (labelled("a", "alice", "wrong", (14, 15)), labelled("a", "bob", "wrong", (8, 9))),
        (labelled("b", "alice", "correct"), labelled("b", "bob", "correct")),
        (labelled("d", "alice", "wrong", (0, 1)), labelled("d", "bob", "unplaced")),
    ]
    assert all(are_comparable(first, second) for first, second in pairs)
    pair = Agreement("alice", "bob", tuple(compared(first, second, cut) for first, second in pairs))
    assert [each.item_id for each in pair.comparisons] == ["a", "b", "d"]
    assert pair.observed() == 1, "wrong without a place is wrong all the same"
    assert pair.kappa() == 1
    # 1 | + | 1 | = | 3 | , | so | 3: from the fifth word to the eighth
    assert pair.distances() == (3,)
    other = compared(labelled("a", "alice", "wrong", (14, 15)), labelled("a", "carol", "correct"), cut)
    assert Agreement("alice", "carol", (other,)).observed() == 0


def test_a_label_on_a_part_of_the_answer_is_not_compared() -> None:
    whole = labelled("a", "alice", "correct")
    assert whole.label is not None
    part = replace(whole, label=replace(whole.label, labelled_by="bob", checked=(0, 5)))
    assert not are_comparable(whole, part)
    assert are_comparable(whole, replace(whole, label=replace(whole.label, labelled_by="bob")))
    assert speaks_of_all(replace(whole, label=replace(whole.label, checked=(0, 15))))
    assert not speaks_of_all(replace(whole, label=None))


@pytest.mark.parametrize(("checked", "told"), [((0, 9), True), ((3, 9), False), (None, True)])
def test_an_error_is_known_to_be_the_first_if_all_before_it_was_checked(checked: Span | None, told: bool) -> None:
    answer = labelled("a", "alice", "wrong", (8, 9))
    assert answer.label is not None
    assert speaks_of_all(replace(answer, label=replace(answer.label, checked=checked))) is told
