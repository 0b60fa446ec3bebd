"""Which samples make up which training batch: a pure function of lengths, seed and epoch.

Owns: the shuffle, the cut into batches, the share of each rank, and where an interrupted epoch goes on. Does not know:
caches, tensors, Lightning.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


def count_batches(lengths: Sequence[int], tokens_per_batch: int, world_size: int = 1) -> int:
    """Batches of one epoch over all ranks: a multiple of world_size, the same in every epoch.

    Raises ValueError for a budget below 1, no samples, or fewer samples than ranks.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; a batch needs at least 1 token")
    if len(lengths) < world_size:
        raise ValueError(
            f"{len(lengths)} samples cannot feed {world_size} processes; add samples or use fewer processes"
        )
    rounds = max(1, round(sum(lengths) / (tokens_per_batch * world_size)))
    return world_size * min(rounds, len(lengths) // world_size)


def plan_epoch(
    lengths: Sequence[int], tokens_per_batch: int, *, seed: int, epoch: int, world_size: int = 1, shuffle: bool = True
) -> list[list[int]]:
    """Cuts the epoch's order of samples into batches of nearly equal numbers of tokens.

    tokens_per_batch is what a batch holds on average; batch i ends at the sample nearest to (i + 1) / n of all tokens.
    Equal cuts, instead of filling each batch to a limit, keep the number of batches the same in every epoch and on
    every rank, and make the batches i * w to i * w + w - 1 of w ranks together the batch i of one process with w times
    the tokens. Every sample is in exactly one batch and none is split.
    Example: lengths (3, 3, 2, 4) without shuffle and 6 tokens a batch give [[0, 1], [2, 3]].
    """
    num_batches = count_batches(lengths, tokens_per_batch, world_size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist() if shuffle else list(range(len(lengths)))
    ends = list(itertools.accumulate(lengths[index] for index in order))
    batches, start = [], 0
    for number in range(num_batches):
        wanted = (number + 1) * ends[-1] / num_batches
        stop = bisect_left(ends, wanted)
        if stop < len(ends) and (stop == 0 or ends[stop] - wanted <= wanted - ends[stop - 1]):
            stop += 1
        # One sample at least for this batch and for each that follows, however long single samples are.
        stop = min(max(stop, start + 1), len(order) - (num_batches - 1 - number))
        batches.append(order[start:stop])
        start = stop
    return batches


class EpochSampler(DistributedSampler):
    """Gives this rank's batches (lists of sample numbers) of the current epoch, from batch `start` on.

    A DistributedSampler only in name, so that Lightning leaves the split over ranks to it. Batch i of the plan goes to
    rank i modulo world size.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(_Sized(len(lengths)), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = lengths
        self.tokens_per_batch = tokens_per_batch
        self.epoch = epoch
        self.start = start

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch, also of the one that is being resumed."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also when it starts in the middle: Lightning counts on from there."""
        return count_batches(self.lengths, self.tokens_per_batch, self.num_replicas) // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        plan = plan_epoch(
            self.lengths,
            self.tokens_per_batch,
            seed=self.seed,
            epoch=self.epoch,
            world_size=self.num_replicas,
            shuffle=self.shuffle,
        )
        return iter(plan[self.rank :: self.num_replicas][self.start :])


class _Sized(Dataset):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index
