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
    """The shards of each window. Every window but the last holds at least the tokens of a step and of the longest sample.

    Args:
        lengths: int64 [N], tokens of each sample.
        windows: the shard of each sample, and the shards of a window.
        step_tokens: tokens of a step over all ranks.
        generator: shuffles the shards; None keeps their order.

    Returns:
        the shards of each window.

    Raises:
        ValueError: windows of no shards.
    """
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
    """The order with the samples of each window together.

    Args:
        order: [N], sample numbers.
        shards: int32 [N], the shard of each sample.
        groups: from `group_shards`.

    Returns:
        the new order [N], and the window of each place in it, int64 [N].
    """
    window_of_shard = np.zeros(int(shards.max()) + 1, dtype=np.uint16 if len(groups) < 2**16 else np.int32)
    for number, group in enumerate(groups):
        window_of_shard[group] = number
    keys = window_of_shard[shards[order]]
    moved = np.argsort(keys, kind="stable")
    return order[moved], keys[moved].astype(np.int64)


def by_length(
    order: np.ndarray, lengths: np.ndarray, stretches: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The order sorted by length in pieces of so many tokens, one rising and the next falling, so that similar lengths meet.

    Args:
        order: [N], sample numbers.
        lengths: int64 [N], tokens of each sample.
        stretches: int64 [N], the stretch of each place in the order; a piece lies in one stretch.
        tokens: of a piece.

    Returns:
        the new order [N], and the piece of each place in it, int64 [N].
    """
    own = lengths[order]
    starts = np.cumsum(own) - own
    firsts = np.flatnonzero(np.diff(stretches, prepend=stretches[0] - 1))
    offsets = starts - np.repeat(starts[firsts], np.diff(firsts, append=len(own)))
    begins = np.diff(offsets // tokens, prepend=-1) != 0
    begins[firsts] = True
    pieces = np.cumsum(begins) - 1
    largest = int(own.max()) + 1
    keys = pieces * largest + np.where(pieces % 2 == 0, own, largest - 1 - own)
    return order[np.argsort(keys, kind="stable")], pieces


def mix_steps(bounds: np.ndarray, pieces: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """A random order of the steps within each piece. A step that lies in two pieces stays where it is.

    Args:
        bounds: int64 [R, 2], where each step begins and ends in the order of samples.
        pieces: int64 [N], from `by_length`.
        generator: of the random numbers.

    Returns:
        int64 [R], numbers of steps.
    """
    firsts, lasts = pieces[bounds[:, 0]], pieces[bounds[:, 1] - 1]
    order = np.arange(len(bounds))
    whole = np.flatnonzero(firsts == lasts)
    mixed = whole[torch.randperm(len(whole), generator=generator).numpy()]
    order[whole] = mixed[np.argsort(firsts[mixed], kind="stable")]
    return order
