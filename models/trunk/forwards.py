"""How text is fed to a model: prompts in chunks, packed trees, positions within its context, a whole text once more.

Owns what the engine, a draft LM and the proof at loading do alike when they read. Knows nothing of how trees are made and judged.

Shape legend: B batch rows, T prompt tokens, N new tokens (the nodes of a tree), S cache slots, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.row_caches import RowCaches
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.tree.mask import slot_mask, slot_positions
from draftsmith.models.tree.tree import DraftTree
from draftsmith.models.trunk.reader import Reader, within_context
from draftsmith.models.trunk.recurrent import read_chain, read_row_chunks
from draftsmith.models.trunk.riders import RIDERS, Carried, Riders
from draftsmith.models.trunk.trunk import TargetOutput

CHUNK = 1024
"""Prompt tokens a forward, which bounds the memory of long prompts."""


def read_prompts(
    target: Reader,
    cache: SlotCache | RowCaches,
    tokens_BT: Tensor,
    lengths_B: Tensor,
    layers: tuple[str, ...] = (),
    chunk: int = CHUNK,
    slot_step: int = 1,
) -> dict[str, Tensor]:
    """Run prompts through a model, in chunks.

    Args:
        target, cache, tokens_BT, lengths_B, layers, chunk, slot_step: as :func:`read_chunks`.

    Returns:
        The states of the layers by name, [B, T, D] each.
    """
    return joined(list(read_chunks(target, cache, tokens_BT, lengths_B, layers, chunk, slot_step)))


def joined(chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The states of whole prompts, [B, T, D] of each layer, from those of their chunks, which are empty afterwards.

    A layer's chunks go as soon as they are joined, so that no more than one layer of a long prompt is in memory twice.
    """
    return {name: torch.cat([states.pop(name) for states in chunks], dim=1) for name in tuple(chunks[0])}


def read_chunks(
    target: Reader,
    cache: SlotCache | RowCaches,
    tokens_BT: Tensor,
    lengths_B: Tensor,
    layers: tuple[str, ...] = (),
    chunk: int = CHUNK,
    slot_step: int = 1,
    riders: Riders | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Run prompts through a model, a chunk each time that the next states are asked for.

    Args:
        target: the model.
        cache: empty; receives keys and values at slots 0 to T - 1. Of a model that keeps a recurrent state, the caches of its rows.
        tokens_BT: int64, padded on the right, where what is written is overwritten by what comes.
        lengths_B: int64, how long each row's text is, by which rotary factors that change with length are chosen: mostly the prompt.
        layers: names of layers.
        chunk: tokens a forward.
        slot_step: visible slots are a multiple of it, up to the cache's capacity.
        riders: ride behind the last token of each prompt; the cache has slots for them behind the longest.

    Yields:
        The states of the layers at a chunk's tokens by name, [B, N, D] each; with riders also theirs, [B, 1, K D] by the name ``RIDERS``,
        which are those of the prompt's end where the chunk holds it.
    """
    if isinstance(cache, RowCaches):
        yield from read_row_chunks(target, cache, tokens_BT, lengths_B, layers, chunk)
        return
    B, T = tokens_BT.shape
    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        carriers_B1 = (lengths_B[:, None] - 1 - begin).clamp(0, end - begin - 1)
        carried = None if riders is None else Carried(riders, carriers_B1, end - begin)
        window = _slots(end + _num_rows(carried), slot_step, cache.capacity)
        positions_BN = torch.arange(begin, end, device=tokens_BT.device).expand(B, -1)
        key_positions_BS = torch.arange(window, device=tokens_BT.device).expand(B, -1)
        slots_BN = torch.arange(begin, end + _num_rows(carried), device=tokens_BT.device).expand(B, -1)
        cache.aim(slots_BN, window, first=begin)
        mask_B1NS = key_positions_BS[:, None, None, :] <= positions_BN[:, None, :, None]
        seen = _seen(target, carried, positions_BN, mask_B1NS, key_positions_BS, torch.full_like(lengths_B, end))
        output = target(
            tokens_BT[:, begin:end],
            cache=cache,
            **seen,
            layers=layers,
            text_lengths=torch.maximum(lengths_B[:, None], positions_BN + 1),
        )
        yield {name: output.feature(name) for name in (*layers, *([] if riders is None else [RIDERS]))}


def read_tree(
    target: Reader,
    cache: SlotCache | RowCaches,
    tree: DraftTree,
    ancestors_BNN: Tensor,
    lengths_B: Tensor,
    host_lengths: list[int],
    layers: tuple[str, ...] = (),
    slot_step: int = 1,
    fixed_shapes: bool = False,
    riders: Riders | None = None,
) -> TargetOutput:
    """Run one forward over a packed tree, written behind each row's cached tokens.

    Args:
        target: the model.
        cache: holds ``lengths_B`` tokens of each row. The caches of a model that keeps a recurrent state take chains only.
        tree: its root is the first token that is not cached.
        ancestors_BNN: bool, ``tree.ancestors()``.
        lengths_B: int64, cached tokens of each row.
        host_lengths: the same numbers on the host.
        layers, slot_step: as in :func:`read_prompts`.
        fixed_shapes: whether every forward has the shapes of the others: all slots are then visible to it, whatever the lengths.
        riders: ride behind every node; the cache has slots for them behind those of the nodes.

    Returns:
        The states of all N nodes, and of the riders where there are any.
    """
    if isinstance(cache, RowCaches):
        return read_chain(target, cache, tree, layers)
    nodes = tree.num_nodes
    all_nodes_BN = counting(nodes, lengths_B.device).expand(len(host_lengths), -1)
    carried = None if riders is None else Carried(riders, all_nodes_BN, nodes)
    rows = nodes + _num_rows(carried)
    window = cache.capacity if fixed_shapes else _slots(max(host_lengths) + rows, slot_step, cache.capacity)
    single = len(host_lengths) == 1 and not fixed_shapes
    lengths_B1 = lengths_B[:, None]
    cache.aim(lengths_B1 + counting(rows, lengths_B.device), window, host_lengths[0] if single else None)
    mask_B1NS = key_positions_BS = None
    # One node of one row, no slot of another's and no sliding window need no mask.
    if rows > 1 or not single or window != host_lengths[0] + 1 or target.window is not None:
        mask_B1NS = slot_mask(ancestors_BNN, lengths_B, window)
        if target.window is not None:
            key_positions_BS = slot_positions(tree.depths_BN, lengths_B, window)
    ends_B = lengths_B + nodes if fixed_shapes or carried is not None else None
    return target(
        tree.tokens_BN,
        cache=cache,
        **_seen(target, carried, lengths_B1 + tree.depths_BN, mask_B1NS, key_positions_BS, ends_B),
        layers=layers,
        ends=ends_B if carried is None else None,
    )


def _num_rows(carried: Carried | None) -> int:
    return 0 if carried is None else carried.num_rows


def _seen(
    target: Reader,
    carried: Carried | None,
    positions_BN: Tensor,
    mask_B1NS: Tensor | None,
    key_positions_BS: Tensor | None,
    first_B: Tensor | None,
) -> dict[str, Any]:
    """Positions and masks of a forward, with a row for each rider; ``first_B``: the slot of each row's first rider, if there are any."""
    if carried is not None:
        assert mask_B1NS is not None
        assert first_B is not None
        positions_BN, tokens_B1NS = carried.positions(positions_BN), mask_B1NS
        mask_B1NS = carried.mask(tokens_B1NS, first_B)
        if key_positions_BS is not None:
            key_positions_BS = carried.key_positions(key_positions_BS, positions_BN, first_B)
    seen = {"positions": within_context(target, positions_BN), "mask": mask_B1NS, "key_positions": key_positions_BS}
    return seen if carried is None else {**seen, "riders": carried}


def within_factors(target: Reader, tree: DraftTree, lengths_B: Tensor) -> DraftTree:
    """Cut off the nodes that would be read with other rotary factors than their root; see :func:`read_again`.

    In most families that leaves the tree as it is.

    Args:
        target: the model.
        tree: behind ``lengths_B`` cached tokens.
        lengths_B: int64.

    Returns:
        The tree; the nodes that were cut off are invalid.
    """
    boundary = target.rereads_past
    if boundary is None:
        return tree
    room_B1 = torch.where(lengths_B < boundary, boundary - 1 - lengths_B, tree.max_depth)[:, None]
    probs_BMV = tree.draft_probs_BMV
    if probs_BMV is not None:
        # To rejection, a candidate that was drawn with no probability is padding.
        leaf_BM = tree.depths_BN[:, : probs_BMV.shape[1]] >= room_B1
        probs_BMV = probs_BMV.masked_fill(leaf_BM[..., None], 0.0)
    return replace(tree, valid_BN=tree.valid_BN & (tree.depths_BN <= room_B1), draft_probs_BMV=probs_BMV)


def read_again(
    target: Reader,
    cache: SlotCache | RowCaches,
    texts: list[list[int]],
    host_lengths: list[int],
    device: torch.device,
    chunk: int = CHUNK,
) -> None:
    """Cache the text of a row anew where it has reached the length past which the model's rotary factors are others.

    Transformers does the same. Every row passes this length exactly, since trees end there (:func:`within_factors`). In most families
    nothing is done.

    Args:
        target: the model.
        cache: holds ``host_lengths`` tokens of each row. No family with a recurrent state reads again.
        texts: all tokens of each row, of which the first ones are cached.
        host_lengths: of each row, how many.
        device: where token ids go in.
        chunk: tokens a forward.
    """
    boundary = target.rereads_past
    rows = [row for row, length in enumerate(host_lengths) if length == boundary]
    if boundary is None or not rows or isinstance(cache, RowCaches):
        return
    tokens_BT = torch.tensor([texts[row][:boundary] for row in rows], device=device)
    fresh = SlotCache(boundary, len(cache))
    read_prompts(target, fresh, tokens_BT, torch.full_like(tokens_BT[:, 0], boundary + 1), chunk=chunk)
    cache.replace(rows, fresh)


def _slots(needed: int, step: int, capacity: int) -> int:
    return min(-(-needed // step) * step, capacity)
