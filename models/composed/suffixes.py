"""Drafts without a model: what followed earlier places of a text that ended as the text ends now.

Owns the search for such places and the scores of what followed them (suffix decoding, arXiv:2411.04975, section 4), as tensor operations
over all rows, places and depths at once. There is no tree of suffixes: the text itself is compared. Knows no drafter and no vocabulary.

Shape legend: B batch rows, T text slots, W compared tokens, P places, L drafted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.slots.constants import counting

GAP = -1
"""In a stream of tokens: here one piece ends."""
_BEFORE = -2  # in a tail: before the first token


@dataclass(frozen=True)
class SuffixRule:
    """What of a text's past is proposed.

    Attributes:
        longest_match: W, tokens before a place that are compared with the end of the text.
        shortest_match: how many of them must agree.
        num_places: P, how many places count: the longest matches, and among equal ones the latest.
        tokens_per_match: drafted tokens for each token that agrees, so that short matches do not lead far.
        least_probability: continuations that followed fewer of the places, as a share, are left out.
    """

    longest_match: int = 24
    shortest_match: int = 1
    num_places: int = 16
    tokens_per_match: float = 2.0
    least_probability: float = 0.1


def continuations(
    text_BT: Tensor, lengths_B: Tensor, depth: int, rule: SuffixRule, pool_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What followed the places of each text that are most like its end.

    For each number m of tokens that agree, the places that agree in at least m make a tree of what followed, and a node's score is the
    share of these places that it followed. The m whose nodes have the largest sum of scores is taken; of equal ones, the largest m.

    Args:
        text_BT: int64, all tokens; those behind a row's length are ignored.
        lengths_B: int64, tokens of each row.
        depth: L, at most this many tokens of each continuation.
        rule: what is compared and what is kept.
        pool_T: int64, other texts that are searched as well, see :func:`behind_pool`; None for none.

    Returns:
        int64 [B, P, L], the continuations, the longest match first; float32 [B, P, L], the logarithm of each prefix's share, minus
        infinity behind the end of a continuation. Paths that share a prefix agree in its score.

    Example:
        the text 5 6 7 5 6 8 5 6 with depth 1 and matches of at least one: 7 and 8 followed "5 6" once each, so both score log(1/2).
    """
    W = rule.longest_match
    back_W = counting(W, text_BT.device)
    tail_BW = F.pad(text_BT, (W, 0), value=_BEFORE).gather(1, lengths_B[:, None] - 1 - back_W + W)
    known_BT = counting(text_BT.shape[1], text_BT.device) < lengths_B[:, None]
    stream_BT = behind_pool(torch.where(known_BT, text_BT, GAP), pool_T)
    return continuations_behind(stream_BT, tail_BW, depth, rule)


def behind_pool(stream_BT: Tensor, pool_T: Tensor | None) -> Tensor:
    """Set streams behind texts that are searched for every row alike. Among equal matches, a row's own are later and so come first.

    Args:
        stream_BT: int64, of the rows.
        pool_T: int64, texts with a :data:`GAP` behind each; None leaves the streams as they are.

    Returns:
        int64, streams of the pool's slots and then the row's own.
    """
    return stream_BT if pool_T is None else torch.cat([pool_T.expand(len(stream_BT), -1), stream_BT], dim=1)


def continuations_behind(stream_BT: Tensor, tail_BW: Tensor, depth: int, rule: SuffixRule) -> tuple[Tensor, Tensor]:
    """What followed the places of each stream that end as a tail does; see :func:`continuations`, whose tail is the end of its text.

    Args:
        stream_BT: int64, tokens with a negative number where one piece ends; no continuation crosses it.
        tail_BW: int64, the tokens to compare, the last one first; negative where there are fewer.
        depth: L.
        rule: what is compared and what is kept.

    Returns:
        As :func:`continuations`.
    """
    match_BP, place_BP = _places(stream_BT, tail_BW, rule)
    step_L = counting(depth, stream_BT.device)
    position_BPL = place_BP[..., None] + 1 + step_L
    paths_BPL = (
        F.pad(stream_BT, (0, 1), value=GAP)
        .gather(1, position_BPL.clamp(max=stream_BT.shape[1]).flatten(1))
        .view_as(position_BPL)
    )
    there_BPL = (paths_BPL >= 0).int().cumprod(-1).bool() & (match_BP >= rule.shortest_match)[..., None]
    paths_BPL = paths_BPL.clamp(min=0)
    both_BPPL = there_BPL[:, :, None] & there_BPL[:, None]
    same_BPPL = ((paths_BPL[:, :, None] == paths_BPL[:, None]) & both_BPPL).int().cumprod(-1).float()
    # Level q are the places that match at least as long as place q does; the places are sorted by that.
    member_BQP = (match_BP[:, None] >= match_BP[..., None]) & there_BPL[:, None, :, 0]
    total_BQ11 = member_BQP.sum(-1).clamp(min=1)[..., None, None]
    share_BQPL = torch.einsum("bqr,brpl->bqpl", member_BQP.float(), same_BPPL) / total_BQ11
    reach_BQ11 = (match_BP * rule.tokens_per_match).ceil().clamp(min=1.0)[..., None, None]
    kept_BQPL = there_BPL[:, None] & member_BQP[..., None] & (share_BQPL >= rule.least_probability)
    share_BQPL = share_BQPL.masked_fill(~kept_BQPL | (step_L >= reach_BQ11), 0.0)
    owner_BPL = same_BPPL.argmax(1) == counting(place_BP.shape[1], stream_BT.device)[:, None]
    level_B = (share_BQPL * owner_BPL[:, None]).sum((2, 3)).argmax(1)
    share_BPL = share_BQPL[counting(len(level_B), stream_BT.device), level_B]
    return paths_BPL, share_BPL.log()


def _places(stream_BT: Tensor, tail_BW: Tensor, rule: SuffixRule) -> tuple[Tensor, Tensor]:
    """int64 [B, P] each: how many tokens up to a place agree with the tail, longest first, and the place."""
    T, W = stream_BT.shape[1], tail_BW.shape[1]
    window_BTW = F.pad(stream_BT, (W - 1, 0), value=GAP).unfold(1, W, 1)
    # A gap in the stream equals nothing in a tail.
    wanted_B1W = torch.where(tail_BW >= 0, tail_BW, _BEFORE).flip(1)[:, None]
    # As many tokens agree as there are behind the last slot of the window that differs.
    slot_W = counting(W, stream_BT.device).int() + 1
    match_BT = W - torch.where(window_BTW != wanted_B1W, slot_W, 0).amax(-1).long()
    followed_BT = F.pad(stream_BT[:, 1:], (0, 1), value=GAP) >= 0
    match_BT = match_BT * followed_BT
    best_BP = (match_BT * T + counting(T, stream_BT.device)).topk(min(rule.num_places, T), dim=1).values
    return best_BP // T, best_BP % T
