"""The start of requests: their prompts are read, their first tokens chosen, the drafter starts.

Owns what can be decoded at all, and how rows come to be, for a whole batch or for a few rows of one in flight: which requests are read
together, and how many prompt tokens between two cycles. Knows no loop.

Shape legend: B batch rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decode.batch import Batch, Request
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.decode.processors import RequestText, processors_of
from draftsmith.decode.rows import Rows, seen_tokens
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.decode.verify.verifier import Reading
from draftsmith.models.drafters.draft_records import Emitted, Opening
from draftsmith.models.target.target import PRE_NORM, Target, TargetOutput
from draftsmith.models.tree.early_stop import StopState
from draftsmith.models.tree.noise import request_keys
from draftsmith.models.tree.steps import result_of
from draftsmith.models.tree.tree import root_tree
from draftsmith.models.trunk.forwards import CHUNK, joined, read_chunks
from draftsmith.models.trunk.riders import RIDERS

Started = tuple[Batch, CycleReport]


@dataclass(frozen=True)
class Prefill:
    """Starts requests.

    Attributes:
        cycle: how the rows will be decoded.
        chunk: prompt tokens a forward, which bounds the memory of long prompts.
    """

    cycle: DecodeCycle
    chunk: int = CHUNK

    def __call__(self, requests: Sequence[Request], settings: GenerationSettings, room: int | None = None) -> Started:
        """Read prompts and choose the token behind each.

        Args:
            requests, settings, room: as :meth:`in_steps`.

        Returns:
            The rows, and the report of their first tokens.
        """
        return result_of(self.in_steps(requests, settings, room))

    def in_steps(
        self, requests: Sequence[Request], settings: GenerationSettings, room: int | None = None
    ) -> Generator[None, None, Started]:
        """As a call, but gives control back whenever a chunk has been read and another follows, by the target or by the drafter.

        Args:
            requests: one a row.
            settings: shared by them.
            room: tokens that a row can come to hold, prompt and reply together. None makes rows that are only moved into a batch.

        Returns:
            The rows, and the report of their first tokens.
        """
        cycle, target = self.cycle, self.cycle.target
        lengths = [len(request.prompt) for request in requests]
        longest = max(lengths)
        padded = [request.prompt + [0] * (longest - len(request.prompt)) for request in requests]
        tokens_BT = torch.tensor(padded, device=target.device)
        lengths_B = torch.tensor(lengths, device=target.device)
        # A row runs past its budget by a draft, with the host one cycle behind by two, and stays there while it is idle.
        past = cycle.limits.draft_length * (2 if cycle.fixed_shapes else 1) + cycle.fixed_shapes
        room = (longest if room is None else room) + past
        batch = Batch(
            requests=list(requests),
            cache=target.new_cache(room + cycle.num_slots + cycle.slot_step, len(requests)),
            lengths_B=lengths_B,
            host_lengths=list(lengths),
            host_fresh=list(lengths),
            root_B=tokens_BT[:, 0].clone(),
            rows=self._rows(requests, tokens_BT, lengths_B, settings),
            active_B=torch.ones_like(lengths_B, dtype=torch.bool),
            room=room,
        )
        layers = tuple({PRE_NORM, *cycle.layers})
        chunks = []
        for states in read_chunks(
            target, batch.cache, tokens_BT, lengths_B, layers, self.chunk, cycle.slot_step, cycle.riders
        ):
            chunks.append(states)
            if len(chunks) * self.chunk < longest:
                yield
        states = joined(chunks)
        reading = self._reading(batch, states[PRE_NORM], settings)
        steps = cycle.verifier.walk(reading, None)
        batch.root_B.copy_(steps.emitted_BE[:, 0])
        batch.rows.emit(steps.emitted_BE, steps.counts_B, batch.active_B, cycle.verifier.thoughts)
        batch.rows.number_keys(-steps.counts_B)  # the first token is emitted and not cached, as every root is
        if cycle.drafter is not None:
            emitted_BE = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1)
            emitted_BE = emitted_BE.scatter_(1, lengths_B[:, None] - 1, steps.emitted_BE)
            features = {name: states[name] for name in cycle.drafter.features}
            if cycle.riders is not None:
                features[RIDERS] = self._at_ends(states[RIDERS], lengths_B, longest)
            pairs = Emitted(emitted_BE, features, lengths_B.clone())
            indices = tuple(request.index for request in requests)
            opening = Opening(pairs, tokens_BT[:, 0], cycle.limits, room, cycle.fixed_shapes, self.chunk, indices)
            batch.draft = yield from cycle.drafter.start_in_steps(opening)
        return batch, cycle.report(steps, reading)

    def _at_ends(self, riders_BCD: Tensor, lengths_B: Tensor, longest: int) -> Tensor:
        """The riders of each prompt's last token, at every token of it; those of the others were not computed.

        Args:
            riders_BCD: of the C chunks.
            lengths_B: int64, tokens of each prompt.
            longest: of them.
        """
        chunk_B11 = ((lengths_B - 1) // self.chunk)[:, None, None]
        return riders_BCD.gather(1, chunk_B11.expand(-1, -1, riders_BCD.shape[-1])).expand(-1, longest, -1)

    def _reading(self, batch: Batch, pre_norm_BTD: Tensor, settings: GenerationSettings) -> Reading:
        """What the target says behind each prompt, as a draft of one node."""
        last_B11 = (batch.lengths_B - 1)[:, None, None]
        last_B1D = pre_norm_BTD.gather(1, last_B11.expand(-1, -1, pre_norm_BTD.shape[-1]))
        output = TargetOutput(last_B1D, self.cycle.target.ends.final_norm(last_B1D))
        root = root_tree(batch.root_B.clone())
        return self.cycle.reading(batch, root, root.ancestors(), output, settings)

    def _rows(
        self, requests: Sequence[Request], tokens_BT: Tensor, lengths_B: Tensor, settings: GenerationSettings
    ) -> Rows:
        """What each request and the verifier need, before the first token."""
        cycle = self.cycle
        rows = Rows()
        device, vocab_size = lengths_B.device, cycle.target.ends.vocab_size
        numbers = [request.number for request in requests]
        if settings.temperature > 0.0:
            rows.choice_keys_B = request_keys(settings.seed, numbers, "choices", device)
        if cycle.verifier.num_draft_keys > 0:
            rows.cycle_keys_B = request_keys(settings.seed, numbers, "cycles", device)
        rows.number_keys(lengths_B)
        if cycle.verifier.thoughts is not None:
            rows.inside_B = cycle.verifier.thoughts.behind_prompts(tokens_BT, lengths_B)
        if settings.constraints is not None:
            rows.texts = [_text(request, settings, vocab_size, cycle.target.device) for request in requests]
        elif settings.repetition_penalty != 1.0:
            rows.seen_BV = seen_tokens(tokens_BT, lengths_B, vocab_size)
        if cycle.drafter is not None and cycle.limits.early_stop is not None:
            rows.stop = StopState.begin(cycle.limits.early_stop, cycle.limits.draft_length, len(requests), device)
        return rows


class Admission:
    """Lets requests that wait into a batch in flight, a chunk of prompt tokens at a time.

    Short prompts are read together. A prompt of more than one chunk is read alone, in several steps, and the requests behind it wait.

    Args:
        prefill: reads prompts.
        queue: the requests that wait.
        settings: shared by them.
        num_ahead: so many short prompts may be read together, although fewer rows are idle. A forward over few tokens costs nearly as much
            as one over many.

    Attributes:
        has_more: whether requests may still wait in the queue.
        ready: rows whose prompts have been read and that wait for a place, or None.
    """

    def __init__(
        self, prefill: Prefill, queue: Iterator[Request], settings: GenerationSettings, num_ahead: int = 0
    ) -> None:
        self._prefill, self._queue, self._settings = prefill, queue, settings
        self._steps: Generator[None, None, Started] | None = None
        self._next: Request | None = None
        self._longest = self._num_rows = 0
        self._num_ahead = num_ahead
        self.has_more = True
        self.ready: Batch | None = None

    @property
    def num_rows(self) -> int:
        """How many rows are promised to requests that were taken from the queue."""
        return (self._num_rows if self._steps is not None else 0) + (self._next is not None)

    def begin(self, most_rows: int, most_tokens: int) -> int:
        """Choose what :meth:`step` reads, if nothing is under way.

        Args:
            most_rows: how many rows are idle.
            most_tokens: how many prompt tokens may be read now.

        Returns:
            How many tokens a step reads, padding included; 0 where no request waits, or the next one needs more than may be read now.
        """
        chunk = self._prefill.chunk
        if self._steps is None:
            requests = self._take(max(most_rows, self._num_ahead), most_tokens)
            if not requests:
                return 0
            self._num_rows, self._longest = len(requests), max(len(request.prompt) for request in requests)
            self._steps = self._prefill.in_steps(requests, self._settings)
        num_tokens = self._num_rows * min(self._longest, chunk)
        return num_tokens if num_tokens <= most_tokens else 0

    def step(self) -> Started | None:
        """Read what :meth:`begin` chose.

        Returns:
            The new rows and the report of their first tokens; None where more of their prompts is left to read.
        """
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration as end:
            self._steps = None
            started: Started = end.value
            return started
        return None

    def _take(self, most_rows: int, most_tokens: int) -> list[Request]:
        """The next requests whose prompts, padded to the longest, have at most so many tokens, or the first chunk of a single one."""
        requests: list[Request] = []
        longest = 0
        while len(requests) < most_rows:
            self._next = self._next or next(self._queue, None)
            self.has_more = self._next is not None
            if self._next is None:
                break
            length = len(self._next.prompt)
            longest = max(longest, length if requests else min(length, self._prefill.chunk))
            if (len(requests) + 1) * longest > most_tokens:
                break
            requests.append(self._next)
            self._next = None
            if length > self._prefill.chunk:
                break
        return requests


class Requests:
    """Checked requests from prompts, taken one by one. It ends before one that cannot be decoded.

    Args:
        target: the model.
        prompts: (request id, token ids) of each. An iterator that has none left may have more later.
        settings: shared by all.
        room: the most tokens of a prompt and its reply together.

    Attributes:
        failure: why the next prompt cannot be decoded, or was not given; None as long as all could.
    """

    def __init__(
        self, target: Target, prompts: Iterable[tuple[int, list[int]]], settings: GenerationSettings, room: int
    ) -> None:
        self._target, self._prompts = target, iter(prompts)
        self._max_new_tokens, self._room = settings.max_new_tokens, room
        self._index = 0
        self.failure: ValueError | None = None

    def __iter__(self) -> Requests:
        return self

    def __next__(self) -> Request:
        """The next one; its budget is what the context leaves of it."""
        if self.failure is not None:
            raise StopIteration
        try:
            number, prompt = next(self._prompts)
            index, self._index = self._index, self._index + 1
            return Request(index, prompt, number, self._budget(index, prompt))
        except ValueError as error:
            self.failure = error
        raise StopIteration

    def raise_failure(self) -> None:
        """Raise what kept a prompt from being decoded.

        Raises:
            ValueError: a prompt cannot be decoded, or does not fit into the room.
        """
        if self.failure is not None:
            raise self.failure

    def _budget(self, index: int, prompt: list[int]) -> int:
        """The most tokens of a prompt's reply.

        Raises:
            ValueError: it cannot be decoded, or does not fit into the room.
        """
        check_prompt(self._target, index, prompt)
        context = self._target.max_positions
        budget = self._max_new_tokens if context is None else min(self._max_new_tokens, context - len(prompt))
        if len(prompt) + budget > self._room:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and its reply up to {budget}, a row has room for {self._room}; shorten the "
                f"prompt, lower max_new_tokens, or give a room of {len(prompt) + budget}"
            )
        return budget


def check_prompt(target: Target, index: int, prompt: list[int]) -> None:
    """Check that a prompt can be decoded.

    Args:
        target: the model.
        index: of the prompt, for the message.
        prompt: token ids.

    Raises:
        ValueError: it is empty, too long, or of other ids than the vocabulary's.
    """
    context, vocab_size = target.max_positions, target.ends.vocab_size
    if not prompt:
        raise ValueError(f"prompt {index} is empty; give at least one token (a BOS token, for instance)")
    if context is not None and len(prompt) >= context:
        raise ValueError(
            f"prompt {index} has {len(prompt)} tokens, the context of {target.name} is {context} and needs room for a reply; "
            "shorten the prompt"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ValueError(
            f"prompt {index} holds token id {wrong}, the vocabulary of {target.name} ends at {vocab_size - 1}; is the tokenizer the "
            "target's?"
        )


def _text(request: Request, settings: GenerationSettings, vocab_size: int, device: torch.device) -> RequestText:
    """What constraints read of a request; its processors include the penalty and the warpers."""
    processors = processors_of(settings, request.prompt, request.budget, vocab_size, device)
    return RequestText(request.prompt, processors, request.generation.token_ids)
