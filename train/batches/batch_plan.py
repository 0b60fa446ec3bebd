"""Which samples make up which training batch: a pure function of lengths, shards, seed, epoch and number of ranks.

Owns: the order of an epoch, the cut into batches, the share of each rank, and where an interrupted epoch goes on. Does
not know: caches, tensors of states, Lightning.

An epoch is cut twice. First into *joint batches*, what all ranks together take in one step: they depend on the tokens of
a step only, so a run goes on with another number of ranks and the same samples a step. Then the samples of each joint
batch are dealt out to the ranks so that all have nearly as much to do: a step takes as long as its slowest rank. Batch i of
a plan goes to rank i modulo world size.

Shape legend: N samples, S shards, R joint batches (steps), W ranks. Plans of ten million samples hold two arrays and no
list of them.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

Lengths = Sequence[int] | np.ndarray
Tokens = int | Fraction


@dataclass(frozen=True)
class Windows:
    """The order of a cache that is read shard by shard: shards in random order, samples shuffled within a few of them.

    A window that holds fewer tokens than a step takes the next shards too, so that no step needs more than two.

    Attributes:
        shards: int32 [N], the shard of each sample, never falling.
        size: shards of a window, at least 1.
    """

    shards: np.ndarray
    size: int


@dataclass(frozen=True)
class Buckets:
    """Batches of samples of similar length.

    Attributes:
        pad_to: lengths count as the next multiple of it.
        steps: samples are sorted by length within so many steps' worth of the epoch's order, and no further.
    """

    pad_to: int
    steps: int = 16


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
        """The batches of all ranks at one step. Which of them gets the longest sample goes round."""
        start, stop = self.bounds[number]
        joint = self.order[start:stop]
        deal = deal_by_length if self.bucketed else deal_out
        rank_of = (deal(self.lengths[joint], self.num_ranks) + number) % self.num_ranks
        return [joint[rank_of == rank].tolist() for rank in range(self.num_ranks)]


def deal_out(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [n]: which rank takes each of n samples, so that all have nearly as many tokens; n >= num_ranks, and each gets one.

    The longest first, each to the rank with the fewest tokens so far (Graham, "Bounds on multiprocessing timing anomalies",
    1969): no two ranks differ by more than the longest sample.
    """
    rank_of = np.zeros(len(lengths), dtype=np.int64)
    if num_ranks == 1:
        return rank_of
    tokens = [(0, rank) for rank in range(num_ranks)]
    for place in np.argsort(-lengths, kind="stable").tolist():
        fewest, rank = tokens[0]
        rank_of[place] = rank
        heapq.heapreplace(tokens, (fewest + int(lengths[place]), rank))
    return rank_of


def deal_by_length(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """As deal_out, the shortest samples to the first rank and the longest to the last: little padding in each."""
    order = np.argsort(lengths, kind="stable")
    cuts = _cut(np.cumsum(lengths[order]), num_ranks, 1)
    rank_of = np.empty(len(lengths), dtype=np.int64)
    rank_of[order] = np.repeat(np.arange(num_ranks), np.diff(cuts))
    return rank_of


def count_batches(lengths: Lengths, tokens_per_batch: Tokens, world_size: int = 1) -> int:
    """Batches of one epoch over all ranks: a multiple of world_size, the same in every epoch.

    Raises ValueError for a budget below 1, no samples, or fewer samples than ranks.
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

    tokens_per_batch is what a batch holds on average; of n joint batches the i-th ends at the sample nearest to i / n of all
    tokens, and `EpochPlan.step` gives each rank its part. Equal cuts, instead of filling each batch to a limit, keep the number
    of batches the same in every epoch and on every rank, and make the batches i * w to i * w + w - 1 of w ranks together
    the batch i of one process with w times the tokens, as long as that batch has w samples. Every sample is in exactly one
    batch and none is split.
    With windows the order is by shard, with buckets similar lengths come together (see these); without shuffle
    everything stays in the cache's order, but for the sorting within buckets.
    Example: lengths (3, 3, 2, 4) without shuffle and 6 tokens a batch give [[0, 1], [2, 3]].

    Raises ValueError as `count_batches`, and for windows of no shards or buckets of no steps.
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
    stretch_N = np.zeros(len(order), dtype=np.int64)
    piece_N = stretch_N
    if windows is not None:
        groups = _group_shards(lengths, windows, step_tokens, generator if shuffle else None)
        order, stretch_N = _by_window(order, windows.shards, groups)
    if buckets is not None:
        order, piece_N = _by_length(order, lengths, stretch_N, buckets.steps * step_tokens)
    ends = np.cumsum(lengths[order])
    cuts = _cut(ends, num_steps, world_size)
    bounds = np.stack([cuts[:-1], cuts[1:]], axis=1)
    if buckets is not None and shuffle:
        bounds = bounds[_mix_steps(bounds, piece_N, generator)]
    window_of = stretch_N[bounds[:, 1] - 1] if groups else stretch_N[:0]
    return EpochPlan(order, bounds, world_size, lengths, buckets is not None, groups, window_of)


def _group_shards(
    lengths: np.ndarray, windows: Windows, step_tokens: int, generator: torch.Generator | None
) -> tuple[np.ndarray, ...]:
    """The shards of each window, shuffled with a generator. All but the last hold at least a step and the longest sample."""
    if windows.size < 1:
        raise ValueError(f"window_shards is {windows.size}; a window needs at least 1 shard")
    firsts = np.flatnonzero(np.diff(windows.shards, prepend=windows.shards[0] - 1))
    shards = windows.shards[firsts]
    tokens = np.add.reduceat(lengths, firsts)
    if generator is not None:
        mixed = torch.randperm(len(shards), generator=generator).numpy()
        shards, tokens = shards[mixed], tokens[mixed]
    # A cut moves by half a sample at either end, so a batch may be longer than a step by one sample.
    least = step_tokens + int(lengths.max())
    starts, held = [0], 0
    for number in range(len(shards)):
        if number - starts[-1] >= windows.size and held >= least:
            starts.append(number)
            held = 0
        held += int(tokens[number])
    return tuple(np.split(shards, starts[1:]))


def _by_window(order: np.ndarray, shards: np.ndarray, groups: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The order with the samples of each window together, and int64 [N] the window of each."""
    window_of_shard = np.zeros(int(shards.max()) + 1, dtype=np.uint16 if len(groups) < 2**16 else np.int32)
    for number, group in enumerate(groups):
        window_of_shard[group] = number
    keys = window_of_shard[shards[order]]
    moved = np.argsort(keys, kind="stable")
    return order[moved], keys[moved].astype(np.int64)


def _by_length(
    order: np.ndarray, lengths: np.ndarray, stretch_N: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The order sorted by length in pieces of so many tokens, one rising and the next falling, so that they meet.

    And int64 [N], the piece at each place; a piece lies in one stretch.
    """
    own = lengths[order]
    starts = np.cumsum(own) - own
    firsts = np.flatnonzero(np.diff(stretch_N, prepend=stretch_N[0] - 1))
    offsets = starts - np.repeat(starts[firsts], np.diff(firsts, append=len(own)))
    begins = np.diff(offsets // tokens, prepend=-1) != 0
    begins[firsts] = True
    piece_N = np.cumsum(begins) - 1
    largest = int(own.max()) + 1
    keys = piece_N * largest + np.where(piece_N % 2 == 0, own, largest - 1 - own)
    return order[np.argsort(keys, kind="stable")], piece_N


def _mix_steps(bounds: np.ndarray, piece_N: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """int64 [R]: the steps in random order within the pieces that they lie in as a whole; others stay where they are."""
    firsts, lasts = piece_N[bounds[:, 0]], piece_N[bounds[:, 1] - 1]
    order = np.arange(len(bounds))
    whole = np.flatnonzero(firsts == lasts)
    mixed = whole[torch.randperm(len(whole), generator=generator).numpy()]
    order[whole] = mixed[np.argsort(firsts[mixed], kind="stable")]
    return order


def _cut(ends: np.ndarray, parts: int, least: int) -> np.ndarray:
    """int64 [parts + 1]: where parts of nearly equal tokens begin and end in an order whose running sum of tokens is `ends`.

    Each has at least `least` samples.
    """
    room = least * np.arange(1, parts)
    cuts = np.maximum.accumulate(np.maximum(_nearest(ends, parts) - room, 0))
    return np.concatenate([[0], np.minimum(cuts, len(ends) - least * parts) + room, [len(ends)]])


def _nearest(ends: np.ndarray, parts: int) -> np.ndarray:
    """int64 [parts - 1]: how many samples come before the cut nearest to 1 / parts, 2 / parts ... of all tokens; a tie takes one more.

    In whole numbers: the same share must give the same cut, however it is written and however many tokens there are.
    """
    whole, rest = divmod(int(ends[-1]), parts)
    numbers = np.arange(1, parts)
    # wanted = below + fraction / parts
    below = numbers * whole + numbers * rest // parts
    fraction = numbers * rest % parts
    stops = np.searchsorted(ends, below + (fraction > 0))
    before = np.where(stops > 0, ends[stops - 1], 0)
    nearer = (ends[stops] + before - 2 * below) * parts <= 2 * fraction
    return stops + nearer


class EpochSampler(DistributedSampler):
    """Gives this rank's batches (lists of sample numbers) of the current epoch, from batch `start` on.

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

    Neighbouring ranks, which share a node's folder, begin at different shards of a window.
    """
    near = [plan.windows[one] for one in (window, window + 1, window - 1) if 0 <= one < len(plan.windows)]
    return [int(shard) for shards in near for shard in np.roll(shards, -rank)]


def steps_differ(own: EpochPlan, other: EpochPlan) -> int | None:
    """The first step that holds other samples under another number of ranks, or None where all steps agree."""
    if len(own.bounds) != len(other.bounds):
        return 0
    differing = np.flatnonzero(own.bounds[:, 1] != other.bounds[:, 1])
    return int(differing[0]) if len(differing) else None


class _Sized(Dataset):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index
