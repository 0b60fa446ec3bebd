"""The state of one batch in flight, and the host's record of each request.

Owns which rows decode, who takes the places of those that ended, and what each request has emitted. Knows no model.

Shape legend: B batch rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from draftsmith.decode.rows import Rows
from draftsmith.models.drafters.draft_records import DraftState
from draftsmith.models.slots.row_caches import RowCaches
from draftsmith.models.slots.row_state import ReplacedRows, UnknownState, all_by_rows, put_rows, take_rows
from draftsmith.models.slots.slot_cache import KeptRows, SlotCache

Finish = Literal["eos", "stop", "length"]


@dataclass
class Generation:
    """What one request produced.

    Attributes:
        token_ids: emitted tokens, the end-of-sequence token included where one was produced.
        finish: why it ended: ``eos``, ``stop`` (a stop string or the caller's ``until``) or ``length`` (the budget or the context's end).
        accepted: accepted draft tokens of each cycle, after cutting at the end; the first token comes from the prefill and
            belongs to no cycle. Tokens per step of a request is ``(len(token_ids) - 1) / len(accepted)``.
        depths: the deepest draft proposed in each cycle.
        by_rule: positions in ``token_ids`` of tokens that only a LOSSY rule accepted; empty without a rule.
        cycles_before: how many cycles the rows of its call had run when it took one.
    """

    token_ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    accepted: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    by_rule: list[int] = field(default_factory=list)
    cycles_before: int = 0


class Decoding(Protocol):
    """When a request was decoded; see :class:`Generation`."""

    @property
    def cycles_before(self) -> int:
        """Cycles that the rows of its call had run when it took one."""

    @property
    def accepted(self) -> Sequence[int]:
        """One entry a cycle."""


def busy_share(calls: Iterable[Iterable[Decoding]], num_rows: int) -> float:
    """Which share of its rows an engine kept busy, over all cycles. Rows that rest, wait for a prompt or were given up are not busy.

    Args:
        calls: all replies of each call.
        num_rows: how many rows a call had.

    Returns:
        Between 0 and 1; 1 where every reply ended with its first token, so that no cycle ran.
    """
    num_busy = num_cycles = 0
    for replies in calls:
        spans = [(reply.cycles_before, len(reply.accepted)) for reply in replies]
        num_busy += sum(own for _, own in spans)
        num_cycles += max((before + own for before, own in spans), default=0)
    return num_busy / (num_rows * num_cycles) if num_cycles else 1.0


@dataclass(frozen=True)
class Request:
    """One prompt to decode.

    Attributes:
        index: which of the caller's prompts it is.
        prompt: token ids.
        number: which noise it draws.
        budget: the most tokens of its reply.
        generation: what it has produced so far.
    """

    index: int
    prompt: list[int]
    number: int
    budget: int
    generation: Generation = field(default_factory=Generation)


_BY_ROWS = ("cache", "lengths_B", "root_B", "rows", "active_B", "draft", "requests", "host_lengths", "host_fresh")
"""What a batch keeps of each row."""


@dataclass
class Batch:
    """The rows that decode, and what is cached of them.

    Attributes:
        requests: of each row; None where its request has ended and none has taken its place.
        cache: the target's keys and values, or the caches of its rows where it keeps a recurrent state.
        lengths_B: int64, cached tokens of each row; the root is not among them.
        host_lengths: the same numbers on the host.
        host_fresh: how many of them the last cycle added.
        root_B: int64, the last emitted token.
        rows: noise, processors and early stop of each row.
        active_B: bool, rows whose requests have not ended.
        room: tokens that a row can come to hold.
        draft: the drafter's state, or None in plain decoding.
    """

    requests: list[Request | None]
    cache: SlotCache | RowCaches
    lengths_B: Tensor
    host_lengths: list[int]
    host_fresh: list[int]
    root_B: Tensor
    rows: Rows
    active_B: Tensor
    room: int
    draft: DraftState | None = None

    @property
    def idle(self) -> list[int]:
        """Rows whose requests have ended."""
        return [row for row, request in enumerate(self.requests) if request is None]

    @property
    def num_alive(self) -> int:
        """How many rows decode."""
        return len(self.requests) - len(self.idle)

    @property
    def has_ended(self) -> bool:
        """Whether no row decodes."""
        return all(request is None for request in self.requests)

    def can_refill(self) -> bool:
        """Whether single rows of the drafter's state can be replaced."""
        return all_by_rows(self.draft, len(self.requests))

    def can_wait(self) -> bool:
        """Whether some rows of this batch can be moved into another one while the rest waits."""
        try:
            self.take(slice(0, 1))
        except UnknownState:
            return False
        return True

    def take(self, rows: slice) -> Batch:
        """Some consecutive rows, in the memory of this batch, which must not decode any more.

        Raises:
            UnknownState: the state cannot be told apart by rows.
        """
        return Batch(
            room=self.room, **{name: take_rows(getattr(self, name), rows, len(self.requests)) for name in _BY_ROWS}
        )

    def refill(self, fresh: Batch) -> Batch | None:
        """Put the first rows of another batch in the places of the first idle ones.

        Args:
            fresh: of this batch's settings. It must not be used afterwards.

        Returns:
            The rows that are left over, or None.

        Raises:
            UnknownState: the drafter's state cannot be told apart by rows.
        """
        idle, num_fresh = self.idle, len(fresh.requests)
        left = fresh.take(slice(len(idle), num_fresh)) if num_fresh > len(idle) else None
        moved = fresh if left is None else fresh.take(slice(0, len(idle)))
        places = ReplacedRows.of(idle[: len(moved.requests)], len(self.requests), self.root_B.device)
        for name in _BY_ROWS:
            setattr(self, name, put_rows(getattr(self, name), getattr(moved, name), places))
        return left

    def rest(self) -> None:
        """Let idle rows emit nothing from now on; they keep their places."""
        self.active_B.copy_(torch.tensor([request is not None for request in self.requests]))

    def drop_idle(self, num_spare: int = 0) -> None:
        """Make the batch smaller by its idle rows; the last rows move into the holes they leave.

        Args:
            num_spare: how many idle rows keep their places.
        """
        dropped = set(self.idle[num_spare:])
        keep = [row for row in range(len(self.requests)) if row not in dropped]
        if len(keep) == len(self.requests):
            return
        kept = KeptRows.of(keep, self.root_B.device)
        self.requests = [self.requests[row] for row in kept.order]
        self.host_lengths = [self.host_lengths[row] for row in kept.order]
        self.host_fresh = [self.host_fresh[row] for row in kept.order]
        if not keep:
            return
        self.cache.shrink(kept)
        self.lengths_B, self.root_B = self.lengths_B[kept.index], self.root_B[kept.index]
        self.rows, self.active_B = self.rows.select(kept), self.active_B[kept.index]
        self.draft = None if self.draft is None else self.draft.select_rows(kept)


class Recorder:
    """The host's side: collects emitted tokens, ends requests and streams.

    Args:
        eos_token_ids: any of these ends a request; it is kept.
        stop_strings: see the settings.
        tokenizer: needed with stop strings.
        on_tokens: called with (index of the request, tokens) as soon as tokens are final.
        until: called with (index of the request, its reply so far) for every token in turn; True ends the request with that token.

    Attributes:
        num_cycles: how many cycles have been recorded.

    Raises:
        ValueError: stop strings without a tokenizer.
    """

    def __init__(
        self,
        eos_token_ids: tuple[int, ...],
        stop_strings: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase | None,
        on_tokens: Callable[[int, list[int]], None] | None,
        until: Callable[[int, list[int]], bool] | None = None,
    ) -> None:
        if stop_strings and tokenizer is None:
            raise ValueError("stop strings need the text of tokens; give the engine a tokenizer")
        self._eos = frozenset(eos_token_ids)
        self._stops = stop_strings
        self._tokenizer = tokenizer
        self._on_tokens = on_tokens
        self._until = until
        self.num_cycles = 0
        # A stop of n characters ends within the last 4 n byte-level tokens; a few more give the decoder its context.
        self._tail = 4 * max(map(len, stop_strings), default=0) + 4

    def add(self, request: Request, tokens: list[int], drafted: int | None, by_rule: Sequence[int] = ()) -> bool:
        """Append a cycle's tokens to a request, cut where it ends; True when it is finished.

        Args:
            request: which one.
            tokens: what the walk emitted.
            drafted: depth of the cycle's tree; None for the prefill's token, which belongs to no cycle.
            by_rule: 1 for each token that only a lossy rule accepted; empty without a rule.
        """
        generation = request.generation
        kept, finish = self._cut(request, tokens)
        start = len(generation.token_ids)
        generation.by_rule += [start + place for place, ruled in enumerate(by_rule[: len(kept)]) if ruled]
        generation.token_ids.extend(kept)
        if drafted is None:
            generation.cycles_before = self.num_cycles
        else:
            generation.accepted.append(len(kept) - 1)
            generation.depths.append(drafted)
        if self._on_tokens is not None:
            self._on_tokens(request.index, kept)
        if finish is not None:
            generation.finish = finish
        return finish is not None

    def _cut(self, request: Request, tokens: list[int]) -> tuple[list[int], Finish | None]:
        """The tokens that count, and why the request ends with them, if it does."""
        before = request.generation.token_ids
        room = request.budget - len(before)
        finish: Finish | None = "length" if len(tokens) >= room else None
        kept = tokens[:room]
        ends = next((place for place, token in enumerate(kept) if token in self._eos), None)
        if ends is not None:
            kept, finish = kept[: ends + 1], "eos"
        stop = self._stop_at(request, before, kept)
        if stop is not None and not (finish == "eos" and stop == len(kept)):
            kept, finish = kept[:stop], "stop"
        return kept, finish

    def _stop_at(self, request: Request, before: list[int], tokens: list[int]) -> int | None:
        """How many of ``tokens`` to keep so that the last one kept completes a stop string or meets ``until``; None where none does."""
        for kept in range(1, len(tokens) + 1 if self._stops or self._until else 1):
            reply = before + tokens[:kept]
            if self._completes(reply) or (self._until is not None and self._until(request.index, reply)):
                return kept
        return None

    def _completes(self, reply: list[int]) -> bool:
        """Whether the last token completes a stop string."""
        if not self._stops:
            return False
        assert self._tokenizer is not None
        text = self._tokenizer.decode(reply[-self._tail :])
        return any(stop in text for stop in self._stops)
