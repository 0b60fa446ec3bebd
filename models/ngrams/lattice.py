"""The best paths through the candidates of all slots, rescored by an n-gram table: exact, not a beam (arXiv:2404.09221, section 5.2).

A path scores the sum of its candidates' own scores and ``weight`` times the table's log-probability of each token behind the tokens before
it. The table sees N - 1 tokens, so paths that agree in their last N - 1 tokens have the same continuations. Of these, the P best are
kept and no others.

Owns the dynamic program. Knows no drafter and no tree.

Shape legend: B batch rows, L slots, C candidates of a slot, S states (the last candidates of a path), P paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.models.ngrams.table import NgramTable


@dataclass(frozen=True)
class _Step:
    """The best paths up to a slot, by the state in which they end.

    Attributes:
        scores_BSP: float32, falling; minus infinity where there are fewer paths.
        above_BSP: int64, in the flattened [S, P] of the slot before, the path that each one continues.
        tokens_S: int64 [S], the candidate of this slot, by number.
    """

    scores_BSP: Tensor
    above_BSP: Tensor
    tokens_S: Tensor


def best_paths(
    table: NgramTable, contexts_B: Tensor, ids_BLC: Tensor, scores_BLC: Tensor, weight: float, num_paths: int
) -> tuple[Tensor, Tensor]:
    """Find the best paths through a lattice.

    Args:
        table: of the candidates' vocabulary.
        contexts_B: int64, the table's context at the root.
        ids_BLC: int64, the candidates of each slot, which differ from each other.
        scores_BLC: float, their own scores, at most 0.
        weight: of the table's opinion; 0 makes it the search without a table.
        num_paths: P.

    Returns:
        int64 [B, P, L], tokens, the best path first; float32 [B, P, L], the score of each prefix. Where there are fewer paths than P, the
        scores of the rest are minus infinity.
    """
    B, L, C = ids_BLC.shape
    most_states = C ** max(table.order - 1, 1)
    contexts_BS = contexts_B[:, None]
    scores_BSP = scores_BLC.new_zeros(B, 1, 1, dtype=torch.float32)
    steps: list[_Step] = []
    for slot in range(L):
        ids_BC = ids_BLC[:, slot]
        own_BSC = scores_BLC[:, slot, None].float()
        if weight:
            own_BSC = own_BSC + weight * table.log_prob(contexts_BS[..., None], ids_BC[:, None])
        S, P = scores_BSP.shape[1:]
        next_BSC = table.follow(
            contexts_BS[..., None].expand(B, S, C).contiguous(), ids_BC[:, None].expand(B, S, C).contiguous()
        )
        all_BSCP = scores_BSP[:, :, None] + own_BSC[..., None]
        # States that differ in the oldest candidate alone become one; before N - 1 candidates there is none to drop.
        num_dropped = S * C // min(S * C, most_states)
        num_kept = S // num_dropped
        ways_BSX = all_BSCP.unflatten(1, (num_dropped, num_kept)).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
        top_BSP, way_BSP = ways_BSX.topk(min(num_paths, ways_BSX.shape[-1]), dim=-1)
        state_S = torch.arange(num_kept, device=ids_BLC.device).repeat_interleave(C)[:, None]
        above_BSP = ((way_BSP // P) * num_kept + state_S) * P + way_BSP % P
        tokens_S = torch.arange(C, device=ids_BLC.device).repeat(num_kept)
        steps.append(_Step(top_BSP, above_BSP, tokens_S))
        scores_BSP, contexts_BS = top_BSP, next_BSC[:, :num_kept].flatten(1)
    return _traced(steps, ids_BLC, num_paths)


def _traced(steps: list[_Step], ids_BLC: Tensor, num_paths: int) -> tuple[Tensor, Tensor]:
    """The best paths of the last slot, followed back to the first."""
    last = steps[-1].scores_BSP.flatten(1)
    count = min(num_paths, last.shape[1])
    at_BP = last.topk(count, dim=1).indices
    tokens, scores = [], []
    for slot in reversed(range(len(steps))):
        step = steps[slot]
        candidate_BP = step.tokens_S[at_BP // step.scores_BSP.shape[2]]
        tokens.append(ids_BLC[:, slot].gather(1, candidate_BP))
        scores.append(step.scores_BSP.flatten(1).gather(1, at_BP))
        at_BP = step.above_BSP.flatten(1).gather(1, at_BP)
    paths_BPL, scores_BPL = torch.stack(tokens[::-1], -1), torch.stack(scores[::-1], -1)
    if count == num_paths:
        return paths_BPL, scores_BPL
    more = num_paths - count
    return (
        torch.cat([paths_BPL, paths_BPL[:, :1].expand(-1, more, -1)], dim=1),
        torch.cat([scores_BPL, torch.full_like(scores_BPL[:, :1], -torch.inf).expand(-1, more, -1)], dim=1),
    )
