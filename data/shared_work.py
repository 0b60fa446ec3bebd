"""Several processes at one job without a word between them: who does what, and what only one may do at a time.

Owns: rank and world size from flags or the environment, locks that wait. Knows nothing of what the
processes make.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from draftsmith.files import exclusive

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Share:
    """This process's part of a job: every `world_size`-th piece, from `rank` on.

    Attributes:
        rank: of this process, from 0.
        world_size: how many processes share the job.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def suffix(self) -> str:
        """What tells this rank's files from another's; nothing for a single process."""
        return "" if self.world_size == 1 else f"-{self.rank:05d}-of-{self.world_size:05d}"

    def own(self, num_pieces: int) -> range:
        """The numbers of this process's pieces. Example: rank 1 of 3 has of 6 pieces the numbers 1 and 4.

        Args:
            num_pieces: of the whole job.

        Returns:
            The numbers, rising.
        """
        return range(self.rank, num_pieces, self.world_size)


@dataclass(frozen=True, kw_only=True)
class ShareOptions:
    """Which part of a job this process does.

    Args:
        rank: Which share this process makes; default: RANK of the environment, or 0.
        world_size: How many processes share the job; default: WORLD_SIZE of the environment, or 1.
    """

    rank: int | None = None
    world_size: int | None = None

    def own(self) -> Share:
        """The share that is asked for; by default that of the environment, where torchrun sets both, or all of the job.

        Returns:
            The share.

        Raises:
            ValueError: a rank outside of 0 to world_size - 1, or only one of the two is known.
        """
        rank, world_size = self.rank, self.world_size
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank is {rank} and world_size {world_size}; give both or neither")
        if rank is None or world_size is None:
            # Lightning leaves WORLD_SIZE alone behind in a process that has trained: one of the two says nothing.
            launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
            rank, world_size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank {rank} of {world_size} processes does not exist; ranks run from 0 to world_size - 1"
            )
        return Share(rank, world_size)


OWN_SHARE = ShareOptions()


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Hold the right to write `path`, as `exclusive` does, or give False where another process has it.

    Args:
        path: what is written.

    Yields:
        Whether this process has the right.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path))
        except ValueError:
            free = False
        else:
            free = True
        yield free


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the right to write `path`, after waiting for whoever has it: for what takes moments.

    Args:
        path: what is written.

    Yields:
        Once, nothing.
    """
    while True:
        with if_free(path) as free:
            if free:
                yield
                return
        time.sleep(_POLL_SECONDS)
