"""Logistic regressions that differ in their L2 penalty only, fitted together over data that comes a part at a time.

Owns the objective and the optimiser that finds its minimum. Both use float64: near the minimum, objectives differ in their last digits
only. Knows no Lightning, no files, and not where the features are from.

scikit-learn's ``LogisticRegression`` finds the same minimum, and tests compare the two. It cannot replace this file:

- Several processes train as one here: each holds its own rows, and sums run over all. scikit-learn needs every row in one process.
- A run validates and resumes between iterations, with the same weights in the end. scikit-learn keeps no curvature between two calls.
- Features are read a part at a time. Over 20,000 tokens of 1,024 numbers (78 MiB), six penalties added 0.23 GiB here, and 0.46 GiB there,
  where the standardised copy alone doubles the features. (scikit-learn took a third of the time, for six fits one after another.)

Shape legend: N tokens of this process, F features, S penalties (the sweep), P = F + 1 numbers of one regression, its bias last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_LINE_STEPS = 30
_LINE_TOLERANCE = 1e-2


class FeatureParts(Protocol):
    """Rows of features, a part at a time."""

    def parts(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Features, a part at a time.

        Args:
            device: where the features go.

        Yields:
            a slice of the rows, and their features, float32 [rows, F].
        """
        ...


@dataclass(frozen=True)
class Scaling:
    """What standardises features.

    Attributes:
        mean: float64 [F].
        scale: float64 [F]; 1 for a feature that never changes.
    """

    mean: Tensor
    scale: Tensor

    def centred(self, features: Tensor) -> Tensor:
        """Features without their means.

        The division by the scales is left out: it is cheaper on weights and gradients than on rows.

        Args:
            features: float32 [rows, F].

        Returns:
            float64 [rows, F].
        """
        return features - self.mean  # promoted to float64 on the way


def measure_scaling(
    data: FeatureParts, num_features: int, device: torch.device, total: Callable[[Tensor], Tensor]
) -> Scaling:
    """Mean and standard deviation (divided by the number of tokens) of each feature.

    Args:
        data: this process's rows.
        num_features: F.
        device: where to compute.
        total: sums a tensor over all processes.
    """
    sums = torch.zeros(num_features + 1, dtype=torch.float64, device=device)
    for _, features in data.parts(device):
        sums[:-1] += features.double().sum(0)
        sums[-1] += features.shape[0]
    sums = total(sums)
    mean = sums[:-1] / sums[-1]
    # A second pass: squares less the squared mean would lose the digits of features that stand far from 0.
    squares = torch.zeros(num_features, dtype=torch.float64, device=device)
    for _, features in data.parts(device):
        squares += (features.double() - mean).square().sum(0)
    scale = (total(squares) / sums[-1]).sqrt()
    return Scaling(mean, torch.where(scale > 1e-12 * mean.abs().clamp(min=1.0), scale, torch.ones_like(scale)))


def project(data: FeatureParts, scaling: Scaling, theta: Tensor, num_rows: int) -> Tensor:
    """Each regression's value at each row.

    Args:
        data: this process's rows.
        scaling: of the features.
        theta: float64 [S, P].
        num_rows: N.

    Returns:
        float64 [N, S].
    """
    values = torch.empty(num_rows, theta.shape[0], dtype=torch.float64, device=theta.device)
    weights = theta[:, :-1] / scaling.scale
    for rows, features in data.parts(theta.device):
        values[rows] = scaling.centred(features) @ weights.T
    return values + theta[:, -1]


class SweepProblem:
    """The objective of each penalty, as a function of one point that moves: mean weighted cross-entropy + l2 / 2 * |weight|².

    For the penalty l2_s, with class weights c_i that sum to W over the tokens of all processes and z = weight . x + bias::

        f_s(weight, bias) = 1/W * sum over i of c_i * (softplus(z_i) - y_i * z_i)  +  l2_s / 2 * |weight|²

    The bias is not penalised. scikit-learn's ``LogisticRegression(C, class_weight)`` minimises C * W * f for ``l2 = 1 / (C * W)``; with
    balanced classes W is the number of tokens.

    Args:
        data: this process's rows.
        labels: bool [N], True is correct.
        weights: float64 [N], c_i / W.
        scaling: of the features.
        l2: float64 [S].
        total: sums a tensor over all processes.
    """

    def __init__(
        self,
        data: FeatureParts,
        labels: Tensor,
        weights: Tensor,
        scaling: Scaling,
        l2: Tensor,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        self._data, self._scaling, self._total = data, scaling, total
        self._labels, self._weights = labels.double()[:, None], weights[:, None]
        self._l2 = l2
        self._values = torch.empty(0)

    def open(self, theta: Tensor) -> None:
        """Puts the point at theta.

        Args:
            theta: float64 [S, P].
        """
        self._values = project(self._data, self._scaling, theta, len(self._labels))

    def losses(self, theta: Tensor) -> Tensor:
        """The objectives at the point.

        Args:
            theta: float64 [S, P], the point.

        Returns:
            float64 [S].
        """
        entropy = torch.nn.functional.softplus(self._values) - self._labels * self._values
        return self._total((self._weights * entropy).sum(0)) + self._l2 / 2 * theta[:, :-1].square().sum(1)

    def gradient(self, theta: Tensor) -> Tensor:
        """The objectives' gradients at the point.

        Args:
            theta: float64 [S, P], the point.

        Returns:
            float64 [S, P].
        """
        residual = self._weights * (torch.sigmoid(self._values) - self._labels)
        gradient = torch.zeros_like(theta)
        for rows, features in self._data.parts(theta.device):
            gradient[:, :-1] += residual[rows].T @ self._scaling.centred(features)
        gradient[:, :-1] /= self._scaling.scale
        gradient[:, -1] = residual.sum(0)
        gradient = self._total(gradient)
        gradient[:, :-1] += self._l2[:, None] * theta[:, :-1]
        return gradient

    def best_steps(self, theta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """How far to go along a direction in which every objective falls.

        The objectives are convex along it and the values linear, so the minimum is the one root of the slope. Newton's steps find it, kept
        within a bracket by halving or doubling, without another pass over the features.

        Args:
            theta: float64 [S, P], the point.
            direction: float64 [S, P].

        Returns:
            the steps, float64 [S], and how the values change, float64 [N, S].
        """
        change = project(self._data, self._scaling, direction, len(self._labels))
        moved = direction[:, :-1]
        bend = self._l2 * moved.square().sum(1)
        steps = torch.zeros_like(self._l2)
        low, high = steps.clone(), torch.full_like(steps, torch.inf)
        first: Tensor | None = None
        for _ in range(_LINE_STEPS):
            chance = torch.sigmoid(self._values + steps * change)
            slope = (self._weights * (chance - self._labels) * change).sum(0)
            curvature = (self._weights * chance * (1 - chance) * change.square()).sum(0)
            slope, curvature = self._total(torch.stack([slope, curvature]))
            slope = slope + self._l2 * ((theta[:, :-1] * moved).sum(1) + steps * moved.square().sum(1))
            first = slope if first is None else first
            done = slope.abs() <= _LINE_TOLERANCE * first.abs()
            if bool(done.all()):
                break
            low, high = torch.where(slope < 0, steps, low), torch.where(slope > 0, steps, high)
            newton = steps - slope / (curvature + bend).clamp(min=1e-300)
            halfway = torch.where(high.isinf(), 2 * low + 1.0, (low + high) / 2)
            inside = (newton > low) & (newton < high) & newton.isfinite()
            steps = torch.where(done, steps, torch.where(inside, newton, halfway))
        return steps, change

    def move(self, steps: Tensor, change: Tensor) -> None:
        """Moves the point along a direction whose change of values is known.

        Args:
            steps: float64 [S].
            change: float64 [N, S].
        """
        self._values = self._values + steps * change


class SweepLBFGS(torch.optim.Optimizer):
    """Limited-memory BFGS for regressions that share their data and nothing else.

    Each row of the one parameter [S, P] has its own curvature and its own step, though all pass through the data together. An iteration
    takes two passes over the features. torch.optim.LBFGS would give all rows one step and one curvature: the worst conditioned row would
    slow down the others.

    Args:
        theta: the parameter, float64 [S, P].
        iterations: of one call of step().
        history: pairs of steps and gradient changes that are remembered, over calls of step() too.
        tolerance: a row whose largest gradient entry is not above it stays where it is.
    """

    def __init__(self, theta: Tensor, iterations: int = 10, history: int = 20, tolerance: float = 1e-6) -> None:
        super().__init__([theta], {"iterations": iterations, "history": history, "tolerance": tolerance})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, problem: SweepProblem | None = None) -> Any:
        """Runs the iterations.

        Args:
            closure: called once, as trainers expect.
            problem: the objectives; always needed.

        Returns:
            what the closure returned.
        """
        assert problem is not None, "step() needs the problem"
        result = None if closure is None else closure()
        [group] = self.param_groups
        [theta] = group["params"]
        problem.open(theta)
        gradient = problem.gradient(theta)
        for _ in range(group["iterations"]):
            is_open = gradient.abs().amax(1, keepdim=True) > group["tolerance"]
            if not bool(is_open.any()):
                break
            direction = torch.where(is_open, -self._with_curvature(theta, gradient), 0.0)
            steps, change = problem.best_steps(theta, direction)
            problem.move(steps, change)
            moved = steps[:, None] * direction
            theta += moved
            before, gradient = gradient, problem.gradient(theta)
            self._remember(theta, moved, gradient - before, group["history"])
        self.state[theta]["largest_gradient"] = gradient.abs().amax(1)
        return result

    def _with_curvature(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """The gradient times the inverse Hessian as far as it is known: the two loops of L-BFGS (Nocedal and Wright, algorithm 7.4)."""
        state = self.state[theta]
        result = gradient.clone()
        if "moved" not in state:
            return result
        moved, changed = state["moved"], state["changed"]
        products = (moved * changed).sum(-1, keepdim=True)  # [pairs, S, 1]; 0 for a row that stood still
        inverse = torch.where(products > 0, 1.0 / products.clamp(min=1e-300), 0.0)
        shares = []
        for index in reversed(range(len(moved))):
            share = inverse[index] * (moved[index] * result).sum(-1, keepdim=True)
            result = result - share * changed[index]
            shares.append(share)
        result = result * self._first_guess(products, changed)
        for index, share in zip(range(len(moved)), reversed(shares), strict=True):
            other = inverse[index] * (changed[index] * result).sum(-1, keepdim=True)
            result = result + (share - other) * moved[index]
        return result

    @staticmethod
    def _first_guess(products: Tensor, changed: Tensor) -> Tensor:
        """[S, 1]: the inverse curvature along each row's latest pair, 1 for a row without any."""
        guess = torch.ones_like(products[0])
        for product, change in zip(products, changed, strict=True):
            squares = change.square().sum(-1, keepdim=True)
            guess = torch.where(product > 0, product / squares.clamp(min=1e-300), guess)
        return guess

    def _remember(self, theta: Tensor, moved: Tensor, changed: Tensor, history: int) -> None:
        state = self.state[theta]
        for name, latest in (("moved", moved), ("changed", changed)):
            kept = state[name][-(history - 1) :] if name in state and history > 1 else latest[None][:0]
            state[name] = torch.cat([kept, latest[None]])
