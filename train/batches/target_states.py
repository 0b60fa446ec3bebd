"""States of a batch from the target itself, in the loop.

Owns: the length buckets of a batch's forwards, and who runs which forwards when several processes hold the target together. Does not know:
where texts come from, when a batch is asked for (`look_ahead.py`), losses, optimisers.

Shape legend: B rows of a forward, T tokens (of the packed batch, or of the longest row of a forward), D hidden, G greedy tokens a
position, n real tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from draftsmith.data.cache.features import length_batches, prompt_lengths
from draftsmith.decode.greedy_continuations import greedy_continuations
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.target.sharding import ShardedOver
from draftsmith.models.target.target import Target
from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.batches.epoch_sampler import EpochSampler
from draftsmith.train.batches.look_ahead import LookAheadLoader, PlacedBatch, to_device, without_states

__all__ = ["LookAheadLoader", "Round", "RoundSampler", "Rounds", "StatesInTheLoop"]

Round = Sequence[CacheBatch]
"""Batches that several processes train on at the same step, without states: one a process, or this process's own only."""


class StatesInTheLoop:
    """Runs the frozen target over batches of token ids.

    Args:
        target: whole, spread over devices, or this process's part of it.
        over: the processes that hold it; where it is sharded, a call needs the batches of all of them, and all must call.
        layers: names of the layers that are wanted.
        num_greedy: G, the target's greedy tokens after each position, 0 for none.
        forward_tokens: tokens of one forward at most, padding included; a longer sample is a forward of its own.
        device: where the states are wanted.
    """

    def __init__(
        self,
        target: Target,
        over: ShardedOver,
        layers: Sequence[str],
        num_greedy: int,
        forward_tokens: int,
        device: torch.device,
    ) -> None:
        self.target, self.over, self.layers = target, over, tuple(layers)
        self.num_greedy, self.forward_tokens, self.device = num_greedy, forward_tokens, device

    @torch.no_grad()
    def __call__(self, batches: Round) -> CacheBatch:
        """This process's batch of the round with `hidden[layer]` [T, D] in the target's dtype and `greedy_ids` int64 [T, G].

        A forward takes samples of similar length, so little of it is padding. Where processes share a forward (`tp`), it runs over
        the samples of all their batches, and each process keeps its own. Where they gather weights for each other, all run the same number
        of forwards. Processes with fewer add forwards of one token, or the others would wait for ever.

        Args:
            batches: of the round, without states.
        """
        own = batches[self.over.rank] if self.over.is_sharded else batches[0]
        packed = without_states(own.packed, self.device)
        # Made outside of inference mode, which the target's own tensors come from: autograd could not keep those.
        hidden = {layer: self._room(packed) for layer in self.layers}
        greedy = packed.input_ids.new_zeros(len(packed.input_ids), self.num_greedy) if self.num_greedy else None
        for forward in self._plan(batches):
            self._run(forward, hidden, greedy)
        return PlacedBatch(replace(packed, hidden=hidden, greedy_ids=greedy), own.sample_ids)

    def _room(self, packed: PackedBatch) -> Tensor:
        size = self.target.ends.hidden_size
        return torch.zeros(len(packed.input_ids), size, dtype=self.target.dtype, device=self.device)

    def _plan(self, batches: Round) -> list[_PaddedForward]:
        if self.over.shares_texts:
            texts = [text for rank, batch in enumerate(batches) for text in _texts(batch, rank == self.over.rank)]
            return self._forwards(texts)
        planned = [self._forwards(list(_texts(batch, True))) for batch in batches]
        if not self.over.is_sharded:
            return planned[0]
        own = planned[self.over.rank]
        missing = max(map(len, planned)) - len(own)
        return (
            own
            + [
                _PaddedForward(
                    [_PackedText(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), 0, False)]
                )
            ]
            * missing
        )

    def _forwards(self, texts: list[_PackedText]) -> list[_PaddedForward]:
        buckets = length_batches([len(text.ids) for text in texts], self.forward_tokens)
        return [_PaddedForward([texts[row] for row in rows]) for rows in buckets]

    def _run(self, forward: _PaddedForward, hidden: dict[str, Tensor], greedy: Tensor | None) -> None:
        ids = to_device(forward.padded_ids(), self.target.device)
        read = prompt_lengths((text.loss_mask for text in forward.texts), ids.device)
        output = self.target.prefix(ids, layers=self.layers, read=read)
        taken, places = forward.kept()
        if len(taken):
            taken, places = to_device(taken, self.device), to_device(places, self.device)
            for layer, room in hidden.items():
                states = output.feature(layer).to(room)
                room.index_copy_(0, places, states.flatten(0, 1).index_select(0, taken))
        if self.num_greedy:
            # Run by all, kept by some: see __call__.
            continued = greedy_continuations(self.target, ids, self.num_greedy, read).to(self.device)
            if greedy is not None and len(taken):
                greedy.index_copy_(0, places, continued.flatten(0, 1).index_select(0, taken))


@dataclass(frozen=True)
class _PackedText:
    """A sample's ids [length] and which are labelled, where they start in its packed batch, and whether that is this process's."""

    ids: Tensor
    loss_mask: Tensor
    start: int
    is_own: bool


@dataclass(frozen=True)
class _PaddedForward:
    texts: list[_PackedText]

    def padded_ids(self) -> Tensor:
        """int64 [B, T], padded on the right with 0, which causal attention keeps from every real token."""
        return pad_sequence([text.ids for text in self.texts], batch_first=True)

    def kept(self) -> tuple[Tensor, Tensor]:
        """int64 [n] each: which of the B x T states are kept, and their places in the packed batch.

        Example: own texts of 3 and 2 tokens that start at 5 and 0 -> (0, 1, 2, 3, 4) and (5, 6, 7, 0, 1).
        """
        longest = max(len(text.ids) for text in self.texts)
        rows = [(row, text) for row, text in enumerate(self.texts) if text.is_own]
        taken = [row * longest + torch.arange(len(text.ids)) for row, text in rows]
        places = [text.start + torch.arange(len(text.ids)) for _, text in rows]
        nothing = torch.zeros(0, dtype=torch.int64)
        return torch.cat([*taken, nothing]), torch.cat([*places, nothing])


def _texts(batch: CacheBatch, is_own: bool) -> Iterator[_PackedText]:
    """The samples of a packed batch."""
    start = 0
    lengths = torch.unique_consecutive(batch.packed.document_ids, return_counts=True)[1].tolist()
    parts = zip(batch.packed.input_ids.split(lengths), batch.packed.loss_mask.split(lengths), strict=True)
    for ids, loss_mask in parts:
        yield _PackedText(ids, loss_mask, start, is_own)
        start += len(ids)


class RoundSampler(DistributedSampler):
    """The sample numbers of the batches of some processes at each step, or of this process's own only, by its own sampler.

    A DistributedSampler only in name, so that Lightning leaves the split over ranks to it.
    """

    def __init__(self, own: EpochSampler, members: range | None) -> None:
        self.own, self.members = own, members

    def set_epoch(self, epoch: int) -> None:
        """Passed on."""
        self.own.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[list[list[int]]]:
        if self.members is None:
            return ([numbers] for numbers in self.own)
        plan, members = self.own.plan(), self.members
        steps = (plan.step(number) for number in range(self.own.start, len(plan.bounds)))
        return ([step[rank] for rank in members] for step in steps)


class Rounds(Dataset):
    """Batches of a data set by round: indexed with one list of sample numbers a process."""

    def __init__(self, batches: Dataset) -> None:
        self.batches = batches

    def __getitem__(self, numbers: Sequence[Sequence[int]]) -> Round:
        return [self.batches[own] for own in numbers]
