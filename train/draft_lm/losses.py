"""How far a draft LM's distribution is from the target's: divergences over tokens, and their chunked sum over a batch.

Owns: the divergences, their gradients, and the sum over rows that never holds more than a chunk of either model's logits, forward or
backward. Does not know: models, batches, where the text comes from.

With target_probs and draft_probs at one position, all sums over tokens (DistillSpec, arXiv:2310.08461, compares these four):

    (1) forward KL        sum target_probs * log(target_probs / draft_probs)
    (2) reverse KL        sum draft_probs * log(draft_probs / target_probs)
    (3) JSD(beta)         beta * KL(target_probs || mean) + (1 - beta) * KL(draft_probs || mean),
                          mean = beta * target_probs + (1 - beta) * draft_probs       (GKD, arXiv:2306.13649, section 2)
    (4) total variation   1/2 * sum |target_probs - draft_probs|
    (5) acceptance        sum min(target_probs, draft_probs) = 1 - (4)                 (arXiv:2211.17192, corollary 3.6)

(5) is the chance that rejection sampling accepts a token drawn from draft_probs. Where g is the derivative of a divergence by
draft_probs, that by the draft's logits is draft_probs * (g - sum draft_probs * g).

Vocabularies may differ in padded rows. A draft LM's distribution is the softmax over the tokens that both models have, as
`LMDrafter` drafts. The divergences take the target's distribution over the same tokens. The acceptance takes the target's whole
distribution: probability of tokens that the draft LM does not have counts as rejected.

Shape legend: R rows (positions whose next token is learned), C rows of one chunk, D and E hidden sizes of draft and target, V tokens that
both models have, Vd and Vt their logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from draftsmith.train.drafter.chunk_rows import default_chunk_rows

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "total_variation", "cross_entropy"]
DIVERGENCES: tuple[DivergenceName, ...] = ("forward_kl", "reverse_kl", "jsd", "total_variation", "cross_entropy")
Head = Callable[[Tensor], Tensor]


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
        name: `forward_kl`, `reverse_kl`, `jsd` or `total_variation`: equations (1) to (4); `cross_entropy`: no distillation, the
            text's own next token.
        beta: of `jsd`.

    Raises:
        ValueError: an unknown name, or a beta outside 0 to 1.
    """

    name: DivergenceName
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(f"divergence {self.name!r} is not known; use one of {', '.join(DIVERGENCES)}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta is {self.beta}; it must lie between 0 and 1, both left out: those are forward_kl and reverse_kl"
            )

    def value(self, target_log_probs: Tensor, draft_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The divergence of each row, differentiable: the plain twin of :meth:`gradient`.

        Cross-entropy learns nothing where the text's token is not among the V.

        Args:
            target_log_probs: [C, V], the target's log-probabilities.
            draft_log_probs: [C, V], the draft's.
            labels: int64 [C], the text's tokens.

        Returns:
            [C], nats.
        """
        if self.name == "cross_entropy":
            labels, known = _within(labels, draft_log_probs.shape[-1])
            return torch.where(known, -draft_log_probs.gather(-1, labels[:, None]).squeeze(-1), 0.0)
        if self.name == "jsd":
            return jsd(target_log_probs, draft_log_probs, self.beta)
        formulas = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation}
        return formulas[self.name](target_log_probs, draft_log_probs)

    def gradient(self, target_log_probs: Tensor, draft_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The derivative of :meth:`value` with respect to the draft's logits, in closed form.

        Args:
            target_log_probs: [C, V], the target's log-probabilities.
            draft_log_probs: [C, V], the draft's.
            labels: int64 [C], the text's tokens.

        Returns:
            [C, V].
        """
        draft_probs = draft_log_probs.exp()
        if self.name == "cross_entropy":
            labels, known = _within(labels, draft_probs.shape[-1])
            return (
                draft_probs.scatter_add(-1, labels[:, None], draft_probs.new_full((len(labels), 1), -1.0))
                * known[:, None]
            )
        if self.name == "forward_kl":
            return draft_probs - target_log_probs.exp()
        if self.name == "reverse_kl":
            slope = draft_log_probs - target_log_probs
        elif self.name == "jsd":
            mean_log_probs = _mean_log_probs(target_log_probs, draft_log_probs, self.beta)
            slope = (1.0 - self.beta) * (draft_log_probs - mean_log_probs)
        else:
            slope = 0.5 * torch.sign(draft_probs - target_log_probs.exp())
        # A token that the draft never says moves nothing, whatever its slope (0 * inf).
        weighted = torch.where(draft_probs > 0, draft_probs * slope, 0.0)
        return weighted - draft_probs * weighted.sum(-1, keepdim=True)


def shared_log_probs(draft_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities over the V tokens that both models have.

    Example: draft logits (0, 0, 9) and target logits (0, 0) give log(1/2) four times and a mass of log(1).

    Args:
        draft_logits: [C, Vd].
        target_logits: [C, Vt].

    Returns:
        the draft's [C, V] and the target's [C, V], in float32 or better; and the log of the target's mass on those tokens, [C, 1].
    """
    num_shared = min(draft_logits.shape[-1], target_logits.shape[-1])
    # float32 whatever the matrix product's dtype: bf16 has 8 bits and a vocabulary has 2^17.
    dtype = torch.promote_types(torch.float32, torch.promote_types(draft_logits.dtype, target_logits.dtype))
    draft = torch.log_softmax(draft_logits[..., :num_shared], dim=-1, dtype=dtype)
    target = torch.log_softmax(target_logits[..., :num_shared], dim=-1, dtype=dtype)
    if target_logits.shape[-1] == num_shared:
        return draft, target, torch.zeros_like(target[..., :1])
    whole = target_logits.to(dtype)
    mass = whole[..., :num_shared].logsumexp(-1, keepdim=True) - whole.logsumexp(-1, keepdim=True)
    return draft, target, mass


@dataclass(frozen=True)
class DivergenceSums:
    """Sums over the rows. Divide by the rows of all ranks to get means.

    Attributes:
        total: [] differentiable, row_weight times the summed divergence.
        loss: [] the summed divergence, detached.
        acceptance: [] summed equation (5); 0 without a target.
        agreed: [] rows whose likeliest token is the target's too; 0 without a target.
    """

    total: Tensor
    loss: Tensor
    acceptance: Tensor
    agreed: Tensor


def divergence_sums(
    divergence: DivergenceLoss,
    draft_states: Tensor,
    draft_head: Head,
    head_parameters: Sequence[Tensor],
    target_states: Tensor | None,
    target_head: Head | None,
    labels: Tensor,
    row_weight: Tensor | float = 1.0,
    chunk_rows: int | None = None,
) -> DivergenceSums:
    """The divergence of each row, summed: gradients are made beside the loss, chunk by chunk, and only scaled in backward.

    Args:
        divergence: which.
        draft_states: [R, D], the draft LM's normed states; the gradient reaches them.
        draft_head: states [C, D] -> logits [C, Vd].
        head_parameters: what of the head is trained; the gradient reaches them, too.
        target_states: [R, E], the target's normed states at the same positions; None only with `cross_entropy`.
        target_head: states [C, E] -> logits [C, Vt]; None only with `cross_entropy`.
        labels: int64 [R], the text's next tokens.
        row_weight: of every row in `total`.
        chunk_rows: rows whose logits are in memory at a time; None chooses.

    Raises:
        ValueError: shapes that do not fit, or a divergence without a target.
    """
    _check_shapes(divergence, draft_states, target_states, target_head, labels)
    job = _Job(divergence, draft_head, target_states, target_head, labels, chunk_rows, torch.is_grad_enabled())
    weight = torch.as_tensor(row_weight, dtype=torch.float32, device=draft_states.device)
    trained = [parameter for parameter in head_parameters if parameter.requires_grad]
    total, sums = _ChunkedDivergence.apply(job, weight, draft_states, *trained)
    return DivergenceSums(total, *sums.unbind())


@dataclass(frozen=True)
class _Job:
    divergence: DivergenceLoss
    draft_head: Head
    target_states: Tensor | None
    target_head: Head | None
    labels: Tensor
    chunk_rows: int | None
    grad_enabled: bool

    def chunks(self, states: Tensor) -> Iterator[slice]:
        """Slices of the rows, each of so many that its logits fit."""
        if not len(states):
            return
        count = self.chunk_rows or default_chunk_rows(self.draft_head(states[:1].detach()).shape[-1])
        for start in range(0, len(states), count):
            yield slice(start, min(start + count, len(states)))

    def target_logits(self, rows: slice) -> Tensor | None:
        if self.target_states is None or self.target_head is None:
            return None
        return self.target_head(self.target_states[rows])


class _ChunkedDivergence(torch.autograd.Function):
    """One chunk of rows at a time: both heads, the divergence, its gradient down to the states and the head's parameters."""

    @staticmethod
    def forward(ctx: Any, job: _Job, weight: Tensor, states: Tensor, *parameters: Tensor) -> tuple:
        sums = torch.zeros(3, dtype=torch.promote_types(torch.float32, states.dtype), device=states.device)
        grad_states = torch.zeros_like(states) if job.grad_enabled and states.requires_grad else None
        # In float32, since many chunks are added up.
        grads = [
            torch.zeros_like(parameter, dtype=torch.promote_types(torch.float32, parameter.dtype))
            for parameter in parameters
            if job.grad_enabled
        ]
        for rows in job.chunks(states):
            _one_chunk(job, rows, states, parameters, sums, grad_states, grads)
        ctx.save_for_backward(weight, *([] if grad_states is None else [grad_states]), *grads)
        ctx.has_states, ctx.dtypes = grad_states is not None, [parameter.dtype for parameter in parameters]
        ctx.mark_non_differentiable(sums)
        return weight * sums[0], sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_sums: Tensor) -> tuple:
        weight, *saved = ctx.saved_tensors
        scale = weight * grad_total
        grad_states = (saved[0] * scale).to(saved[0].dtype) if ctx.has_states else None
        grads = saved[1:] if ctx.has_states else saved
        scaled = [(grad * scale).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, None, grad_states, *scaled


def _one_chunk(
    job: _Job,
    rows: slice,
    states: Tensor,
    parameters: Sequence[Tensor],
    sums: Tensor,
    grad_states: Tensor | None,
    grads: list[Tensor],
) -> None:
    """Adds one chunk to the sums [3] (loss, acceptance, agreed) and writes or adds its gradients."""
    chunk = states[rows].detach().requires_grad_(grad_states is not None)
    with torch.set_grad_enabled(grad_states is not None or bool(grads)):
        draft_logits = job.draft_head(chunk)
    labels, target_logits = job.labels[rows], job.target_logits(rows)
    given = draft_logits.detach()
    # Without a target (cross-entropy alone) the draft is compared with itself, and what that says is not kept.
    draft, target, mass = shared_log_probs(given, given if target_logits is None else target_logits)
    sums[0] += job.divergence.value(target, draft, labels).sum()
    if target_logits is not None:
        sums[1] += acceptance(target + mass, draft).sum()
        sums[2] += (target.argmax(-1) == draft.argmax(-1)).sum()
    wanted = [*([] if grad_states is None else [chunk]), *(parameters if grads else [])]
    if not wanted:
        return
    grad_logits = torch.zeros_like(given)
    grad_logits[:, : draft.shape[-1]] = job.divergence.gradient(target, draft, labels).to(given.dtype)
    chunk_grads = list(torch.autograd.grad(draft_logits, wanted, grad_logits))
    if grad_states is not None:
        grad_states[rows] = chunk_grads.pop(0)
    for total, grad in zip(grads, chunk_grads, strict=True):
        total += grad


def _within(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels [C] that can be looked up, and bool [C], which of them are unchanged."""
    return labels.clamp(max=vocab_size - 1), labels < vocab_size


def _mean_log_probs(target_log_probs: Tensor, draft_log_probs: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(target_log_probs + math.log(beta), draft_log_probs + math.log1p(-beta))


def _check_shapes(
    divergence: DivergenceLoss,
    draft_states: Tensor,
    target_states: Tensor | None,
    target_head: Head | None,
    labels: Tensor,
) -> None:
    if target_states is None or target_head is None:
        if divergence.name != "cross_entropy":
            raise ValueError(f"{divergence.name} is a divergence from a target and none was given; give its states")
    elif len(target_states) != len(draft_states):
        raise ValueError(
            f"{len(target_states)} target states for {len(draft_states)} draft states; one a row is needed"
        )
    if len(labels) != len(draft_states):
        raise ValueError(f"{len(labels)} labels for {len(draft_states)} draft states; one a row is needed")
