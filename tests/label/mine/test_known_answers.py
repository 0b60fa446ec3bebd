"""The index of known answers: what it finds, and that what it finds is there."""

from hypothesis import given
from hypothesis import strategies as st

from draftsmith.label.mine.known_answers import SHORTEST_RUN, AnswerPosition, KnownAnswers

TOKENS = st.lists(st.integers(0, 3), max_size=30)


def test_a_run_that_stands_in_a_known_answer_is_followed_from_there() -> None:
    known = KnownAnswers()
    known.add([5, 6, 7, 8, 9])
    place = known.rejoin([1, 6, 7, 8])
    assert place == AnswerPosition(answer=0, position=4)
    assert known.following(place, 10) == [9]
    assert known.rejoin([1, 2, 7, 8]) is None
    assert known.rejoin([7, 8]) is None


def test_the_longest_match_wins_then_the_nearest_then_the_latest() -> None:
    known = KnownAnswers()
    known.add([1, 2, 3, 4, 50])
    known.add([9, 2, 3, 4, 60])
    assert known.rejoin([9, 2, 3, 4]) == AnswerPosition(1, 4)
    assert known.rejoin([1, 2, 3, 4]) == AnswerPosition(0, 4)
    assert known.rejoin([0, 2, 3, 4]) == AnswerPosition(1, 4)
    known.add([7, 7, 7, 7, 2, 3, 4, 70])
    assert known.rejoin([0, 0, 0, 0, 2, 3, 4]) == AnswerPosition(2, 7)


def test_an_answer_that_shares_its_beginning_is_indexed_behind_it_only() -> None:
    known = KnownAnswers()
    known.add([1, 2, 3, 4, 5])
    known.add([1, 2, 3, 6, 7], first=3)
    assert known.rejoin([0, 1, 2, 3]) == AnswerPosition(0, 3)
    assert known.rejoin([0, 2, 3, 6]) == AnswerPosition(1, 4)


@given(st.lists(TOKENS, max_size=4), TOKENS, st.integers(SHORTEST_RUN, 20))
def test_what_is_found_ends_with_the_run_asked_for_and_what_is_there_is_found(
    answers: list[list[int]], tokens: list[int], least: int
) -> None:
    known = KnownAnswers()
    for answer in answers:
        known.add(answer)
    there = any(
        tokens[-least:] == answer[end - least : end] for answer in answers for end in range(least, len(answer) + 1)
    )
    place = known.rejoin(tokens, least)
    assert (place is not None) == (there and len(tokens) >= least)
    if place is not None:
        assert answers[place.answer][place.position - least : place.position] == tokens[-least:]
