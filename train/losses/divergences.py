"""How far a drafter's distribution is from the target's: divergences over tokens, with their gradients in closed form.

Owns: the formulas, for draft heads and draft LMs alike. Does not know: models, batches, chunks.

With target_probs and draft_probs at one position, all sums over tokens (DistillSpec, arXiv:2310.08461, compares the first four):

    (1) forward KL        sum target_probs * log(target_probs / draft_probs)
    (2) reverse KL        sum draft_probs * log(draft_probs / target_probs)
    (3) JSD(beta)         beta * KL(target_probs || mean) + (1 - beta) * KL(draft_probs || mean),
                          mean = beta * target_probs + (1 - beta) * draft_probs       (GKD, arXiv:2306.13649, section 2)
    (4) total variation   1 - (5), which is 1/2 * sum |target_probs - draft_probs| where both sum to 1
    (5) acceptance        sum min(target_probs, draft_probs)                          (arXiv:2211.17192, corollary 3.6)
    (6) L1                2 * (4)                                                     (DSpark, arXiv:2607.05147)
    (7) negative log acceptance   -log (5)                                            (LK_alpha, arXiv:2602.23881)
    (8) LK hybrid         w * (1) + (1 - w) * (4), w = exp(-eta * (5)) held constant  (arXiv:2602.23881)

(5) is the chance that rejection sampling accepts a token drawn from draft_probs. Where g is the derivative of a divergence by
draft_probs, that by the draft's logits is draft_probs * (g - sum draft_probs * g). For (5), g is 1 where draft_probs <= target_probs.

(4) moves a token only as much as the draft says it already, so it learns slowly from scratch. (7) divides by the acceptance, which
undoes that: where the target is certain it is cross-entropy. (8) begins like (1) and ends like (4).

Shape legend: V tokens; "..." are rows, and the two distributions may broadcast against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

HeadDivergence = Literal["forward_kl", "reverse_kl", "total_variation", "l1", "negative_log_acceptance", "lk_hybrid"]
"""What a draft head can minimise with the target's distribution as its teacher."""

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "total_variation",
    "cross_entropy",
    "l1",
    "negative_log_acceptance",
    "lk_hybrid",
]
DIVERGENCES: tuple[DivergenceName, ...] = get_args(DivergenceName)
OF_ACCEPTANCE = ("total_variation", "l1", "negative_log_acceptance", "lk_hybrid")
"""Those that are made of the acceptance."""


def forward_kl(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """Forward KL, equation (1). Tokens that the target never says (-inf) add nothing.

    Args:
        target_log_probs: [..., V], the target's log-probabilities.
        draft_log_probs: [..., V], the draft's.

    Returns:
        [...], nats.
    """
    target_probs = target_log_probs.exp()
    return torch.where(target_probs > 0, target_probs * (target_log_probs - draft_log_probs), 0.0).sum(-1)


def reverse_kl(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """Reverse KL, equation (2).

    Args:
        target_log_probs: [..., V], the target's log-probabilities.
        draft_log_probs: [..., V], the draft's.

    Returns:
        [...], nats; infinite where the draft says what the target never does.
    """
    return forward_kl(draft_log_probs, target_log_probs)


def jsd(target_log_probs: Tensor, draft_log_probs: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, equation (3).

    Divided by beta it tends to (1) as beta tends to 0; divided by 1 - beta, to (2) as beta tends to 1.

    Args:
        target_log_probs: [..., V], the target's log-probabilities.
        draft_log_probs: [..., V], the draft's.
        beta: weight of the target in the mean, between 0 and 1.

    Returns:
        [...], nats; at most log 2 for beta 0.5.
    """
    mean_log_probs = _mean_log_probs(target_log_probs, draft_log_probs, beta)
    of_target, of_draft = forward_kl(target_log_probs, mean_log_probs), forward_kl(draft_log_probs, mean_log_probs)
    return beta * of_target + (1.0 - beta) * of_draft


def total_variation(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """Total variation, equation (4).

    Args:
        target_log_probs: [..., V], the target's log-probabilities.
        draft_log_probs: [..., V], the draft's.

    Returns:
        [...], between 0 (equal) and 1 (nothing in common).
    """
    return 0.5 * (target_log_probs.exp() - draft_log_probs.exp()).abs().sum(-1)


def acceptance(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """The chance that rejection sampling accepts a token of the draft, equation (5).

    Args:
        target_log_probs: [..., V], the target's log-probabilities.
        draft_log_probs: [..., V], the draft's.

    Returns:
        [...], from 0 to 1; probability of the target outside the V tokens counts as rejected.
    """
    return torch.minimum(target_log_probs, draft_log_probs).exp().sum(-1)


@dataclass(frozen=True)
class DivergenceLoss:
    """Which divergence is minimised.

    Args:
        name: one of the equations above; `cross_entropy`: no distillation, the text's own next token.
        beta: of `jsd`.
        eta: of `lk_hybrid`.

    Raises:
        ValueError: an unknown name, a beta outside 0 to 1, or an eta that is not positive.
    """

    name: DivergenceName
    beta: float = 0.5
    eta: float = 3.0

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(f"divergence {self.name!r} is not known; use one of {', '.join(DIVERGENCES)}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta is {self.beta}; it must lie between 0 and 1, both left out: those are forward_kl and reverse_kl"
            )
        if not 0.0 < self.eta < math.inf:
            raise ValueError(
                f"eta is {self.eta}; it must be positive: lk_hybrid weighs forward KL by exp(-eta * acceptance)"
            )

    def value(
        self, target_log_probs: Tensor, draft_log_probs: Tensor, labels: Tensor, accepted: Tensor | None = None
    ) -> Tensor:
        """The divergence of each row, differentiable: the plain twin of :meth:`gradient`.

        Cross-entropy learns nothing where the text's token is not among the V.

        Args:
            target_log_probs: [..., V], the target's log-probabilities, of a sum of 1.
            draft_log_probs: [..., V], the draft's.
            labels: int64 [...], the text's tokens; read by `cross_entropy` alone.
            accepted: [...], the acceptance, where the target's probabilities have a sum below 1; None computes it.

        Returns:
            [...], nats.
        """
        if self.name == "cross_entropy":
            labels, known = _within(labels, draft_log_probs.shape[-1])
            return torch.where(known, -draft_log_probs.gather(-1, labels[..., None]).squeeze(-1), 0.0)
        if self.name == "forward_kl":
            return forward_kl(target_log_probs, draft_log_probs)
        if self.name == "reverse_kl":
            return reverse_kl(target_log_probs, draft_log_probs)
        if self.name == "jsd":
            return jsd(target_log_probs, draft_log_probs, self.beta)
        accepted = acceptance(target_log_probs, draft_log_probs) if accepted is None else accepted
        if self.name == "negative_log_acceptance":
            return -accepted.clamp(min=_least(accepted)).log()
        distance = 1.0 - accepted
        if self.name == "lk_hybrid":
            share = torch.exp(-self.eta * accepted.detach())
            return share * forward_kl(target_log_probs, draft_log_probs) + (1.0 - share) * distance
        return 2.0 * distance if self.name == "l1" else distance

    def gradient(
        self, target_log_probs: Tensor, draft_log_probs: Tensor, labels: Tensor, log_mass: Tensor | None = None
    ) -> Tensor:
        """The derivative of :meth:`value` with respect to the draft's logits, in closed form.

        Args:
            target_log_probs: [..., V], the target's log-probabilities, of a sum of 1.
            draft_log_probs: [..., V], the draft's.
            labels: int64 [...], the text's tokens; read by `cross_entropy` alone.
            log_mass: [..., 1], log of what the target gives to the V tokens, where the acceptance is that of its whole distribution.

        Returns:
            [..., V].
        """
        draft_probs = draft_log_probs.exp()
        if self.name == "cross_entropy":
            labels, known = _within(labels, draft_probs.shape[-1])
            ones = draft_probs.new_full((*labels.shape, 1), -1.0)
            return draft_probs.scatter_add(-1, labels[..., None], ones) * known[..., None]
        if self.name == "forward_kl":
            return draft_probs - target_log_probs.exp()
        if self.name in OF_ACCEPTANCE:
            whole = target_log_probs if log_mass is None else target_log_probs + log_mass
            return self._gradient_of_acceptance(target_log_probs, draft_log_probs, draft_probs, whole)
        if self.name == "reverse_kl":
            slope = draft_log_probs - target_log_probs
        else:
            mean_log_probs = _mean_log_probs(target_log_probs, draft_log_probs, self.beta)
            slope = (1.0 - self.beta) * (draft_log_probs - mean_log_probs)
        # A token that the draft never says moves nothing, whatever its slope (0 * inf).
        weighted = torch.where(draft_probs > 0, draft_probs * slope, 0.0)
        return weighted - draft_probs * weighted.sum(-1, keepdim=True)

    def _gradient_of_acceptance(
        self, target_log_probs: Tensor, draft_log_probs: Tensor, draft_probs: Tensor, whole: Tensor
    ) -> Tensor:
        """That of equations (4), (6), (7) and (8), where ``whole`` [..., V] is the target's distribution as the acceptance takes it."""
        accepted = acceptance(whole, draft_log_probs)[..., None]
        # Where both are equal, half: the derivative of a minimum, as autograd takes it.
        agreed = (
            (draft_log_probs <= whole).to(draft_probs.dtype).add_(draft_log_probs < whole).mul_(0.5).mul_(draft_probs)
        )
        of_distance = (draft_probs * agreed.sum(-1, keepdim=True)).sub_(agreed)
        if self.name == "negative_log_acceptance":
            return of_distance.div_(accepted.clamp(min=_least(accepted)))
        if self.name == "lk_hybrid":
            share = torch.exp(-self.eta * accepted)
            return of_distance.mul_(1.0 - share).add_(share * (draft_probs - target_log_probs.exp()))
        return of_distance.mul_(2.0) if self.name == "l1" else of_distance


def _least(accepted: Tensor) -> float:
    """The smallest number that a logarithm and a division can take.

    An acceptance is that small only for a draft that the target can hardly say; the gradient of its logarithm stays bounded even there.
    """
    return torch.finfo(accepted.dtype).tiny


def _within(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels that can be looked up, and bool of the same shape, which of them are unchanged."""
    return labels.clamp(max=vocab_size - 1), labels < vocab_size


def _mean_log_probs(target_log_probs: Tensor, draft_log_probs: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(target_log_probs + math.log(beta), draft_log_probs + math.log1p(-beta))
