"""Which samples make up which training batch: a pure function of lengths, shards, seed, epoch and number of ranks.

Owns: the cut of an epoch into batches. Does not know: caches, tensors of states, Lightning.

An epoch is cut twice. First into *joint batches*, what all ranks together take in one step. They depend on the tokens of a step only.
So a run can resume with another number of ranks and the same samples a step. Then the ranks share out the samples of each
joint batch, so that all have nearly as much to do. A step takes as long as its slowest rank. Batch i of a plan is for rank
i modulo world size.

Shape legend: N samples, S shards, R joint batches (steps), W ranks. Plans of ten million samples hold two arrays and no
list of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from draftsmith.train.batches.cuts import cut
from draftsmith.train.batches.epoch_order import Buckets, Windows, by_length, by_window, group_shards, mix_steps
from draftsmith.train.batches.shares import deal_by_length, deal_out

Lengths = Sequence[int] | np.ndarray
Tokens = int | Fraction


@dataclass(frozen=True, eq=False)
class EpochPlan(Sequence[list[int]]):
    """The batches of one epoch over all ranks.

    Attributes:
        order: int32 or int64 [N], sample numbers as they come.
        bounds: int64 [R, 2], where in the order each joint batch starts and stops.
        num_ranks: W.
        lengths: int64 [N], tokens of each sample.
        bucketed: whether a batch is padded to its longest sample, so that a rank had better have similar lengths.
        windows: which shards are read together, in the order in which they are needed; empty unless the order is by shard.
        window_of: int64 [R], the last window that each joint batch reaches into; empty likewise.
    """

    order: np.ndarray
    bounds: np.ndarray
    num_ranks: int
    lengths: np.ndarray
    bucketed: bool
    windows: tuple[np.ndarray, ...]
    window_of: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) * self.num_ranks

    def __getitem__(self, number: int) -> list[int]:  # type: ignore[override]
        step, rank = divmod(range(len(self))[number], self.num_ranks)
        return self.step(step)[rank]

    def step(self, number: int) -> list[list[int]]:
        """The batches of all ranks at one step. The rank that receives the longest sample rotates from step to step.

        Args:
            number: of the step, from 0.

        Returns:
            sample numbers by rank.
        """
        start, stop = self.bounds[number]
        joint = self.order[start:stop]
        deal = deal_by_length if self.bucketed else deal_out
        rank_of = (deal(self.lengths[joint], self.num_ranks) + number) % self.num_ranks
        return [joint[rank_of == rank].tolist() for rank in range(self.num_ranks)]


def count_batches(lengths: Lengths, tokens_per_batch: Tokens, world_size: int = 1) -> int:
    """Batches of one epoch over all ranks: a multiple of world_size, the same in every epoch.

    Args:
        lengths: [N], tokens of each sample.
        tokens_per_batch: of one rank, on average.
        world_size: number of ranks.

    Raises:
        ValueError: a budget below 1, or fewer samples than ranks.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; a batch needs at least 1 token")
    if len(lengths) < world_size:
        raise ValueError(
            f"{len(lengths)} samples cannot feed {world_size} processes; add samples or use fewer processes"
        )
    total = int(np.sum(lengths, dtype=np.int64))
    rounds = max(1, round(Fraction(total) / (tokens_per_batch * world_size)))
    return world_size * min(rounds, len(lengths) // world_size)


def plan_epoch(
    lengths: Lengths,
    tokens_per_batch: Tokens,
    *,
    seed: int,
    epoch: int,
    world_size: int = 1,
    shuffle: bool = True,
    windows: Windows | None = None,
    buckets: Buckets | None = None,
) -> EpochPlan:
    """Cuts the epoch's order of samples into batches of nearly equal numbers of tokens.

    Of n joint batches, the i-th ends at the sample nearest to i / n of all tokens, and `EpochPlan.step` gives each rank its part. No batch
    is filled to a limit. So the number of batches is the same in every epoch and on every rank. With w ranks, the batches i * w to i * w +
    w - 1 together are batch i of one process with w times the tokens (if that batch has w samples). Every sample is in exactly one batch,
    and none is split.

    Example: lengths (3, 3, 2, 4) without shuffle and 6 tokens a batch give [[0, 1], [2, 3]].

    Args:
        lengths: [N], tokens of each sample.
        tokens_per_batch: of one rank, on average.
        seed: with the epoch, fixes the order.
        epoch: its number.
        world_size: number of ranks.
        shuffle: a new order every epoch. Without it samples keep the cache's order, apart from the sorting within buckets.
        windows: read shard by shard.
        buckets: bring similar lengths together.

    Raises:
        ValueError: as `count_batches`; windows of no shards, or buckets of no steps.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if buckets is not None:
        if min(buckets.pad_to, buckets.steps) < 1:
            raise ValueError(f"buckets of {buckets.steps} steps, padded to {buckets.pad_to}; both must be at least 1")
        lengths = -(-lengths // buckets.pad_to) * buckets.pad_to
    num_steps = count_batches(lengths, tokens_per_batch, world_size) // world_size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy() if shuffle else np.arange(len(lengths))
    step_tokens = -(-int(lengths.sum()) // num_steps)
    groups: tuple[np.ndarray, ...] = ()
    # Of each sample in order: which stretch of the order it may be moved within.
    stretches = np.zeros(len(order), dtype=np.int64)
    pieces = stretches
    if windows is not None:
        groups = group_shards(lengths, windows, step_tokens, generator if shuffle else None)
        order, stretches = by_window(order, windows.shards, groups)
    if buckets is not None:
        order, pieces = by_length(order, lengths, stretches, buckets.steps * step_tokens)
    ends = np.cumsum(lengths[order])
    cuts = cut(ends, num_steps, world_size)
    bounds = np.stack([cuts[:-1], cuts[1:]], axis=1)
    if buckets is not None and shuffle:
        bounds = bounds[mix_steps(bounds, pieces, generator)]
    window_of = stretches[bounds[:, 1] - 1] if groups else stretches[:0]
    return EpochPlan(order, bounds, world_size, lengths, buckets is not None, groups, window_of)


def steps_differ(own: EpochPlan, other: EpochPlan) -> int | None:
    """The first step that holds other samples under another number of ranks, or None where all steps agree.

    Args:
        own: the plan of this run.
        other: the plan of the interrupted run, for the same epoch.
    """
    if len(own.bounds) != len(other.bounds):
        return 0
    differing = np.flatnonzero(own.bounds[:, 1] != other.bounds[:, 1])
    return int(differing[0]) if len(differing) else None
