"""ROC, precision, calibration and thresholds of a judge, against hand-made numbers and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.models.judge import CurvePoint
from draftsmith.train.judge.metrics import (
    average_precision,
    choose_threshold,
    curve,
    reliability,
    roc_auc,
    roc_curve,
    wrong_precision_recall,
)

TOKENS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=60).filter(
    lambda rows: len({label for _, label, _ in rows}) == 2
)


def of(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, questions = (np.array(column) for column in zip(*rows, strict=True))
    return scores / 8, labels, questions


def some(num_tokens: int = 4000, num_questions: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens whose questions differ in how hard they are, so that tokens of a question go together."""
    rng = np.random.default_rng(seed)
    questions = rng.integers(0, num_questions, num_tokens)
    labels = (rng.random(num_tokens) < 0.8).astype(int)
    hard = rng.normal(0, 1.5, num_questions)[questions]
    return 1 / (1 + np.exp(-(1.5 * labels + hard + rng.normal(0, 1, num_tokens)))), labels, questions


def test_areas_by_hand() -> None:
    # Wrong at 1 and 3, correct at 2, 3 and 4: 2>1, 3>1, 4>1, 4>3 are won, 3=3 is half, 2>3 is lost.
    assert roc_auc([1, 3, 2, 3, 4], [0, 0, 1, 1, 1]) == pytest.approx(4.5 / 6)
    wrong, correct = roc_curve([1, 3, 2, 3, 4], [0, 0, 1, 1, 1])
    assert wrong.tolist() == [0, 0, 0.5, 0.5, 1]
    assert correct == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    recall, precision = wrong_precision_recall([1, 3, 2, 3, 4], [0, 0, 1, 1, 1])
    assert recall.tolist() == [0.5, 0.5, 1, 1]
    assert precision == pytest.approx([1, 1 / 2, 2 / 4, 2 / 5])


@settings(deadline=None)
@given(TOKENS)
def test_the_area_is_the_share_of_pairs_in_which_the_correct_token_scores_higher(
    rows: list[tuple[int, int, int]],
) -> None:
    scores, labels, _ = of(rows)
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    won = sum(float(correct > wrong) + 0.5 * float(correct == wrong) for correct, wrong in pairs)
    assert roc_auc(scores, labels) == pytest.approx(won / len(pairs))


@settings(deadline=None)
@given(TOKENS)
def test_average_precision_is_that_of_each_wrong_token_in_turn(rows: list[tuple[int, int, int]]) -> None:
    scores, labels, _ = of(rows)
    wrong = labels == 0
    precisions = [wrong[scores <= score].mean() for score in scores[wrong]]
    assert average_precision(scores, labels) == pytest.approx(np.mean(precisions))


@settings(deadline=None)
@given(TOKENS)
def test_curves_pass_through_every_threshold(rows: list[tuple[int, int, int]]) -> None:
    scores, labels, _ = of(rows)
    wrong, correct = labels == 0, labels == 1
    loosened = sorted(set(scores), reverse=True)
    shares = [(0.0, 0.0), *((np.mean(scores[wrong] >= least), np.mean(scores[correct] >= least)) for least in loosened)]
    assert np.transpose(roc_curve(scores, labels)) == pytest.approx(np.array(shares))
    rejecting = [(np.mean(scores[wrong] <= most), np.mean(wrong[scores <= most])) for most in loosened[::-1]]
    assert np.transpose(wrong_precision_recall(scores, labels)) == pytest.approx(np.array(rejecting))


def test_calibration_by_hand() -> None:
    found = reliability([0.05, 0.15, 0.95, 0.85, 1.0], [0, 1, 1, 0, 1], num_bins=2)
    assert found.counts.tolist() == [2, 3]
    assert found.probability == pytest.approx([0.1, 2.8 / 3])
    assert found.correct == pytest.approx([0.5, 2 / 3])
    assert found.error == pytest.approx((2 * 0.4 + 0.8) / 5)


def test_an_empty_bin_is_no_number() -> None:
    found = reliability([0.1, 0.9], [0, 1], num_bins=3)
    assert np.isnan(found.correct).tolist() == [False, True, False]


@settings(deadline=None)
@given(TOKENS, st.floats(0, 1))
def test_the_threshold_accepts_most_of_what_the_limit_allows(
    rows: list[tuple[int, int, int]], max_wrong: float
) -> None:
    scores, labels, questions = of(rows)
    point = choose_threshold(scores, labels, questions, max_wrong, num_replicates=5)

    def shares(threshold: float) -> tuple[float, float]:
        accepted = scores > threshold
        return float(accepted[labels == 1].mean()), float(accepted[labels == 0].mean())

    assert (point["correct"], point["wrong"]) == pytest.approx(shares(point["threshold"]))
    allowed = [shares(at)[0] for at in [-1.0, *scores] if shares(at)[1] <= max_wrong + 1e-12]
    assert point["wrong"] <= max_wrong + 1e-12
    # Probabilities of exactly 0 are the only ones that no threshold from 0 to 1 accepts.
    best = max(shares(at)[0] for at in [0.0, *scores] if shares(at)[1] <= max_wrong + 1e-12)
    assert point["correct"] == pytest.approx(best)
    assert best == max(allowed) or (scores == 0).any()


def test_the_threshold_lies_between_probabilities() -> None:
    point = choose_threshold([0.2, 0.4, 0.6, 0.8], [0, 0, 1, 1], [0, 1, 2, 3], max_wrong=0.0)
    assert point["threshold"] == pytest.approx(0.5)
    assert choose_threshold([0.9, 0.4], [0, 1], [0, 1], max_wrong=0.0)["threshold"] == 1.0
    assert choose_threshold([0.9, 0.4], [0, 1], [0, 1], max_wrong=1.0)["threshold"] == 0.0


@pytest.mark.parametrize("hold_upper", [False, True])
def test_a_gap_between_the_classes_holds_the_threshold_in_its_middle_whatever_the_limit_allows(
    hold_upper: bool,
) -> None:
    wrong, correct = [0.001] * 19 + [0.01], [0.9] * 5 + [0.999] * 15
    questions = list(range(20)) * 2
    point = choose_threshold([*wrong, *correct], [0] * 20 + [1] * 20, questions, max_wrong=0.3, hold_upper=hold_upper)
    # 0.01 and 0.9 are 1 : 99 and 9 : 1, so that their middle has odds of (9 / 99) ** 0.5.
    odds = (9 / 99) ** 0.5
    assert point["threshold"] == pytest.approx(odds / (1 + odds))
    assert (point["correct"], point["wrong"]) == (1.0, 0.0)


def test_where_no_correct_token_can_be_accepted_no_wrong_one_is() -> None:
    point = choose_threshold([0.2, 0.8, 0.9, 0.1], [0, 0, 0, 1], [0, 1, 2, 3], max_wrong=0.4)
    assert (point["threshold"], point["wrong"]) == (1.0, 0.0)


def test_the_upper_end_can_be_held_to_the_limit() -> None:
    data = some()
    plain = choose_threshold(*data, max_wrong=0.1)
    held = choose_threshold(*data, max_wrong=0.1, hold_upper=True)
    assert plain["wrong"] <= 0.1 < plain["wrong_high"]
    assert held["wrong_high"] <= 0.1
    assert held["threshold"] > plain["threshold"]
    assert held["correct"] < plain["correct"]
    # The next looser threshold would break it: the search has not been more careful than asked.
    looser = choose_threshold(*data, max_wrong=held["wrong"] + 3.5 / (data[1] == 0).sum())
    assert looser["wrong_high"] > 0.1


def test_intervals_by_question_are_wider_than_by_token() -> None:
    probabilities, labels, questions = some()

    def width(keys: np.ndarray) -> float:
        point = choose_threshold(probabilities, labels, keys, 0.2)
        assert point["wrong_low"] <= point["wrong"] <= point["wrong_high"]
        return point["wrong_high"] - point["wrong_low"]

    assert width(questions) > 2 * width(np.arange(len(labels)))


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        share = rng.beta(2, 6, 60)  # each question's own share of accepted wrong tokens; 0.25 on average
        questions = np.repeat(np.arange(60), 20)
        accepted = rng.random(1200) < share[questions]
        labels = np.zeros(1200, dtype=int)
        labels[::20] = 1
        [point] = [
            one
            for one in curve(np.where(accepted, 0.9, 0.1), labels, questions, 4, 200, seed=trial)
            if one["threshold"] == 0.1
        ]
        covered += point["wrong_low"] <= 0.25 <= point["wrong_high"]
    assert 50 <= covered <= 60


def test_the_curve_goes_from_all_to_nothing_and_is_the_same_each_time() -> None:
    data = some()
    points = curve(*data)
    assert points == curve(*data)
    assert len(points) > 30
    assert points[0]["correct"] == points[0]["wrong"] == 1.0
    assert points[-1]["correct"] == points[-1]["wrong"] == 0.0
    for before, after in itertools.pairwise(points):
        assert before["threshold"] < after["threshold"]
        for name in CurvePoint.__annotations__:
            assert name == "threshold" or before[name] >= after[name]  # type: ignore[literal-required]


def test_where_no_replicate_holds_a_wrong_token_its_interval_is_everything() -> None:
    # One replicate of two questions, only one of which has a wrong token: about a quarter of the seeds miss it.
    points = [
        choose_threshold([0.9, 0.2, 0.7], [1, 0, 1], ["a", "a", "b"], 0.0, num_replicates=1, seed=seed)
        for seed in range(30)
    ]
    intervals = [(point["wrong_low"], point["wrong_high"]) for point in points]
    assert set(intervals) == {(0.0, 0.0), (0.0, 1.0)}
    between = 1.0 / (1.0 + (0.8 / 0.2 * 0.3 / 0.7) ** 0.5)  # the middle of 0.2 and 0.7 in log-odds
    assert all(point["threshold"] == pytest.approx(between) for point in points)


def test_questions_may_be_words() -> None:
    probabilities, labels, questions = some(400)
    words = [f"q{number:03d}" for number in questions]
    assert choose_threshold(probabilities, labels, words) == choose_threshold(probabilities, labels, questions)


@pytest.mark.timeout(60)
def test_a_million_tokens_take_seconds() -> None:
    data = some(1_000_000, 500)
    assert choose_threshold(*data, hold_upper=True)["wrong_high"] <= 0.05
    assert len(curve(*data)) > 30


@pytest.mark.parametrize(
    ("probabilities", "labels", "questions", "settings", "told"),
    [
        ([0.1, 0.2], [1, 1], [0, 1], {}, r"labels are \[1\]; both 1"),
        ([0.1, 0.2], [1, -100], [0, 1], {}, r"labels are \[-100, 1\]"),
        ([0.1, np.nan], [1, 0], [0, 1], {}, "1 scores are NaN"),
        ([0.1, np.inf], [1, 0], [0, 1], {}, "1 scores are NaN or infinite"),
        ([0.1, 1.2], [1, 0], [0, 1], {}, "take the sigmoid"),
        ([0.1], [1, 0], [0, 1], {}, "one label each"),
        ([0.1, 0.2], [1, 0], [0], {}, "1 questions for 2 tokens"),
        ([0.1, 0.2], [1, 0], [0, 1], {"max_wrong": 1.5}, "max_wrong is 1.5"),
        ([0.1, 0.2], [1, 0], [0, 1], {"num_replicates": 0}, "at least 1"),
    ],
)
def test_bad_numbers_are_refused(
    probabilities: list[float], labels: list[int], questions: list[int], settings: dict[str, float], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        choose_threshold(probabilities, labels, questions, **settings)  # type: ignore[arg-type]
