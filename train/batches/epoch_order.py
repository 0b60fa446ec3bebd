"""The order of an epoch: samples shuffled within windows of shards, and sorted by length within buckets.

Owns: windows and buckets. Does not know: batches, ranks.

Shape legend: N samples, S shards, R joint batches (steps).
"""

from dataclasses import dataclass

import numpy as np
import torch


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


def group_shards(
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


def by_window(order: np.ndarray, shards: np.ndarray, groups: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The order with the samples of each window together, and int64 [N] the window of each."""
    window_of_shard = np.zeros(int(shards.max()) + 1, dtype=np.uint16 if len(groups) < 2**16 else np.int32)
    for number, group in enumerate(groups):
        window_of_shard[group] = number
    keys = window_of_shard[shards[order]]
    moved = np.argsort(keys, kind="stable")
    return order[moved], keys[moved].astype(np.int64)


def by_length(
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


def mix_steps(bounds: np.ndarray, piece_N: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """int64 [R]: the steps in random order within the pieces that they lie in as a whole; others stay where they are."""
    firsts, lasts = piece_N[bounds[:, 0]], piece_N[bounds[:, 1] - 1]
    order = np.arange(len(bounds))
    whole = np.flatnonzero(firsts == lasts)
    mixed = whole[torch.randperm(len(whole), generator=generator).numpy()]
    order[whole] = mixed[np.argsort(firsts[mixed], kind="stable")]
    return order
