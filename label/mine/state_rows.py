"""Rows of text in a model that keeps a recurrent state, which cannot take a token back.

So some copies of each row's cache are kept. A text that differs from the one read before at some place is read again from the last copy
before that place. Rows are read one by one. Knows nothing of answers and swaps.

Shape legend: N new tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from draftsmith.models.slots.row_caches import RowCaches, snapshot
from draftsmith.models.target.target import Target
from draftsmith.models.trunk.reader import within_context

MOST_COPIES = 8
"""Copies of one row's cache, each of which holds the keys and values of its text."""


class StateRows:
    """Rows of a model that keeps a recurrent state.

    Args:
        model: the model.
        num_rows: how many rows there are.
    """

    def __init__(self, model: Target, num_rows: int) -> None:
        self._model = model
        caches = model.new_cache(1, num_rows)  # they grow with their texts
        assert isinstance(caches, RowCaches)
        self._in_steps = caches.in_steps
        self._copies: list[list[tuple[int, Cache]]] = [[(0, row.cache)] for row in caches.rows]

    def known(self, row: int, most: int) -> int:
        """After how many tokens reading can begin.

        Args:
            row: its number.
            most: so many of its first tokens are the same as before.

        Returns:
            The number of tokens in the largest copy that has read no more than those.
        """
        return max(num_read for num_read, _ in self._copies[row] if num_read <= most)

    def read(self, row: int, begin: int, tokens: list[int], asked: int) -> Tensor:
        """Read on from a copy.

        Args:
            row: its number.
            begin: tokens of the copy, as :meth:`known` gives them.
            tokens: the new ones.
            asked: so many at their end may be other tokens next time: a copy is kept before them, and one behind them.

        Returns:
            Their states after the final norm, [N, D].
        """
        copies = [copy for copy in self._copies[row] if copy[0] <= begin]
        cache = snapshot(copies[-1][1])
        states = []
        for part in (tokens[: len(tokens) - asked], tokens[len(tokens) - asked :]):
            if part:
                states += self._states(cache, begin, part)
                begin += len(part)
                copies = thinned([*copies, (begin, snapshot(cache))])
        self._copies[row] = copies
        return torch.cat(states)

    def _states(self, cache: Cache, begin: int, tokens: list[int]) -> list[Tensor]:
        """The states of tokens, in one forward where the model can."""
        if self._in_steps and begin and len(tokens) > 1:
            steps = [self._states(cache, begin + place, [token]) for place, token in enumerate(tokens)]
            return [state for step in steps for state in step]
        positions_1N = torch.arange(begin, begin + len(tokens), device=self._model.device)[None]
        output = self._model(
            torch.tensor([tokens], device=self._model.device),
            cache=cache,
            positions=within_context(self._model, positions_1N),
            mask=None,
        )
        return [output.normed[0]]


def thinned(copies: list[tuple[int, Cache]]) -> list[tuple[int, Cache]]:
    """Keep at most :data:`MOST_COPIES`: without the copy whose neighbours are closest to each other. The first and the last stay.

    Example: where copies after 0, 50, 70 and 100 tokens are one too many, that after 70 goes: 50 and 100 are closer than 0 and 70.

    Args:
        copies: by how many tokens they have read, rising.
    """
    while len(copies) > MOST_COPIES:
        gaps = [after[0] - before[0] for before, after in zip(copies, copies[2:], strict=False)]
        drop = 1 + min(range(len(gaps)), key=gaps.__getitem__)
        copies = [copy for place, copy in enumerate(copies) if place != drop]
    return copies
