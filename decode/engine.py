"""The decoder: cycle after cycle until every request has ended.

Owns the loop, the queue of requests and what the host records. What a cycle does is in :mod:`draftsmith.decode.cycle`, how it is run in
:mod:`draftsmith.decode.runners`. A request that waits takes the row of one that has ended.

The host waits for the device once a cycle, in :meth:`Engine._record`, to read what was emitted. Behind a captured graph it is one cycle
behind: the device is never idle, and a row that has ended decodes one cycle too many, which is dropped.

Shape legend: B batch rows.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from draftsmith.decode.batch import Batch, Generation, Recorder, Request
from draftsmith.decode.cycle import BROKEN, CycleReport, DecodeCycle
from draftsmith.decode.ledger import Ledger, phase
from draftsmith.decode.prefill import Admission, Prefill, Requests, check_prompt
from draftsmith.decode.runners import Compile, Runner, check_compile, compiles, needs_host, whole_cycle_runner
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.decode.verify.choice import verifier_for
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.models.branches import check_branches
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.evaluating import evaluating
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.finite import not_finite
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes_by_rows import ShapesByRows, as_shapes
from draftsmith.models.trunk.forwards import CHUNK, read_again


@dataclass(frozen=True)
class Flight:
    """A cycle that has been started.

    Attributes:
        report: what the host will read of it.
        requests: which request each row belonged to at its start.
    """

    report: CycleReport
    requests: list[Request | None]


class Engine:
    """Decodes with one target and, if given, one drafter: losslessly, unless a LOSSY rule is given too.

    Args:
        target: the frozen model.
        drafter: proposes; None decodes plainly. It stays as it is: several engines can share one.
        limits: how much to draft a cycle, or how much for how many rows. By default, the shapes that ``draftsmith tune`` kept in the folder
            that the drafter was loaded from, if they fit here and no rule is given; else a chain of 4 (of fewer, where the drafter can
            make no more).
        tokenizer: needed for stop strings only; must be the drafter's.
        ledger: where time is charged, or None.
        prefill_chunk: prompt tokens a forward, which bounds the memory of long prompts. Where a prompt takes a free row of a batch, no more
            than so many are read between two cycles of the other rows.
        rule: keeps draft tokens that the target would not have chosen; the text is then no longer the target's own.
        compile: ``on`` runs a cycle as one compiled function (on CUDA as one captured graph), ``off`` op by op. ``auto`` is ``off``
            as long as no GPU has measured the captured cycle. Where a cycle needs the host, it runs op by op, and a warning says why.
        runner: makes what runs a cycle of fixed shapes, in place of what ``compile`` says.

    Attributes:
        drafter: a view of the drafter that is attached to the target; None in plain decoding.
        shapes: what is drafted for how many rows.
        limits: the most that is drafted.
        verifier: decides what is emitted.

    Raises:
        ValueError: the drafter or the rule belongs to another target or tokenizer, the rule cannot verify such drafts, nothing drafts for
            it, ``compile`` is unknown, or the file of kept shapes breaks a rule. Also for a tree, where the target keeps a recurrent state.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        limits: DraftLimits | ShapesByRows | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ledger: Ledger | None = None,
        prefill_chunk: int = CHUNK,
        rule: LossyRule | None = None,
        compile: Compile = "auto",
        runner: Callable[[DecodeCycle], Runner] | None = None,
    ) -> None:
        check_compile(compile)
        self.target = target
        if limits is None and drafter is not None and rule is None:
            limits = drafter.kept_shapes(target)
        self.shapes = as_shapes(limits or chain_for(drafter))
        self.limits = self.shapes.most
        self.tokenizer = tokenizer
        self.ledger = ledger
        drafted = () if drafter is None else self.shapes.drafted
        check_branches(target, drafted)
        verifiers = [verifier_for(target, shape, rule) for shape in drafted or (None,)]
        self.verifier = verifiers[0]  # of several shapes, all are verified alike
        self.drafter = None if drafter is None else drafter.bound(target.ends)
        self._prefill_chunk = prefill_chunk
        features = () if self.drafter is None else self.drafter.features
        layers = tuple(dict.fromkeys((*features, *self.verifier.layers)))
        target.tap(layers)
        # On a GPU the visible slots grow in steps, so that few shapes occur.
        slot_step = 64 if target.device.type == "cuda" else 1
        own = self.drafter if drafted else None
        self._cycles = {
            shape: DecodeCycle(target, own, self.limits, self.verifier, layers, shape, slot_step=slot_step)
            for shape in self.shapes.shapes
        }
        self._fixed_cycles = {shape: replace(cycle, fixed_shapes=True) for shape, cycle in self._cycles.items()}
        if runner is None and compiles(compile):
            runner = whole_cycle_runner
        self._runners: dict[DraftLimits | None, Runner] = {}
        if runner is not None:
            self._runners = {shape: runner(cycle) for shape, cycle in self._fixed_cycles.items()}
        self._said: set[str] = set()
        self._kept: tuple[Batch, GenerationSettings, int] | None = None
        if tokenizer is not None:
            fingerprint = tokenizer_fingerprint(tokenizer)
            if self.drafter is not None:
                self.drafter.check_tokenizer(fingerprint)
            self.verifier.check_tokenizer(fingerprint)

    def generate(
        self,
        prompts: Iterable[list[int]],
        settings: GenerationSettings,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        request_ids: list[int] | None = None,
        until: Callable[[int, list[int]], bool] | None = None,
        num_rows: int | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths.

        Args:
            prompts: token ids, one list a request. All are taken before the first is decoded; :meth:`stream` takes them one by one.
            settings: shared by all.
            on_tokens: called with (index of the prompt, tokens) as soon as tokens are final.
            request_ids: which noise each prompt draws; its index by default.
            until: called with (index of the prompt, its reply so far) for every token in turn; True ends the reply with that token.
            num_rows: how many decode at once; the others wait, and take the places of those that end. None decodes all at once.

        Returns:
            one record a prompt, in their order.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context, ids outside the vocabulary, sampled trees at
                temperature 0, ``num_rows`` below 1, or logits that turn into NaN or infinity.
        """
        prompts = list(prompts)
        numbers = list(range(len(prompts))) if request_ids is None else request_ids
        if len(numbers) != len(prompts):
            raise ValueError(f"there are {len(numbers)} request_ids for {len(prompts)} prompts; give one each")
        for index, prompt in enumerate(prompts):
            check_prompt(self.target, index, prompt)
        room = max(map(len, prompts), default=0) + settings.max_new_tokens
        most_rows = max(1, len(prompts)) if num_rows is None else num_rows
        requests = zip(numbers, prompts, strict=True)
        replies = dict(self.stream(requests, settings, most_rows, room, on_tokens, until))
        return [replies[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Iterable[tuple[int, list[int]]],
        settings: GenerationSettings,
        num_rows: int,
        room: int,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        until: Callable[[int, list[int]], bool] | None = None,
        in_order: bool = False,
    ) -> Iterator[tuple[int, Generation]]:
        """Decode prompts from an iterator and give replies as they end. Prompts are taken from it as rows become free,
        up to half as many as there are rows before that.

        A prompt that cannot be decoded ends the stream, but first the prompts before it get their replies.

        Args:
            prompts: (request id, token ids) of each; the id says which noise it draws. Where it has none left, it is asked again after
                each reply, so a caller can add prompts that follow from replies.
            settings: shared by all.
            num_rows: how many decode at once.
            room: the most tokens of a prompt and its reply together. Memory is that of ``num_rows`` rows of so many tokens.
            on_tokens: called with (index of the prompt, tokens) as soon as tokens are final.
            until: called with (index of the prompt, its reply so far) for every token in turn; True ends the reply with that token.
            in_order: give replies in the order of the prompts. A reply then waits for those before it, and takes memory meanwhile.

        Yields:
            The index of a prompt, counted from 0, and its record.

        Raises:
            ValueError: as :meth:`generate`; or a prompt does not fit into the room.
        """
        self.verifier.check_temperature(settings.temperature)
        if self.target.keeps_state and num_rows > 1:
            self._say(
                f"{self.target.name} keeps a recurrent state: its rows are read one by one, so a batch is no faster than one row"
            )
        recorder = Recorder(settings.eos_token_ids, settings.stop_strings, self.tokenizer, on_tokens, until)
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}; give at least 1")
        waiting = Requests(self.target, prompts, settings, room)
        with evaluating(self.drafter):
            ended = self._decode(waiting, settings, recorder, num_rows, room)
            for request in sorted_as_they_come(ended) if in_order else ended:
                yield request.index, request.generation
        waiting.raise_failure()

    @torch.no_grad()
    def _decode(
        self, waiting: Iterator[Request], settings: GenerationSettings, recorder: Recorder, num_rows: int, room: int
    ) -> Iterator[Request]:
        """The loop: cycle after cycle until no request is left. Gives requests as they end."""
        cycle, runners = self._cycle_for(settings)
        of_cycles = shared(settings)
        prefill = Prefill(cycle, self._prefill_chunk)
        room = self._rounded(room) if cycle.fixed_shapes else room
        batch = self._kept_batch(settings, num_rows, room) if cycle.fixed_shapes else None
        while batch is not None or (requests := list(islice(waiting, num_rows))):
            if batch is None:
                with phase(self.ledger, "prefill"):
                    batch, report = prefill(requests, settings, room)
                yield from self._record(batch, recorder, Flight(report, batch.requests), in_cycle=False)
            # Where a family's state cannot be told apart by rows, requests wait until all rows have ended.
            refills = batch.can_refill()
            if cycle.fixed_shapes and refills and self._kept is None:
                self._kept = (batch, of_cycles, room)
            num_ahead = num_rows // 2 if refills and batch.can_wait() else 0
            admission = Admission(prefill, waiting if refills else iter(()), settings, num_ahead)
            yield from self._refill(batch, admission, recorder, cycle.fixed_shapes)
            flights: deque[Flight] = deque()
            while not batch.has_ended:
                self._read_again(batch)
                run = runners[self.shapes.at(batch.num_alive)]
                report = run(batch, of_cycles, self.ledger)
                flights.append(Flight(report.to_host(), list(batch.requests)))
                if run.runs_ahead and len(flights) == 1:
                    continue  # the device begins the next cycle before the host reads this one
                ended = self._record(batch, recorder, flights.popleft(), in_cycle=True)
                yield from ended
                if batch.idle and (ended or admission.has_more or admission.num_rows):
                    yield from self._refill(batch, admission, recorder, cycle.fixed_shapes)
            batch = None

    def _kept_batch(self, settings: GenerationSettings, num_rows: int, room: int) -> Batch | None:
        """The batch of fixed shapes of an earlier call, all of its rows idle, if it suits this one; its graphs are then used again."""
        if self._kept is None:
            return None
        batch, own_settings, own_room = self._kept
        if own_settings == shared(settings) and len(batch.requests) == num_rows and room <= own_room <= 4 * room:
            batch.requests = [None] * num_rows
            return batch
        self._kept = None  # its memory is free before another takes its place
        return None

    def _rounded(self, room: int) -> int:
        """Room for rows of fixed shapes, in steps that double, so that calls of other lengths need few further graphs."""
        rounded, most = max(64, 1 << (room - 1).bit_length()), self.target.max_positions
        return rounded if most is None else max(room, min(rounded, most))

    def _refill(self, batch: Batch, admission: Admission, recorder: Recorder, fixed_shapes: bool) -> Iterator[Request]:
        """Let requests that wait take the places of those that have ended; places that nobody takes are given up.

        While other rows decode, it reads no more than a chunk of prompt tokens. The rest of a long prompt is read after later cycles, and
        its place is idle until then.
        """
        num_tokens = self._prefill_chunk
        while batch.idle:
            if admission.ready is not None:
                for request in admission.ready.requests[: len(batch.idle)]:
                    assert request is not None
                    request.generation.cycles_before = recorder.num_cycles
                admission.ready = batch.refill(admission.ready)
                continue
            num_tokens = self._prefill_chunk if batch.has_ended else num_tokens
            num_read = admission.begin(len(batch.idle), num_tokens)
            if not num_read:
                break
            num_tokens -= num_read
            with phase(self.ledger, "prefill"):
                started = admission.step()
            if started is not None:
                fresh, report = started
                yield from self._record(fresh, recorder, Flight(report, fresh.requests), in_cycle=False)
                fresh.drop_idle()
                admission.ready = None if fresh.has_ended else fresh
        if not fixed_shapes and not admission.has_more:
            batch.drop_idle(num_spare=admission.num_rows)
        if batch.idle:
            batch.rest()

    def _record(self, batch: Batch, recorder: Recorder, flight: Flight, in_cycle: bool) -> list[Request]:
        """Read a cycle back in one transfer and hand its tokens to the host's records.

        Args:
            batch: the rows.
            recorder: of their requests.
            flight: the cycle, or the reading of the prompts. What it did for requests that had ended already is dropped.
            in_cycle: whether the tokens come from a cycle.

        Returns:
            The requests that have ended with it; their rows are idle.
        """
        ended = []
        report = flight.report
        recorder.num_cycles += in_cycle
        with phase(self.ledger, "host"):
            for row, (count, *cells) in enumerate(report.read()):
                request = flight.requests[row]
                if request is None or request is not batch.requests[row]:
                    continue
                tokens, by_rule = cells[:count], cells[report.num_slots :][:count]
                if BROKEN in tokens:
                    place = f"behind token {batch.host_lengths[row]} of prompt {request.index}"
                    raise not_finite(self.target.name, self.target.dtype, place)
                if in_cycle:
                    batch.host_lengths[row] += count
                    batch.host_fresh[row] = count
                if recorder.add(request, tokens, report.max_depth if in_cycle else None, by_rule):
                    batch.requests[row] = None
                    ended.append(request)
        if self.ledger is not None and in_cycle:
            self.ledger.count(report.num_nodes)
        return ended

    def _read_again(self, batch: Batch) -> None:
        """Cache rows anew whose text now takes other rotary factors; most models never need it."""
        if self.target.rereads_past is None:
            return
        lengths = [
            0 if request is None else length for request, length in zip(batch.requests, batch.host_lengths, strict=True)
        ]
        if self.target.rereads_past not in lengths:
            return
        texts = [[] if each is None else each.prompt + each.generation.token_ids for each in batch.requests]
        with phase(self.ledger, "verify"):
            read_again(self.target, batch.cache, texts, lengths, self.target.device, self._prefill_chunk)

    def _cycle_for(self, settings: GenerationSettings) -> tuple[DecodeCycle, Mapping[DraftLimits | None, Runner]]:
        """A cycle of a request, and what runs the cycle of each shape: op by op where it needs the host."""
        reason = needs_host(self.target, self.drafter, settings) if self._runners else ""
        if self._runners and not reason:
            return next(iter(self._fixed_cycles.values())), self._runners
        if reason:
            self._say(f"cycles run op by op, not compiled: {reason}")
        return next(iter(self._cycles.values())), self._cycles

    def _say(self, text: str) -> None:
        """Warn, once for each text."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=4)


def chain_for(drafter: Drafter | None) -> DraftLimits:
    """What is drafted where nobody says: a chain of 4 tokens, or of as many as the drafter can make."""
    most = None if drafter is None else drafter.max_draft_steps
    return DraftLimits() if most is None else DraftLimits().no_deeper_than(most)


def shared(settings: GenerationSettings) -> GenerationSettings:
    """What of a request's settings a cycle reads; requests that differ in the rest share a compiled cycle."""
    return replace(settings, max_new_tokens=1, seed=0, stop_strings=())


def sorted_as_they_come(requests: Iterable[Request]) -> Iterator[Request]:
    """Requests in the order of their index, each as soon as all before it have ended.

    Args:
        requests: in the order in which they ended; together their indices are 0, 1, 2 and so on.
    """
    waiting: dict[int, Request] = {}
    following = 0
    for request in requests:
        waiting[request.index] = request
        while following in waiting:
            yield waiting.pop(following)
            following += 1
