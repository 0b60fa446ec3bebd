"""How text is fed to a model: prompts in chunks, positions within its context.

Owns what the engine and a draft LM do alike when they read. Knows nothing of trees and drafts.

Shape legend: B batch rows, T prompt tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.cache import SlotCache
from draftsmith.models.target import Target

CHUNK = 1024
"""Prompt tokens a forward, which bounds the memory of long prompts."""


def read_prompts(
    target: Target,
    cache: SlotCache,
    tokens_BT: Tensor,
    layers: tuple[str, ...] = (),
    chunk: int = CHUNK,
    slot_step: int = 1,
) -> dict[str, Tensor]:
    """Run prompts through a model; the states of the layers asked for by name, [B, T, D] each.

    Args:
        target: the model.
        cache: empty; receives keys and values at slots 0 to T - 1.
        tokens_BT: int64, padded on the right, where what is written is overwritten by what comes.
        layers: names of layers.
        chunk: tokens a forward.
        slot_step: visible slots are a multiple of it, up to the cache's capacity.
    """
    B, T = tokens_BT.shape
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        window = min(-(-end // slot_step) * slot_step, cache.capacity)
        positions = torch.arange(begin, end, device=tokens_BT.device).expand(B, -1)
        key_positions = torch.arange(window, device=tokens_BT.device).expand(B, -1)
        cache.aim(positions, window, first=begin)
        output = target(
            tokens_BT[:, begin:end],
            cache=cache,
            positions=within_context(target, positions),
            mask=key_positions[:, None, None, :] <= positions[:, None, :, None],
            key_positions=key_positions,
            layers=layers,
        )
        for name in layers:
            parts[name].append(output.feature(name))
    return {name: torch.cat(states, dim=1) for name, states in parts.items()}


def within_context(target: Target, positions: Tensor) -> Tensor:
    """Positions, those past the model's context as its last one: what is guessed there is never emitted, but must not fail."""
    return positions if target.max_positions is None else positions.clamp(max=target.max_positions - 1)
