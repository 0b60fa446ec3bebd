"""Rows of text that a model continues to read, each with its keys and values kept.

Owns which tokens of a row the model has read, and runs it over the rest only. A text that differs from the one read before at some place
costs only what is behind that place. Any few of the rows share a forward, except in a model that keeps a recurrent state
(:mod:`draftsmith.label.mine.state_rows`). Knows nothing of answers and swaps.

Shape legend: B rows of a forward, R rows in all, N new tokens, S cache slots, K asked places, H key/value heads, Dh head size, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.label.mine.state_rows import StateRows
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.target import Target
from draftsmith.models.trunk.reader import within_context

CHUNK = 256
"""Tokens a forward, which bounds the memory of long texts."""


class RowSlots(SlotCache):
    """A `SlotCache` of R rows, any of which a forward may leave out.

    Args:
        capacity: number of slots S of each row.
        num_layers: how many layers the model has.
        num_rows: R.
    """

    def __init__(self, capacity: int, num_layers: int, num_rows: int) -> None:
        super().__init__(capacity, num_layers)
        self._num_rows = num_rows
        self._rows_B = torch.empty(0, dtype=torch.int64)

    def aim_rows(self, rows_B: Tensor, slots_BN: Tensor, window: int) -> None:
        """Says which rows the next forward runs, where it writes, and how many slots it sees.

        Args:
            rows_B: int64 [B].
            slots_BN: int64 [B, N], where the new keys and values go.
            window: number of slots that the forward sees.

        Raises:
            ValueError: `window` is beyond the capacity.
        """
        self.aim(slots_BN, window)
        self._rows_B = rows_B

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new keys and values of the rows aimed at.

        Args:
            key_states: [B, H, N, Dh].
            value_states: [B, H, N, Dh].
            layer_idx: number of the layer.
            args: ignored.
            kwargs: ignored.

        Returns:
            keys and values of the visible slots, [B, H, window, Dh] each.
        """
        if layer_idx == len(self):
            shape = (self._num_rows, -1, -1, -1)
            self._places.append(self._allocate(key_states[:1].expand(shape), value_states[:1].expand(shape)))
        keys_RHSDh, values_RHSDh = self.layer(layer_idx)
        rows_B = self._rows_B.to(keys_RHSDh.device)
        slots_BN = self._slots_BN.to(keys_RHSDh.device)
        keys_RHSDh[rows_B[:, None], :, slots_BN] = key_states.transpose(1, 2)
        values_RHSDh[rows_B[:, None], :, slots_BN] = value_states.transpose(1, 2)
        if len(rows_B) == self._num_rows:  # all of them, in order: no copy is needed
            return keys_RHSDh[:, :, : self.window], values_RHSDh[:, :, : self.window]
        return keys_RHSDh[rows_B, :, : self.window], values_RHSDh[rows_B, :, : self.window]


@dataclass(frozen=True)
class RowInput:
    """What a row is to read.

    Attributes:
        row: its number.
        tokens: all of them, from the first.
        num_asked: after how many tokens at its end the next token is asked.
    """

    row: int
    tokens: list[int]
    num_asked: int


@dataclass(frozen=True)
class RowOutput:
    """What came of reading a row.

    Attributes:
        next_tokens: the model's most likely token after each place asked for.
        num_tokens: that it read for this.
        num_forwards: that this row took part in.
    """

    next_tokens: list[int]
    num_tokens: int
    num_forwards: int


class CachedRows:
    """A model over rows of text.

    Args:
        model: the model.
        num_rows: how many rows there are.
        longest: most tokens of a row.
        vocab_size: choose among the first so many tokens; None for all.
        chunk: most tokens of a row in one forward, which bounds the memory of long texts.

    Attributes:
        num_forwards: forwards of the model so far.
        num_tokens: tokens that they read.
        num_padding: places beside them that were computed, because rows of a forward are as long as its longest.
    """

    def __init__(
        self, model: Target, num_rows: int, longest: int, vocab_size: int | None = None, chunk: int = CHUNK
    ) -> None:
        self.model = model
        self.num_forwards = self.num_tokens = self.num_padding = 0
        self._chunk = min(chunk, longest)
        self._states = StateRows(model, num_rows) if model.keeps_state else None
        self._cache = RowSlots(longest + self._chunk, model.config.num_hidden_layers, num_rows)
        self._read: list[list[int]] = [[] for _ in range(num_rows)]
        self._vocab_size = vocab_size
        self._embedded = next(model.ends.embedding.parameters()).shape[0]

    @torch.inference_mode()
    def read(self, reads: list[RowInput]) -> dict[int, RowOutput]:
        """Continues to read some rows, in one forward, or in several where a row has more new tokens than a chunk.

        A row may differ from what it read before from any place on. The keys and values up to there are kept, those behind it written over.

        Args:
            reads: the rows and their tokens.

        Returns:
            what came of it, by row.
        """
        reads = sorted(reads, key=lambda read: read.row)
        begins = [self._known(read) for read in reads]
        first = list(begins)
        forwards = [1] * len(reads)
        while long := [i for i, read in enumerate(reads) if len(read.tokens) - begins[i] > self._chunk]:
            sizes = [min(self._chunk, len(reads[i].tokens) - reads[i].num_asked - begins[i]) for i in long]
            parts = [reads[i].tokens[begins[i] : begins[i] + size] for i, size in zip(long, sizes, strict=True)]
            self._forward([reads[i].row for i in long], [begins[i] for i in long], parts, [0] * len(long))
            for i, size in zip(long, sizes, strict=True):
                begins[i] += size
                forwards[i] += 1
        rest = [read.tokens[begin:] for read, begin in zip(reads, begins, strict=True)]
        asked = [read.num_asked for read in reads]
        next_tokens = self._next_tokens(self._forward([read.row for read in reads], begins, rest, asked), rest, asked)
        for read in reads:
            self._read[read.row] = read.tokens
        return {
            read.row: RowOutput(tokens, len(read.tokens) - start, count)
            for tokens, read, start, count in zip(next_tokens, reads, first, forwards, strict=True)
        }

    def _known(self, read: RowInput) -> int:
        """How many of a row's tokens need not be read again. The places asked for are always read: their states are not kept."""
        assert 0 < read.num_asked <= min(self._chunk, len(read.tokens))
        most = min(len(self._read[read.row]), len(read.tokens) - read.num_asked)
        old = self._read[read.row]
        same = next((place for place in range(most) if old[place] != read.tokens[place]), most)
        return same if self._states is None else self._states.known(read.row, same)

    def _forward(self, rows: list[int], begins: list[int], parts: list[list[int]], asked: list[int]) -> Tensor:
        """Normed states [B, N, D] of new tokens, padded on the right."""
        self.num_tokens += sum(map(len, parts))
        if self._states is not None:
            self.num_forwards += len(rows)
            reads = zip(rows, begins, [self._embeddable(part) for part in parts], asked, strict=True)
            return pad_sequence([self._states.read(*read) for read in reads], batch_first=True)
        width = max(map(len, parts))
        self.num_forwards += 1
        self.num_padding += len(parts) * width - sum(map(len, parts))
        return self._over_slots(rows, begins, parts, width)

    def _over_slots(self, rows: list[int], begins: list[int], parts: list[list[int]], width: int) -> Tensor:
        """One forward; each row's padding is behind its tokens, where the next forward writes over it."""
        device = self.model.device
        parts = [self._embeddable(part) for part in parts]
        tokens_BN = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device)
        slots_BN = torch.tensor(begins, device=device)[:, None] + torch.arange(width, device=device)
        window = max(begins) + width
        key_positions_BS = torch.arange(window, device=device).expand(len(rows), -1)
        self._cache.aim_rows(torch.tensor(rows, device=device), slots_BN, window)
        return self.model(
            tokens_BN,
            cache=self._cache,
            positions=within_context(self.model, slots_BN),
            mask=key_positions_BS[:, None, None, :] <= slots_BN[:, None, :, None],
            key_positions=key_positions_BS,
        ).normed

    def _embeddable(self, tokens: list[int]) -> list[int]:
        return [min(token, self._embedded - 1) for token in tokens]

    def _next_tokens(self, normed_BND: Tensor, parts: list[list[int]], asked: list[int]) -> list[list[int]]:
        device = normed_BND.device
        first_B = torch.tensor([len(part) - count for part, count in zip(parts, asked, strict=True)], device=device)
        place_BK = (first_B[:, None] + torch.arange(max(asked), device=device)).clamp(max=normed_BND.shape[1] - 1)
        asked_BKD = normed_BND.gather(1, place_BK[..., None].expand(-1, -1, normed_BND.shape[-1]))
        chosen_BK = self.model.logits(asked_BKD)[..., : self._vocab_size].argmax(-1)
        return [row[:count] for row, count in zip(chosen_BK.tolist(), asked, strict=True)]
