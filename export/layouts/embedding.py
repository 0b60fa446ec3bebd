"""The target's embedding in a drafter's folder: when it is written, and what is done with one that is found.

Owns both. Most of our drafters borrow the target's embedding. Engines do so too, but look up its bare matrix: where a family computes
more (Gemma multiplies by a factor), what the drafter was trained with must come with it. Knows no layout.

Shape legend: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from draftsmith.models.target.ends import TargetEnds

NAME = "embed_tokens.weight"
_CHUNK = 4096


@torch.no_grad()
def embedding_rows(ends: TargetEnds) -> Tensor:
    """[V, D]: what the target's embedding gives for every token."""
    return torch.cat([rows for _, rows in _chunks(ends)])


@torch.no_grad()
def is_plain(ends: TargetEnds) -> bool:
    """Whether the target's embedding gives the rows of its matrix as they are."""
    weight = dict(ends.embedding.named_parameters())["weight"].cpu()
    return all(torch.equal(rows, weight[ids].to(rows.dtype)) for ids, rows in _chunks(ends))


@torch.no_grad()
def refuse_other_embedding(stored: Tensor, ends: TargetEnds, where: str) -> None:
    """A drafter's stored embedding must be its target's, where the family has none of its own.

    Raises:
        ValueError: they differ, at the dtype that is stored; or in size.
    """
    if different := num_other_rows(stored, ends, where):
        raise ValueError(
            f"{where}: {NAME} differs from the embedding of {ends.name!r} in {different:,} of {len(stored):,} rows; name the target that "
            "the drafter was made for. Only a P-EAGLE can have an embedding of its own"
        )


@torch.no_grad()
def num_other_rows(stored: Tensor, ends: TargetEnds, where: str) -> int:
    """How many rows of a stored embedding differ from the target's, at the dtype that is stored.

    Raises:
        ValueError: it has other sizes.
    """
    sizes = (ends.vocab_size, ends.hidden_size)
    if tuple(stored.shape) != sizes:
        raise ValueError(
            f"{where}: {NAME} has {list(stored.shape)} numbers, the embedding of {ends.name!r} {list(sizes)}; name the target that the "
            "drafter was made for"
        )
    return sum(int((rows.to(stored.dtype) != stored[ids]).any(-1).sum()) for ids, rows in _chunks(ends))


def _chunks(ends: TargetEnds) -> Iterator[tuple[Tensor, Tensor]]:
    for ids in torch.arange(ends.vocab_size).split(_CHUNK):
        yield ids, ends.embed(ids.to(ends.device)).cpu()
