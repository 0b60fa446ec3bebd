"""This rank's batches of the current epoch, as Lightning's loop asks for them.

Owns: where an interrupted epoch resumes, and which shards are needed next. Does not know: how an epoch is cut into batches.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from draftsmith.train.batches.batch_plan import EpochPlan, Lengths, Tokens, count_batches, plan_epoch
from draftsmith.train.batches.epoch_order import Buckets, Windows


class EpochSampler(DistributedSampler):
    """Gives this rank's batches of the current epoch, lists of sample numbers, starting with batch `start`.

    A DistributedSampler only in name, so that Lightning leaves the split over ranks to it.

    Args:
        lengths: tokens of each sample.
        tokens_per_batch: of one rank, on average; a fraction where a joint batch does not divide evenly.
        seed: with the epoch, fixes the order.
        shuffle: a new order every epoch.
        rank: whose batches these are.
        world_size: of how many.
        epoch: the first one.
        start: batches of it that were taken before.
        windows: read shard by shard.
        buckets: similar lengths together.
        need: called with the shards that are or will soon be read, most urgent first, whenever that changes.
    """

    def __init__(
        self,
        lengths: Lengths,
        tokens_per_batch: Tokens,
        *,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        epoch: int = 0,
        start: int = 0,
        windows: Windows | None = None,
        buckets: Buckets | None = None,
        need: Callable[[list[int]], None] | None = None,
    ) -> None:
        super().__init__(_Sized(len(lengths)), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = lengths
        self.tokens_per_batch = tokens_per_batch
        self.windows, self.buckets, self.need = windows, buckets, need
        self._planned: tuple[int, EpochPlan] | None = None
        self.epoch = epoch
        self.start = start

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch, also of the one that is being resumed."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also when it starts in the middle: Lightning counts on from there."""
        return self._num_batches

    @cached_property
    def _num_batches(self) -> int:
        lengths = np.asarray(self.lengths, dtype=np.int64)
        if self.buckets is not None:
            lengths = -(-lengths // self.buckets.pad_to) * self.buckets.pad_to
        return count_batches(lengths, self.tokens_per_batch, self.num_replicas) // self.num_replicas

    def plan(self) -> EpochPlan:
        """The current epoch's batches, over all ranks."""
        if self._planned is None or self._planned[0] != self.epoch:
            plan = plan_epoch(
                self.lengths,
                self.tokens_per_batch,
                seed=self.seed,
                epoch=self.epoch,
                world_size=self.num_replicas,
                shuffle=self.shuffle,
                windows=self.windows,
                buckets=self.buckets,
            )
            self._planned = self.epoch, plan
        return self._planned[1]

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan()
        reached = -1
        for step in range(self.start, len(plan.bounds)):
            if self.need is not None and plan.windows and plan.window_of[step] != reached:
                reached = int(plan.window_of[step])
                self.need(needed_shards(plan, reached, self.rank))
            yield plan[step * self.num_replicas + self.rank]
        if self.need is not None:
            self.need([])


def needed_shards(plan: EpochPlan, window: int, rank: int) -> list[int]:
    """Shards of a window, of the next, and of the one before, which workers may still be reading; in this order.

    Neighbouring ranks share a node's folder. They begin at different shards of a window.

    Args:
        plan: of the epoch.
        window: its number.
        rank: of this process.
    """
    near = [plan.windows[number] for number in (window, window + 1, window - 1) if 0 <= number < len(plan.windows)]
    return [int(shard) for shards in near for shard in np.roll(shards, -rank)]


class _Sized(Dataset):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index
