"""What training feeds a drafter: packed samples, and the rollouts that it simulates from every anchor.

Owns: which token is fed and which is predicted at each draft step. Knows no drafter, no loss and no cache format.

Shape legend: T packed tokens, A anchors, K draft steps, D hidden, G greedy tokens a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Several training samples end to end; padding, where there is any, is a document of its own with no supervised token.

    Attributes:
        input_ids: int64 [T].
        loss_mask: bool [T], True at tokens that the target (or the data set's assistant) wrote.
        document_ids: int64 [T], which sample a token belongs to.
        positions: int64 [T], position inside the sample.
        hidden: layer name -> [T, D], the target's states.
        greedy_ids: int64 [T, G] or None; ``[t, j]`` is the target's j-th greedy token after the prefix that ends at t.
    """

    input_ids: Tensor
    loss_mask: Tensor
    document_ids: Tensor
    positions: Tensor
    hidden: dict[str, Tensor]
    greedy_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move the batch to another device.

        Args:
            device: where to.

        Returns:
            The same batch there.
        """
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            document_ids=self.document_ids.to(device),
            positions=self.positions.to(device),
            hidden={name: states.to(device) for name, states in self.hidden.items()},
            greedy_ids=None if self.greedy_ids is None else self.greedy_ids.to(device),
        )


@dataclass(frozen=True)
class Rollout:
    """What a drafter simulates in training, from each anchor position t: exactly what decoding does from that state.

    At an anchor the drafter holds the target's state of token x_t and the root x_{t+1}. At step k it is fed ``tokens[:, k]`` and
    must predict ``targets[:, k]``.

    Attributes:
        anchors: int64 [A], positions t in the packed batch.
        tokens: int64 [A, K], target token ids fed at each step; column 0 is the root.
        targets: int64 [A, K], target token ids to predict.
        valid: bool [A, K], False where the prediction is not supervised (another sample, a prompt token, past the end).
        on_text: True where every step is fed the batch's own text, so that step k is at position t + k of it.
        weights: float [A, K], how much each prediction counts; None counts all valid ones alike.
    """

    anchors: Tensor
    tokens: Tensor
    targets: Tensor
    valid: Tensor
    on_text: bool = False
    weights: Tensor | None = None


def data_rollout(batch: PackedBatch, num_steps: int) -> Rollout:
    """Roll out along the batch's own text: step k is fed x_{t+1+k} and predicts x_{t+2+k}.

    An anchor is any t whose root x_{t+1} is supervised, since decoding always starts from an emitted root. A step is valid while
    every token from the root to the predicted one is supervised and of the same sample.

    Args:
        batch: packed samples.
        num_steps: K.

    Returns:
        The rollout, on the text.

    Example:
        ids ``[p, a, b, c]`` with mask ``[0, 1, 1, 1]`` and two steps give the anchors 0, 1, 2 with tokens
        ``[[a, b], [b, c], [c, -]]``, targets ``[[b, c], [c, -], [-, -]]``; ``-`` is not valid.
    """
    total = batch.input_ids.shape[0]
    same_document = batch.document_ids[1:] == batch.document_ids[:-1]
    anchors = torch.nonzero(batch.loss_mask[1:] & same_document).squeeze(1)
    predicted = anchors[:, None] + 2 + torch.arange(num_steps, device=anchors.device)
    inside = predicted < total
    predicted = predicted.clamp(max=max(total - 1, 0))
    supervised = (
        inside & batch.loss_mask[predicted] & (batch.document_ids[predicted] == batch.document_ids[anchors, None])
    )
    return Rollout(
        anchors=anchors,
        tokens=batch.input_ids[(predicted - 1).clamp(min=0)],
        targets=batch.input_ids[predicted],
        valid=supervised.int().cumprod(1).bool(),
        on_text=True,
    )


def fewer_anchors(rollout: Rollout, most: int, at_random: bool) -> Rollout:
    """Keep some anchors only, in their order, all of which have something to predict.

    Example: of the anchors 3, 4, 5, 6, two that are not drawn at random are 3 and 5.

    Args:
        rollout: of any kind.
        most: how many anchors to keep.
        at_random: draw them; otherwise they are spread evenly.

    Returns:
        The same of at most ``most`` anchors.
    """
    useful = torch.nonzero(rollout.valid[:, 0]).squeeze(1)
    if len(useful) > most and at_random:
        useful = useful[torch.randperm(len(useful), device=useful.device)[:most]].sort().values
    elif len(useful) > most:
        useful = useful[torch.arange(most, device=useful.device) * len(useful) // most]
    return replace(
        rollout,
        anchors=rollout.anchors[useful],
        tokens=rollout.tokens[useful],
        targets=rollout.targets[useful],
        valid=rollout.valid[useful],
        weights=None if rollout.weights is None else rollout.weights[useful],
    )


LEAST_SHARE = 0.2
"""Of the anchors that reach a step, at least this share keeps it (arXiv:2602.01469)."""


def fewer_depths(rollout: Rollout, share: float) -> Rollout:
    """Draw which anchors keep which of their deeper steps; an anchor that loses one loses all behind it (COD, arXiv:2602.01469).

    Step k keeps ``max(share ** k, 0.2)`` of the anchors that reach it, as far as they have kept the step before.

    Args:
        rollout: of any kind.
        share: above 0 and at most 1.

    Returns:
        The same, with fewer valid steps.
    """
    valid = [rollout.valid[:, 0]]
    for step in range(1, rollout.valid.shape[1]):
        reach = rollout.valid[:, step]
        wanted = (max(share**step, LEAST_SHARE) * reach.sum()).ceil()
        draws = torch.rand(len(reach), device=reach.device).masked_fill(~(reach & valid[-1]), torch.inf)
        valid.append((draws.argsort().argsort() < wanted) & (draws < torch.inf))
    return replace(rollout, valid=torch.stack(valid, dim=1))


def prompt_weighted(roll_out: Callable[[PackedBatch], Rollout], batch: PackedBatch, prompt_weight: float) -> Rollout:
    """Roll out over prompts and replies, where a prediction that the replies alone would not teach counts with its own weight.

    A prediction counts in full where every token from the root to the predicted one is supervised, as in :func:`data_rollout`.
    The others begin in a prompt or cross its end. Padding has no supervised token in its document, and stays without predictions.

    Args:
        roll_out: :func:`data_rollout` or :func:`local_rollout`, with all but the batch chosen.
        batch: packed samples.
        prompt_weight: of a prediction of a prompt, above 0.

    Returns:
        The rollout over all positions, with weights.

    Example:
        ids ``[p, q, a, b]`` with mask ``[0, 0, 1, 1]``, one step and weight 0.5 give the anchors 0, 1, 2 with targets
        ``[[a], [b], [-]]`` and weights ``[[0.5], [1], [-]]``; ``-`` is not valid.
    """
    in_replies = roll_out(batch)
    counts = torch.zeros(int(batch.document_ids.max()) + 1, dtype=torch.int64, device=batch.document_ids.device)
    counts.index_add_(0, batch.document_ids, batch.loss_mask.long())
    everywhere = roll_out(replace(batch, loss_mask=(counts > 0)[batch.document_ids]))
    weights = torch.full(everywhere.targets.shape, prompt_weight, device=everywhere.targets.device)
    places = torch.searchsorted(everywhere.anchors, in_replies.anchors)
    weights[places] = torch.where(in_replies.valid, 1.0, weights[places])
    return replace(everywhere, weights=weights)


def local_rollout(batch: PackedBatch, num_steps: int, eos_token_ids: tuple[int, ...] = ()) -> Rollout:
    """Roll out along the target's own greedy continuation from every position (local distillation, arXiv:2403.09919, section 4.2).

    Anchors are those of :func:`data_rollout`; step k is fed ``greedy_ids[t, k]`` and predicts ``greedy_ids[t, k + 1]``. Steps that
    are fed one of ``eos_token_ids``, and those behind them, are not valid: decoding has ended there.

    Args:
        batch: packed samples with ``greedy_ids``.
        num_steps: K.
        eos_token_ids: end tokens of the target.

    Returns:
        The rollout, away from the text.

    Raises:
        ValueError: the batch holds no greedy continuations, or fewer than ``num_steps + 1`` a position.
    """
    horizon = 0 if batch.greedy_ids is None else batch.greedy_ids.shape[1]
    if batch.greedy_ids is None or horizon < num_steps + 1:
        raise ValueError(
            f"local distillation over {num_steps} steps needs {num_steps + 1} greedy tokens a position, the cache holds {horizon}; "
            f"extract it with --local-horizon {num_steps + 1}"
        )
    anchors = data_rollout(batch, 1).anchors
    greedy = batch.greedy_ids[anchors]
    tokens = greedy[:, :num_steps]
    ended = torch.isin(tokens, torch.tensor(eos_token_ids, dtype=tokens.dtype, device=tokens.device))
    return Rollout(
        anchors=anchors,
        tokens=tokens,
        targets=greedy[:, 1 : num_steps + 1],
        valid=~ended.int().cumsum(1).bool(),
    )
