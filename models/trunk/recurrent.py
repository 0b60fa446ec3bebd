"""Decoders that keep a recurrent state, run one row at a time through the model's own cache.

A recurrent state has no slots and takes no mask: it has read one text, from its beginning to its last token. So rows are read one by one,
and drafts are chains. What was rejected is forgotten by going back to a copy of the cache
(:mod:`draftsmith.models.slots.row_caches`).

Owns how prompts and chains are read so. Knows no family by name, and nothing of verification.

Shape legend: B batch rows, T prompt tokens, N nodes of a chain, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache

from draftsmith.models.slots.row_caches import RowCache, RowCaches
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.tree.tree import DraftTree
from draftsmith.models.trunk.reader import Reader, within_context
from draftsmith.models.trunk.riders import Carried
from draftsmith.models.trunk.trunk import TargetOutput, Trunk

MOST_PENDING = 16
"""Accepted tokens that a row reads again with its drafts, before it reads them once for all. Few more tokens hardly slow a forward."""


class RecurrentTrunk(Trunk):
    """A decoder some of whose layers keep a recurrent state; see :class:`Trunk`."""

    keeps_state = True

    def new_cache(self, capacity: int, num_rows: int, device: torch.device) -> RowCaches:
        """See :meth:`Trunk.new_cache`; these caches grow with their texts, whatever the capacity."""
        return RowCaches(num_rows, self.row_cache, device, self.style.in_steps)

    def row_cache(self) -> Cache:
        """An empty cache of the model's own, for one row."""
        return DynamicCache(config=self._config)

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
        text_lengths: Tensor | None = None,
        ends: Tensor | None = None,
        riders: Carried | None = None,
    ) -> TargetOutput:
        """Run one forward over the next tokens of one row.

        Args:
            input_ids: int64 [1, N].
            cache: the row's own.
            positions: int64 [1, N].
            mask: None; a recurrent state takes none.
            key_positions: ignored.
            layers, text_lengths: see :meth:`Trunk.forward`.
            ends: ignored.
            riders: None; riders need masks.

        Returns:
            The states of the new tokens.

        Raises:
            ValueError: a cache of slots, a mask or riders.
        """
        if isinstance(cache, SlotCache) or mask is not None or riders is not None:
            raise ValueError(
                f"{self.name} keeps a recurrent state, which follows one text from its beginning: it cannot read with masks, such as "
                "several branches or continuations at once; give a target whose layers all attend"
            )
        return super().forward(
            input_ids, cache=cache, positions=positions, mask=None, layers=layers, text_lengths=text_lengths
        )

    __call__ = forward


def read_row_chunks(
    target: Reader,
    caches: RowCaches,
    tokens_BT: Tensor,
    lengths_B: Tensor,
    layers: tuple[str, ...],
    chunk: int,
) -> Iterator[dict[str, Tensor]]:
    """Run prompts through a model row by row, a chunk each time that the next states are asked for.

    Args:
        target: the model.
        caches: empty.
        tokens_BT: int64, padded on the right; padding is not read.
        lengths_B: int64, tokens of each prompt.
        layers: names of layers.
        chunk: tokens a forward. A model that reads on in steps takes a whole prompt at once.

    Yields:
        The states of the layers at a chunk's tokens by name, [B, N, D] each; zeros at padding.
    """
    chunk = tokens_BT.shape[1] if caches.in_steps else chunk
    lengths = lengths_B.tolist()
    longest = max(range(len(lengths)), key=lambda row: int(lengths[row]))
    for begin in range(0, tokens_BT.shape[1], chunk):
        width = min(chunk, tokens_BT.shape[1] - begin)
        outputs = {
            row: _read(target, caches.rows[row], tokens_BT[row, begin : min(begin + width, length)], layers, length)
            for row, length in enumerate(lengths)
            if begin < length
        }
        states_of_rows = {name: {row: output.feature(name)[0] for row, output in outputs.items()} for name in layers}
        yield {
            name: torch.stack([_padded(states.get(row, states[longest][:0]), width) for row in range(len(lengths))])
            for name, states in states_of_rows.items()
        }


def read_chain(target: Reader, caches: RowCaches, tree: DraftTree, layers: tuple[str, ...]) -> TargetOutput:
    """Read a drafted chain behind the tokens of each row; :meth:`RowCaches.keep` then says what of it stays.

    Args:
        target: the model.
        caches: hold the text up to the root, which is not among it.
        tree: a chain in every row.
        layers: names of layers.

    Returns:
        The states of all N nodes.

    Raises:
        ValueError: the draft is a tree.
    """
    if not tree.chain:
        raise ValueError(
            "the drafter proposed a tree to a target that keeps a recurrent state, which follows one branch only; draft a chain such as 1x4"
        )
    read = _read_in_steps if caches.in_steps else _read_at_once
    outputs = [read(target, row, tokens_N, layers) for row, tokens_N in zip(caches.rows, tree.tokens_BN, strict=True)]
    return _joined(outputs, dim=0)


def _read_at_once(target: Reader, row: RowCache, tokens_N: Tensor, layers: tuple[str, ...]) -> TargetOutput:
    """A chain in one forward, behind what is pending; of its states only the chain's own."""
    nodes = len(tokens_N)
    if len(row.pending) + nodes > MOST_PENDING:
        _read(target, row, row.pending, ())
        row.pending = row.pending[:0]
    if nodes > 1:
        row.remember(0)
    output = _read(target, row, torch.cat([row.pending, tokens_N]), layers)
    return TargetOutput(
        output.pre_norm[:, -nodes:],
        output.normed[:, -nodes:],
        {name: states[:, -nodes:] for name, states in output.layers.items()},
    )


def _read_in_steps(target: Reader, row: RowCache, tokens_N: Tensor, layers: tuple[str, ...]) -> TargetOutput:
    """A chain token by token; the state before each drafted one is remembered, so nothing is ever pending."""
    outputs = []
    for place in range(len(tokens_N)):
        if place > 0:
            row.remember(place)
        outputs.append(_read(target, row, tokens_N[place : place + 1], layers))
    return _joined(outputs, dim=1)


def _joined(outputs: list[TargetOutput], dim: int) -> TargetOutput:
    return TargetOutput(
        torch.cat([output.pre_norm for output in outputs], dim),
        torch.cat([output.normed for output in outputs], dim),
        {name: torch.cat([output.layers[name] for output in outputs], dim) for name in outputs[0].layers},
    )


def _read(
    target: Reader, row: RowCache, tokens_N: Tensor, layers: tuple[str, ...], text_length: int = 0
) -> TargetOutput:
    """The next tokens of one row; ``text_length``: of a prompt, all of which counts as there for rotary factors."""
    positions_1N = torch.arange(row.num_read, row.num_read + len(tokens_N), device=tokens_N.device)[None]
    output = target(
        tokens_N[None],
        cache=row.cache,
        positions=within_context(target, positions_1N),
        mask=None,
        layers=layers,
        text_lengths=(positions_1N + 1).clamp(min=text_length),
    )
    row.num_read += len(tokens_N)
    return output


def _padded(states_ND: Tensor, width: int) -> Tensor:
    return F.pad(states_ND, (0, 0, 0, width - len(states_ND)))
