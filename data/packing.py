"""Samples end to end in batches of a token budget: no padding, no sample split, none lost.

Owns: which samples share a batch and how they are laid out. Does not know: shuffling, ranks, training.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from draftsmith.data.shards import CachedSample
from draftsmith.models.rollout import PackedBatch


def plan_batches(lengths: Sequence[int], token_budget: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Cuts samples, in the given order, into batches of at most `token_budget` tokens.

    A sample longer than the budget is a batch of its own. Each index of `order` (default: all, as they come) is in
    exactly one batch, and the order is kept. Example: lengths `[3, 4, 9, 2]` with a budget of 8 give
    `[[0, 1], [2], [3]]`.

    Raises ValueError for a budget below 1.
    """
    if token_budget < 1:
        raise ValueError(f"a batch of {token_budget} tokens holds nothing; set at least 1")
    batches: list[list[int]] = []
    room = 0
    for index in range(len(lengths)) if order is None else order:
        if not batches or lengths[index] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def pack(samples: Sequence[CachedSample], layers: Sequence[str] | None = None) -> PackedBatch:
    """Lays samples end to end: T is the sum of their lengths.

    `document_ids` counts the samples from 0, `positions` starts at 0 in each. Greedy continuations are kept when every
    sample has them. `layers` are those to lay out, all by default; others are not even read from the disk.

    Raises ValueError for no samples, or samples with different layers.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    known = list(samples[0].hidden)
    wanted = known if layers is None else layers
    for sample in samples:
        if list(sample.hidden) != known:
            raise ValueError(f"sample {sample.id} has the layers {list(sample.hidden)}, the first one has {known}")
    lengths = [sample.input_ids.shape[0] for sample in samples]
    greedy = [sample.greedy_ids for sample in samples if sample.greedy_ids is not None]
    return PackedBatch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        loss_mask=torch.cat([sample.loss_mask for sample in samples]),
        document_ids=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        hidden={layer: torch.cat([sample.hidden[layer] for sample in samples]) for layer in wanted},
        greedy_ids=torch.cat(greedy) if len(greedy) == len(samples) else None,
    )


def packed_batches(samples: Sequence[CachedSample], lengths: Sequence[int], token_budget: int) -> Iterator[PackedBatch]:
    """Packs a whole data set, in order; `lengths` are the samples' lengths."""
    for batch in plan_batches(lengths, token_budget):
        yield pack([samples[index] for index in batch])
