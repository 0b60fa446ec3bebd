"""What a target thinks of a token that it reads: six numbers of the forward pass that reads it.

Owns the numbers and their order. A judge reads them behind the state of the token: the state tells what was written, these tell how well
it fits what the target would have written. Knows no judge and no decoder.

Shape legend: N tokens, T positions, D the target's hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.target.ends import TargetEnds

NUM_NUMBERS = 6
DIFFERENCE = 2
"""The place of the number that is below 0 where the target would have chosen another token."""
_FLOOR = -30.0
"""Nats. A request can rule tokens out, and minus infinity is no feature."""
_LOGITS_AT_A_TIME = 2**24


def confidence(log_probs: Tensor) -> Tensor:
    """How sure a target is at a place.

    Args:
        log_probs: float [..., V].

    Returns:
        float [..., 2]: the greatest log-probability, and the entropy in nats.
    """
    return torch.stack([log_probs.amax(-1), torch.special.entr(log_probs.exp()).sum(-1)], dim=-1)


def opinion(own: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The six numbers of tokens.

    They are, in this order: the log-probability of the token, the greatest log-probability at its place, the difference of the two, the
    entropy there; the entropy and the greatest log-probability at the place behind the token. All are in nats, and no log-probability is
    below -30.

    Args:
        own: float [...], the log-probability of each token.
        before: float [..., 2], the :func:`confidence` at the place of each token.
        after: float [..., 2], the same behind it.

    Returns:
        float32 [..., 6].

    Example:
        of two tokens with the probabilities 3/4 and 1/4 the second was written, and both have 1/2 behind it: log 1/4, log 3/4, log 1/3,
        0.562, 0.693, log 1/2.
    """
    own, best, best_after = (values.clamp(min=_FLOOR) for values in (own, before[..., 0], after[..., 0]))
    return torch.stack([own, best, own - best, before[..., 1], after[..., 1], best_after], dim=-1).float()


@torch.no_grad()
def opinion_of_text(ends: TargetEnds, states_TD: Tensor, ids_T: Tensor, positions_N: Tensor) -> Tensor:
    """The six numbers of tokens of a text whose states are known, a few tokens at a time.

    Args:
        ends: the target's; where they lie is where this is computed.
        states_TD: the last block's outputs before the final norm, of any float dtype.
        ids_T: int64, the tokens of the text.
        positions_N: int64, rising; those of the tokens that are asked for.

    Returns:
        float32 [N, 6], on the CPU.

    Raises:
        ValueError: the first token is asked for, which the target has read nothing before.
    """
    if bool((positions_N < 1).any()):
        raise ValueError("the target has no opinion of a text's first token; ask for tokens from position 1 on")
    needed = torch.cat([positions_N - 1, positions_N]).unique()
    following = ids_T[(needed + 1).clamp(max=len(ids_T) - 1)]
    rows = max(1, _LOGITS_AT_A_TIME // ends.vocab_size)
    parts = []
    for at, next_ids in zip(needed.split(rows), following.split(rows), strict=True):
        log_probs = ends.logits(ends.final_norm(states_TD[at].to(ends.device))).float().log_softmax(-1)
        own = log_probs.gather(-1, next_ids.to(ends.device)[:, None])
        parts.append(torch.cat([own, confidence(log_probs)], dim=-1).cpu())
    read = torch.cat(parts) if parts else torch.zeros(0, 3)
    before, after = (read[torch.searchsorted(needed, at)] for at in (positions_N - 1, positions_N))
    return opinion(before[:, 0], before[:, 1:], after[:, 1:])
