"""The decoder: draft, verify, accept, record, until every row has ended.

Owns the loop and the order of things. Plain decoding is the same loop with a tree of one node. Knows no drafter family and no way of
verifying: what a drafter proposes goes through a :class:`~draftsmith.decode.verify.verifier.Verifier`, which alone decides what is
emitted.

Inside a cycle the host waits for the device once, in :meth:`Engine._record`, to read what was emitted.

Shape legend: B batch rows, N tree nodes, E path slots, T prompt tokens, S cache slots, U draws of a cycle, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from draftsmith.decode.batch import Batch, Generation, Recorder
from draftsmith.decode.ledger import Ledger, phase
from draftsmith.decode.processors import RequestText, processors_of
from draftsmith.decode.rows import Rows, seen_tokens
from draftsmith.decode.sampling import GenerationSettings, choose, process
from draftsmith.decode.verify.choice import verifier_for
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.models.drafters.drafter import Cycle, Drafter, Emitted, Opening
from draftsmith.models.evaluating import evaluating
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.finite import broken_rows, not_finite
from draftsmith.models.target.target import PRE_NORM, Target, TargetOutput
from draftsmith.models.tree.early_stop import StopState
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.noise import request_keys
from draftsmith.models.tree.search import Draws
from draftsmith.models.tree.slot_cache import SlotCache
from draftsmith.models.tree.tree import DraftTree, root_tree
from draftsmith.models.trunk.forwards import CHUNK, read_again, read_prompts, read_tree, within_factors


class Engine:
    """Decodes with one target and, if given, one drafter: losslessly, unless a LOSSY rule is given too.

    Args:
        target: the frozen model.
        drafter: proposes; None decodes plainly. It stays as it is: several engines can share one.
        limits: how much to draft a cycle.
        tokenizer: needed for stop strings only; must be the drafter's.
        ledger: where time is charged, or None.
        prefill_chunk: prompt tokens a forward, which bounds the memory of long prompts.
        rule: keeps draft tokens that the target would not have chosen; the text is then no longer the target's own.

    Attributes:
        drafter: a view of the drafter that is attached to the target; None in plain decoding.
        verifier: decides what is emitted.

    Raises:
        ValueError: the drafter or the rule belongs to another target or tokenizer, the rule cannot verify such drafts, or nothing drafts
            for it.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        limits: DraftLimits | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ledger: Ledger | None = None,
        prefill_chunk: int = CHUNK,
        rule: LossyRule | None = None,
    ) -> None:
        self.target = target
        self.limits = limits or DraftLimits()
        self.tokenizer = tokenizer
        self.ledger = ledger
        self.verifier = verifier_for(target, None if drafter is None else self.limits, rule)
        self.drafter = None if drafter is None else drafter.bound(target.ends)
        self._prefill_chunk = prefill_chunk
        # On a GPU the visible slots grow in steps, so that few shapes occur and graphs can be captured.
        self._slot_step = 64 if target.device.type == "cuda" else 1
        features = () if self.drafter is None else self.drafter.features
        self._layers = tuple(dict.fromkeys((*features, *self.verifier.layers)))
        if tokenizer is not None:
            fingerprint = tokenizer_fingerprint(tokenizer)
            if self.drafter is not None:
                self.drafter.check_tokenizer(fingerprint)
            self.verifier.check_tokenizer(fingerprint)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        settings: GenerationSettings,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        request_ids: list[int] | None = None,
        until: Callable[[int, list[int]], bool] | None = None,
    ) -> list[Generation]:
        """Decode a batch of prompts of any lengths.

        Args:
            prompts: token ids, one list a request.
            settings: shared by the batch.
            on_tokens: called with (index of the prompt, tokens) as soon as tokens are final.
            request_ids: which noise each prompt draws; its index by default.
            until: called with (index of the prompt, its reply so far) for every token in turn; True ends the reply with that token.

        Returns:
            one record a prompt, in their order.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context, ids outside the vocabulary, sampled trees at
                temperature 0, or logits that turn into NaN or infinity.
        """
        self.verifier.check_temperature(settings.temperature)
        self._check(prompts)
        context = self.target.max_positions or 2**62
        budgets = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
        recorder = Recorder(budgets, settings.eos_token_ids, settings.stop_strings, self.tokenizer, on_tokens, until)
        if not prompts:
            return []
        numbers = list(range(len(prompts))) if request_ids is None else request_ids
        if len(numbers) != len(prompts):
            raise ValueError(f"there are {len(numbers)} request_ids for {len(prompts)} prompts; give one each")
        with evaluating(self.drafter):
            self._decode(prompts, settings, numbers, recorder)
        return recorder.generations

    def _decode(
        self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int], recorder: Recorder
    ) -> None:
        """The loop: cycle after cycle until every row has ended."""
        with phase(self.ledger, "prefill"):
            batch = self._prefill(prompts, settings, request_ids, recorder)
        while batch.requests:
            with phase(self.ledger, "draft"):
                tree = within_factors(self.target, self._draft(batch, settings), batch.lengths_B)
            with phase(self.ledger, "verify"):
                if self.target.rereads_past in batch.host_lengths:
                    self._read_again(batch, prompts, recorder)
                ancestors_BNN = tree.ancestors()
                reading = self._reading(batch, tree, ancestors_BNN, self._read(batch, tree, ancestors_BNN), settings)
            with phase(self.ledger, "accept"):
                steps = self._walk(batch, reading)
                self._advance(batch, tree, steps, reading.output)
            with phase(self.ledger, "host"):
                self._record(batch, recorder, steps, reading.logits_BNV, tree.max_depth)
            if self.ledger is not None:
                self.ledger.count(tree.num_nodes)

    def _draft(self, batch: Batch, settings: GenerationSettings) -> DraftTree:
        if self.drafter is None or batch.draft is None:
            return root_tree(batch.root_B)
        cycle = Cycle(
            batch.lengths_B,
            batch.host_lengths,
            batch.host_fresh,
            None if batch.rows.stop is None else batch.rows.stop.threshold_B,
            self._draws(batch, settings),
            settings.temperature,
            self.verifier.reads_draft_probs,
        )
        return self.drafter.propose(batch.draft, cycle, self.limits)

    def _draws(self, batch: Batch, settings: GenerationSettings) -> Draws | None:
        """What the drafter draws with: the first keys of the cycle, and the request's processors but for the penalty.

        Any distribution is exact to draw from; one like the target's is accepted most.
        """
        keys_BU = batch.rows.cycle_keys(0, self.verifier.num_draft_keys)
        if keys_BU is None:
            return None
        return Draws(keys_BU, lambda logits: process(logits, settings).softmax(-1))

    def _read(self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor) -> TargetOutput:
        """One target forward over the packed tree, written behind each row's cached tokens."""
        return read_tree(
            self.target,
            batch.cache,
            tree,
            ancestors_BNN,
            batch.lengths_B,
            batch.host_lengths,
            self._layers,
            self._slot_step,
        )

    def _read_again(self, batch: Batch, prompts: list[list[int]], recorder: Recorder) -> None:
        """Cache rows anew whose text now takes other rotary factors."""
        texts = [prompts[request] + recorder.generations[request].token_ids for request in batch.requests]
        read_again(self.target, batch.cache, texts, batch.host_lengths, self.target.device, self._prefill_chunk)

    def _reading(
        self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor, output: TargetOutput, settings: GenerationSettings
    ) -> Reading:
        """What the verifier judges: the target's logits after the request's processors, and its own choices."""
        logits_BNV = batch.rows.process(self.target.logits(output.normed), tree, ancestors_BNN, settings)
        keys_BP = batch.rows.choice_keys(tree.max_depth + 1)
        return Reading(
            tree,
            ancestors_BNN,
            logits_BNV,
            lambda: choose(logits_BNV, settings, keys_BP, tree.depths_BN),
            output,
            settings.eos_token_ids,
            is_constrained=settings.constraints is not None,
        )

    def _walk(self, batch: Batch, reading: Reading) -> Walk:
        """Verify with keys of the cycle that the drafter has not seen."""
        return self.verifier.walk(
            reading, batch.rows.cycle_keys(self.verifier.num_draft_keys, self.verifier.num_walk_keys)
        )

    def _advance(self, batch: Batch, tree: DraftTree, steps: Walk, output: TargetOutput) -> None:
        """Compact the accepted path in the cache and move every row's root; rows that end are retired right after."""
        if not tree.chain:
            place_E = torch.arange(steps.path_BE.shape[1], device=steps.path_BE.device)
            batch.cache.move(batch.lengths_B[:, None] + steps.path_BE, batch.lengths_B[:, None] + place_E)
        batch.lengths_B = batch.lengths_B + steps.counts_B
        batch.root_B = steps.emitted_BE.gather(1, steps.counts_B[:, None] - 1).squeeze(1)
        batch.rows.emit(steps.emitted_BE, steps.counts_B)
        batch.rows.steer_stop(tree, steps.counts_B)
        if self.drafter is not None and batch.draft is not None:
            features = {
                name: output.feature(name).gather(1, steps.path_BE[..., None].expand(-1, -1, output.normed.shape[-1]))
                for name in self.drafter.features
            }
            batch.draft = self.drafter.advance(batch.draft, Emitted(steps.emitted_BE, features, steps.counts_B))

    def _record(self, batch: Batch, recorder: Recorder, steps: Walk, logits_BNV: Tensor, drafted: int | None) -> None:
        """Read the cycle back in one transfer, hand tokens to the host's records and retire the rows that ended."""
        keep = []
        broken_B = broken_rows(logits_BNV, steps.path_BE, steps.counts_B)
        columns = [broken_B[:, None].long(), steps.counts_B[:, None], steps.emitted_BE]
        if steps.by_rule_BE is not None:
            columns.append(steps.by_rule_BE.long())
        for row, (broken, count, *cells) in enumerate(torch.cat(columns, dim=1).tolist()):
            if broken:
                place = f"behind token {batch.host_lengths[row]} of prompt {batch.requests[row]}"
                raise not_finite(self.target.name, self.target.dtype, place)
            if drafted is not None:
                batch.host_lengths[row] += count
                batch.host_fresh[row] = count
            by_rule = cells[steps.emitted_BE.shape[1] :][:count]
            if not recorder.add(batch.requests[row], cells[:count], drafted, by_rule):
                keep.append(row)
        batch.retire(keep)

    def _prefill(
        self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int], recorder: Recorder
    ) -> Batch:
        """Cache the prompts, choose each row's first token and start the drafter."""
        host_lengths = [len(prompt) for prompt in prompts]
        longest = max(host_lengths)
        tokens_BT = torch.tensor(
            [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.target.device
        )
        lengths_B = torch.tensor(host_lengths, device=self.target.device)
        room = longest + settings.max_new_tokens
        batch = Batch(
            requests=list(range(len(prompts))),
            cache=SlotCache(room + self.limits.max_nodes + self._slot_step, self.target.config.num_hidden_layers),
            lengths_B=lengths_B,
            host_lengths=list(host_lengths),
            host_fresh=list(host_lengths),
            root_B=tokens_BT[:, 0],
            rows=self._rows(prompts, tokens_BT, lengths_B, settings, request_ids, recorder),
        )
        layers = tuple({PRE_NORM, *self._layers})
        states = read_prompts(
            self.target, batch.cache, tokens_BT, lengths_B, layers, self._prefill_chunk, self._slot_step
        )
        reading = self._reading_of_prompts(batch, states[PRE_NORM], settings)
        steps = self.verifier.walk(reading, None)
        batch.root_B = steps.emitted_BE[:, 0]
        batch.rows.emit(steps.emitted_BE, steps.counts_B)
        if self.drafter is not None:
            emitted_BE = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1)
            emitted_BE = emitted_BE.scatter_(1, lengths_B[:, None] - 1, steps.emitted_BE)
            pairs = Emitted(emitted_BE, {name: states[name] for name in self.drafter.features}, lengths_B)
            batch.draft = self.drafter.start(Opening(pairs, tokens_BT[:, 0], self.limits, room))
        self._record(batch, recorder, steps, reading.logits_BNV, drafted=None)
        return batch

    def _reading_of_prompts(self, batch: Batch, pre_norm_BTD: Tensor, settings: GenerationSettings) -> Reading:
        """What the target says behind each prompt, as a draft of one node."""
        last_B11 = (batch.lengths_B - 1)[:, None, None]
        last_B1D = pre_norm_BTD.gather(1, last_B11.expand(-1, -1, pre_norm_BTD.shape[-1]))
        output = TargetOutput(last_B1D, self.target.ends.final_norm(last_B1D))
        root = root_tree(batch.root_B)
        return self._reading(batch, root, root.ancestors(), output, settings)

    def _rows(
        self,
        prompts: list[list[int]],
        tokens_BT: Tensor,
        lengths_B: Tensor,
        settings: GenerationSettings,
        request_ids: list[int],
        recorder: Recorder,
    ) -> Rows:
        """What each request and the verifier need, before the first token."""
        rows = Rows(torch.zeros_like(lengths_B))
        device = lengths_B.device
        if settings.temperature > 0.0:
            rows.choice_keys_B = request_keys(settings.seed, request_ids, "choices", device)
        if self.verifier.num_draft_keys > 0:
            rows.cycle_keys_B = request_keys(settings.seed, request_ids, "cycles", device)
        if settings.constraints is not None:
            rows.texts = self._texts(prompts, settings, recorder)
        elif settings.repetition_penalty != 1.0:
            rows.seen_BV = seen_tokens(tokens_BT, lengths_B, self.target.ends.vocab_size)
        if self.drafter is not None and self.limits.early_stop is not None:
            rows.stop = StopState.begin(self.limits.early_stop, self.limits.draft_length, len(prompts), device)
        return rows

    def _texts(self, prompts: list[list[int]], settings: GenerationSettings, recorder: Recorder) -> list[RequestText]:
        """What constraints read of each request; its processors include the penalty and the warpers."""
        texts, vocab_size = [], self.target.ends.vocab_size
        for prompt, budget, generation in zip(prompts, recorder.budgets, recorder.generations, strict=True):
            processors = processors_of(settings, prompt, budget, vocab_size, self.target.device)
            texts.append(RequestText(prompt, processors, generation.token_ids))
        return texts

    def _check(self, prompts: list[list[int]]) -> None:
        context = self.target.max_positions
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; give at least one token (a BOS token, for instance)")
            if context is not None and len(prompt) >= context:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, the context of {self.target.name} is {context} and needs room for a reply; "
                    "shorten the prompt"
                )
            if min(prompt) < 0 or max(prompt) >= self.target.ends.vocab_size:
                wrong = next(token for token in prompt if not 0 <= token < self.target.ends.vocab_size)
                raise ValueError(
                    f"prompt {index} holds token id {wrong}, the vocabulary of {self.target.name} ends at "
                    f"{self.target.ends.vocab_size - 1}; is the tokenizer the target's?"
                )
