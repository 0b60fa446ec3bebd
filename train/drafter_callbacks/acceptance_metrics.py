"""Metrics of decoded replies: tokens per step, and acceptance by depth.

Owns: the sums, their names in a run's curves. Does not know: what drafted, which prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch

from draftsmith.decode.batch import Generation

TOKENS_PER_STEP = "val/tokens_per_step"


def log_acceptance(module: pl.LightningModule, generations: Sequence[Generation], draft_length: int) -> None:
    """Logs tokens per step and acceptance by depth, pooled over what all processes decoded. Collective.

    Args:
        module: whose log.
        generations: of this process.
        draft_length: drafted tokens a cycle.
    """
    sums = acceptance_sums(generations, draft_length).to(module.device)
    if module.trainer.world_size > 1:
        torch.distributed.all_reduce(sums)
    emitted, cycles, *reached = sums.tolist()
    cycles = max(1.0, cycles)
    module.log(TOKENS_PER_STEP, emitted / cycles, prog_bar=True, batch_size=1)
    by_depth = {f"val/accept_depth{depth}": count / cycles for depth, count in enumerate(reached, 1)}
    module.log_dict(by_depth, batch_size=1)


def acceptance_sums(generations: Sequence[Generation], draft_length: int) -> torch.Tensor:
    """Sums over replies that tokens per step and acceptance come from.

    Example: one generation of 6 tokens in cycles that accepted 2 and 1 -> (5, 2, 2, 1) for a draft length of 2.

    Args:
        generations: decoded replies.
        draft_length: drafted tokens a cycle.

    Returns:
        float64 [2 + draft_length]: tokens emitted after the prefill's, cycles, cycles that accepted at least 1, 2, ... draft tokens.
    """
    sums = torch.zeros(2 + draft_length, dtype=torch.float64)
    for generation in generations:
        sums[0] += len(generation.token_ids) - 1
        sums[1] += len(generation.accepted)
        for accepted in generation.accepted:
            sums[2 : 2 + accepted] += 1
    return sums
