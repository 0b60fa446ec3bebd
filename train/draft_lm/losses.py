"""The divergence of a draft LM from its target, summed over a batch chunk by chunk.

Owns: the sum over rows that never holds more than a chunk of either model's logits, forward or backward. Does not know: the formulas
(`train/losses/divergences.py`), models, batches, where the text comes from.

Vocabularies may differ in padded rows. A draft LM's distribution is the softmax over the tokens that both models have, as
`LMDrafter` drafts. The divergences take the target's distribution over the same tokens. The acceptance takes the target's whole
distribution: probability of tokens that the draft LM does not have counts as rejected.

Shape legend: R rows (positions whose next token is learned), C rows of one chunk, D and E hidden sizes of draft and target, V tokens that
both models have, Vd and Vt their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from draftsmith.train.losses.chunk_rows import default_chunk_rows
from draftsmith.train.losses.divergences import (
    DIVERGENCES,
    DivergenceLoss,
    DivergenceName,
    acceptance,
    forward_kl,
    jsd,
    reverse_kl,
    total_variation,
)

__all__ = [
    "DIVERGENCES",
    "DivergenceLoss",
    "DivergenceName",
    "DivergenceSums",
    "acceptance",
    "divergence_sums",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "shared_log_probs",
    "total_variation",
]

Head = Callable[[Tensor], Tensor]


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
