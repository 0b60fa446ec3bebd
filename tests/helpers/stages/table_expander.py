"""A drafter's expander by a table of logits, and the nodes of a tree as paths.

Shape legend: B batch rows, M nodes of a layer, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draftsmith.models import DraftTree

Path = tuple[int, ...]
Table = Callable[[int, Path], Sequence[float]]


class TableExpander:
    """Logits of what follows a path, looked up by row and path; target ids are draft ids + 10."""

    def __init__(self, table: Table, num_rows: int) -> None:
        self.root_B = torch.full((num_rows,), 5)
        self.num_extended = 0
        self._table = table
        self._paths: list[list[Path]] = [[()] for _ in range(num_rows)]

    def begin(self) -> Tensor:
        return self._logits()

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        self.num_extended += 1
        self._paths = [
            [paths[above] + (token - 10,) for token, above in zip(tokens, aboves, strict=True)]
            for paths, tokens, aboves in zip(self._paths, tokens_BM.tolist(), above_BM.tolist(), strict=True)
        ]
        return self._logits()

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids + 10

    def _logits(self) -> Tensor:
        rows = [[list(self._table(row, path)) for path in paths] for row, paths in enumerate(self._paths)]
        return torch.tensor(rows, dtype=torch.float32)


def noise_table(seed: int, size: int = 5, scale: float = 2.0) -> Table:
    """Random logits, the same for the same row and path."""

    def logits(row: int, path: Path) -> list[float]:
        generator = torch.Generator().manual_seed(hash((seed, row, path)) % 2**31)
        return (scale * torch.randn(size, generator=generator)).tolist()

    return logits


def found(tree: DraftTree, row: int) -> dict[Path, float]:
    """The nodes of a row: path of tokens -> score."""
    assert tree.scores_BN is not None
    paths: dict[int, Path] = {0: ()}
    for node in range(1, tree.num_nodes):
        if tree.valid_BN[row, node]:
            above = int(tree.parents_BN[row, node])
            assert above in paths, "a node precedes its parent or hangs on padding"
            paths[node] = (*paths[above], int(tree.tokens_BN[row, node]))
            assert int(tree.depths_BN[row, node]) == len(paths[node])
    assert len(set(paths.values())) == len(paths), "two siblings hold one token"
    return {path: float(tree.scores_BN[row, node]) for node, path in paths.items() if node}
