"""Samples end to end in batches of a token budget: no sample split, none lost, and padding only where it is asked for.

Owns: which samples share a batch and how they are laid out. Does not know: shuffling, ranks, training.

Shape legend: T tokens of a batch, D hidden, G greedy tokens a position.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from draftsmith.data.shards.eight_bit import EightBitStates
from draftsmith.data.shards.shards import CachedSample
from draftsmith.models.drafters.rollout import PackedBatch


def plan_batches(lengths: Sequence[int], token_budget: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Cut samples, in the given order, into batches of at most `token_budget` tokens.

    A sample longer than the budget is a batch of its own. Each index is in exactly one batch, and the order is kept.
    Example: lengths `[3, 4, 9, 2]` with a budget of 8 give `[[0, 1], [2], [3]]`.

    Args:
        lengths: of the samples, in tokens.
        token_budget: most tokens of a batch.
        order: indices of samples; None: all, as they come.

    Returns:
        Indices of samples.

    Raises:
        ValueError: a budget below 1.
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


def pack(
    samples: Sequence[CachedSample], layers: Sequence[str] | None = None, pad_to: int | None = None
) -> PackedBatch:
    """Lay samples end to end: T is the sum of their lengths.

    `document_ids` counts the samples from 0, `positions` starts at 0 in each. Greedy continuations are kept when every
    sample has them.

    With `pad_to`, padding follows each sample, up to the next multiple of `pad_to` that holds the longest sample. T is then
    that length times the samples, one of few numbers. Padding is a document of its own behind each sample; their numbers follow the
    last sample's. Its tokens are 0 and not trained on, and its states are zero.
    Example: samples of 3 and 2 tokens padded to 4 give the documents (0, 0, 0, 2, 1, 1, 3, 3).

    Args:
        samples: at least one.
        layers: those to lay out; None: all. Others are not even read from the disk.
        pad_to: at least 1; None pads nothing.

    Returns:
        The batch.

    Raises:
        ValueError: no samples, samples with different layers, or a `pad_to` below 1.
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
    batch = PackedBatch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        loss_mask=torch.cat([sample.loss_mask for sample in samples]),
        document_ids=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        hidden=_joined([sample.hidden for sample in samples], wanted),
        greedy_ids=torch.cat(greedy) if len(greedy) == len(samples) else None,
    )
    return batch if pad_to is None else _padded(batch, lengths, pad_to)


def _joined(states: Sequence[Mapping[str, torch.Tensor]], layers: Sequence[str]) -> dict[str, torch.Tensor]:
    eight_bit = [own for own in states if isinstance(own, EightBitStates)]
    if len(eight_bit) == len(states):
        whole = EightBitStates.joined(eight_bit)
        return {layer: whole[layer] for layer in layers}
    return {layer: torch.cat([own[layer] for own in states]) for layer in layers}


def _padded(batch: PackedBatch, lengths: Sequence[int], pad_to: int) -> PackedBatch:
    if pad_to < 1:
        raise ValueError(f"pad_to is {pad_to}; it must be at least 1")
    longest = -(-max(lengths) // pad_to) * pad_to
    num_samples = len(lengths)
    places = batch.document_ids * longest + batch.positions
    steps = torch.arange(longest).repeat(num_samples)
    own = torch.tensor(lengths).repeat_interleave(longest)
    rows = torch.arange(num_samples).repeat_interleave(longest)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_samples * longest, *values.shape[1:]).index_copy_(0, places, values)

    return replace(
        batch,
        input_ids=spread(batch.input_ids),
        loss_mask=spread(batch.loss_mask),
        document_ids=torch.where(steps < own, rows, rows + num_samples),
        positions=torch.where(steps < own, steps, steps - own),
        hidden={layer: spread(states) for layer, states in batch.hidden.items()},
        greedy_ids=None if batch.greedy_ids is None else spread(batch.greedy_ids),
    )


def packed_batches(samples: Sequence[CachedSample], lengths: Sequence[int], token_budget: int) -> Iterator[PackedBatch]:
    """Pack a whole data set, in order.

    Args:
        samples: all of them.
        lengths: the samples' lengths, in tokens.
        token_budget: most tokens of a batch.

    Yields:
        Batches.
    """
    for batch in plan_batches(lengths, token_budget):
        yield pack([samples[index] for index in batch])
