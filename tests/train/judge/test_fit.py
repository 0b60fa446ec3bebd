"""The sweep of regressions lands where scikit-learn lands."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn import linear_model
from torch import Tensor

from draftsmith.train.judge.fit import Scaling, SweepLBFGS, SweepProblem, measure_scaling, project

CPU = torch.device("cpu")


class Rows:
    """Features in memory, `step` rows at a time."""

    def __init__(self, features: Tensor, step: int = 300) -> None:
        self.features, self.step = features, step

    def parts(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.features), self.step):
            rows = slice(start, start + self.step)
            yield rows, self.features[rows].to(device)


def some(num_tokens: int = 2000, num_features: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of very different size, far from 0, that go together; a fifth of the tokens is wrong."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features)) + 3 * np.eye(num_features)
    raw = rng.normal(size=(num_tokens, num_features)) @ mixing
    score = raw @ rng.normal(size=num_features) / 30 + 1.5 + rng.logistic(size=num_tokens)
    features = raw * 10.0 ** rng.uniform(-2, 2, num_features) + rng.normal(0, 50, num_features)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(score > 0)


def same(values: Tensor) -> Tensor:
    return values


def fit(
    features: Tensor, labels: Tensor, weights: Tensor, l2: list[float], steps: int = 40, **settings: float
) -> tuple[Tensor, SweepProblem, Scaling]:
    data = Rows(features)
    scaling = measure_scaling(data, features.shape[1], CPU, same)
    problem = SweepProblem(data, labels, weights / weights.sum(), scaling, torch.tensor(l2, dtype=torch.float64), same)
    theta = torch.nn.Parameter(torch.zeros(len(l2), features.shape[1] + 1, dtype=torch.float64))
    optimizer = SweepLBFGS(theta, **({"tolerance": 1e-11} | settings))  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.step(problem=problem)
    return theta.detach(), problem, scaling


@pytest.mark.parametrize("wrong_weight", [1.0, 3.0])
def test_every_penalty_lands_on_scikit_learns_optimum(wrong_weight: float) -> None:
    features, labels = some()
    num_tokens, num_correct = len(labels), int(labels.sum())
    by_class = {1: num_tokens / (2 * num_correct), 0: wrong_weight * num_tokens / (2 * (num_tokens - num_correct))}
    weights = torch.where(labels, by_class[1], by_class[0]).double()
    penalties = [1e-4, 1e-2, 1.0, 100.0]
    l2 = [1.0 / (C * float(weights.sum())) for C in penalties]
    theta, problem, scaling = fit(features, labels, weights, l2)
    problem.open(theta)
    losses = problem.losses(theta)
    standard = ((features.double() - scaling.mean) / scaling.scale).numpy()
    for index, C in enumerate(penalties):
        reference = linear_model.LogisticRegression(C=C, class_weight=by_class, solver="newton-cholesky", tol=1e-12)
        reference.fit(standard, labels.numpy().astype(int))
        theirs = torch.cat([torch.tensor(reference.coef_[0]), torch.tensor(reference.intercept_)])
        assert torch.allclose(theta[index], theirs, rtol=1e-6, atol=1e-7), (C, (theta[index] - theirs).abs().max())
        problem.open(theirs.expand(len(l2), -1).contiguous())
        assert float(losses[index]) == pytest.approx(
            float(problem.losses(theirs.expand(len(l2), -1))[index]), rel=1e-10
        )


def test_balanced_weights_sum_to_the_number_of_tokens_so_that_l2_is_one_over_c_n() -> None:
    features, labels = some(500, 8)
    weights = torch.where(labels, 500 / (2 * labels.sum()), 500 / (2 * (~labels).sum())).double()
    assert float(weights.sum()) == pytest.approx(500)
    theta, _, scaling = fit(features, labels, weights, [1.0 / (0.1 * 500)])
    reference = linear_model.LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10)
    reference.fit(((features.double() - scaling.mean) / scaling.scale).numpy(), labels.numpy())
    assert torch.allclose(theta[0, :-1], torch.tensor(reference.coef_[0]), atol=1e-5)


def test_gradient_and_objective_agree() -> None:
    features, labels = some(200, 5)
    data = Rows(features, 64)
    scaling = measure_scaling(data, 5, CPU, same)
    weights = torch.rand(200, dtype=torch.float64)
    problem = SweepProblem(data, labels, weights / weights.sum(), scaling, torch.tensor([0.1, 2.0]).double(), same)
    theta = torch.randn(2, 6, dtype=torch.float64)
    problem.open(theta)
    gradient = problem.gradient(theta)
    for s in range(2):
        for p in range(6):
            ends = []
            for sign in (1, -1):
                near = theta.clone()
                near[s, p] += sign * 1e-4
                problem.open(near)
                ends.append(float(problem.losses(near)[s]))
            assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float(gradient[s, p]), abs=1e-7)


def test_a_row_does_not_hang_on_its_neighbours() -> None:
    features, labels = some(400, 12)
    weights = torch.ones(400).double()
    together, *_ = fit(features, labels, weights, [1e-3, 1e-1, 10.0], steps=3)
    alone, *_ = fit(features, labels, weights, [1e-1], steps=3)
    assert torch.allclose(together[1], alone[0], rtol=1e-6, atol=1e-9)


def test_steps_taken_in_one_call_or_in_many_end_at_the_same_place() -> None:
    features, labels = some(400, 12)
    weights = torch.ones(400).double()
    one, *_ = fit(features, labels, weights, [1e-2], steps=1, iterations=12)
    many, *_ = fit(features, labels, weights, [1e-2], steps=12, iterations=1)
    assert torch.allclose(one, many, rtol=1e-5, atol=1e-8)


def test_a_feature_that_never_changes_gets_scale_one_and_no_weight() -> None:
    features, labels = some(300, 4)
    features[:, 2] = 7.25
    theta, _, scaling = fit(features, labels, torch.ones(300).double(), [1e-2], steps=5)
    assert float(scaling.scale[2]) == 1.0
    assert float(theta[0, 2]) == 0.0


def test_scaling_keeps_the_digits_of_features_far_from_zero() -> None:
    noise = torch.randn(5000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = (4096.0 + noise).float()
    scaling = measure_scaling(Rows(features), 1, CPU, same)
    assert float(scaling.mean) == pytest.approx(float(features.double().mean()), abs=1e-9)
    assert float(scaling.scale) == pytest.approx(float(features.double().std(correction=0)), rel=1e-9)


def test_separable_tokens_stay_finite() -> None:
    features = torch.cat([torch.randn(50, 3) - 20, torch.randn(50, 3) + 20])
    labels = torch.arange(100) >= 50
    theta, _, scaling = fit(features, labels, torch.ones(100).double(), [1e-9], steps=20)
    assert bool(theta.isfinite().all())
    values = project(Rows(features), scaling, theta, 100)[:, 0]
    assert torch.equal(values > 0, labels)
