"""The decoder: draft, verify, accept, record, until every row has ended.

Owns the loop and the order of things. Plain decoding is the same loop with a tree of one node. Knows no drafter family: what a
drafter proposes goes through `verify/lossless.py`, or `verify/candidates.py` where it was sampled, which alone
decide what is emitted.

Inside a cycle the host waits for the device once, in :meth:`Engine._record`, to read what was emitted.

Shape legend: B batch rows, N tree nodes, E path slots, T prompt tokens, S cache slots, P output positions, U draws of a cycle, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from draftsmith.decode.batch import Batch, Generation, Recorder
from draftsmith.decode.early_stop import StopState
from draftsmith.decode.ledger import Ledger, phase
from draftsmith.decode.processors import RequestText, process_texts, processors_of
from draftsmith.decode.sampling import GenerationSettings, choose, process
from draftsmith.decode.verify.candidates import candidate_walk, num_draws
from draftsmith.decode.verify.lossless import Walk, walk
from draftsmith.decode.verify.lossy_rule import LossyRule, of_tokens
from draftsmith.decode.verify.lossy_walk import LossyWalk, lossy_walk
from draftsmith.models.drafters.drafter import Cycle, Drafter, Emitted, Opening
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.finite import broken_rows, not_finite
from draftsmith.models.target.target import PRE_NORM, Target, TargetOutput
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
        drafter: proposes; None decodes plainly.
        limits: how much to draft a cycle.
        tokenizer: needed for stop strings only; must be the drafter's.
        ledger: where time is charged, or None.
        prefill_chunk: prompt tokens a forward, which bounds the memory of long prompts.
        rule: lets draft tokens stand that the target would not have chosen; the text is then no longer the target's own.

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
        self.drafter = drafter
        self.limits = limits or DraftLimits()
        self.tokenizer = tokenizer
        self.ledger = ledger
        self.rule = rule
        self._prefill_chunk = prefill_chunk
        # On a GPU the visible slots grow in steps, so that few shapes occur and graphs can be captured.
        self._slot_step = 64 if target.device.type == "cuda" else 1
        self._layers: tuple[str, ...] = ()
        if rule is not None:
            self._bind(rule)
        if drafter is not None:
            drafter.attach(target.ends)
            self._layers = tuple(dict.fromkeys((*drafter.features, *self._layers)))
        if tokenizer is not None:
            fingerprint = tokenizer_fingerprint(tokenizer)
            for part in (drafter, rule):
                if part is not None:
                    part.check_tokenizer(fingerprint)

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

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context, ids outside the vocabulary, sampled trees at
                temperature 0, or logits that turn into NaN or infinity.
        """
        self._check(prompts, settings)
        context = self.target.max_positions or 2**62
        budgets = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
        recorder = Recorder(budgets, settings.eos_token_ids, settings.stop_strings, self.tokenizer, on_tokens, until)
        if not prompts:
            return []
        numbers = list(range(len(prompts))) if request_ids is None else request_ids
        if len(numbers) != len(prompts):
            raise ValueError(f"there are {len(numbers)} request_ids for {len(prompts)} prompts; give one each")
        with phase(self.ledger, "prefill"):
            batch = self._prefill(prompts, settings, numbers, recorder)
        while batch.requests:
            with phase(self.ledger, "draft"):
                tree = within_factors(self.target, self._draft(batch, settings), batch.lengths_B)
            with phase(self.ledger, "verify"):
                if self.target.rereads_past in batch.host_lengths:
                    self._read_again(batch, prompts, recorder)
                ancestors_BNN = tree.ancestors()
                output = self._verify(batch, tree, ancestors_BNN)
                logits_BNV = self._processed(batch, tree, ancestors_BNN, output, settings)
            with phase(self.ledger, "accept"):
                steps = self._walk(batch, tree, ancestors_BNN, logits_BNV, output, settings)
                self._advance(batch, tree, steps, output)
            with phase(self.ledger, "host"):
                self._record(batch, recorder, steps, logits_BNV, tree.max_depth)
            if self.ledger is not None:
                self.ledger.count(tree.num_nodes)
        return recorder.generations

    def _bind(self, rule: LossyRule) -> None:
        if self.drafter is None:
            raise ValueError(
                f"the rule {rule} lets draft tokens stand, and nothing drafts; give a drafter, or leave the rule out"
            )
        if self.limits.sampled is not None:
            raise ValueError(
                f"a sampled tree is verified by rejection, which has no place for the rule {rule}; draft with beams, a dynamic or a static "
                "tree, or leave the rule out"
            )
        if rule.reads_draft and (self.limits.beam_width != 1 or self.limits.paths is not None):
            raise ValueError(
                f"the rule {rule} compares the distributions of draft and target, which only chains keep; draft a chain such as 1x16"
            )
        rule.attach(self.target)
        self._layers = rule.features

    def _draft(self, batch: Batch, settings: GenerationSettings) -> DraftTree:
        if self.drafter is None or batch.draft is None:
            return root_tree(batch.root_B)
        cycle = Cycle(
            batch.lengths_B,
            batch.host_lengths,
            batch.host_fresh,
            None if batch.stop is None else batch.stop.threshold_B,
            self._draws(batch, settings),
            settings.temperature,
            self.rule is not None and self.rule.reads_draft,
        )
        return self.drafter.propose(batch.draft, cycle, self.limits)

    def _draws(self, batch: Batch, settings: GenerationSettings) -> Draws | None:
        """For a sampled tree: the first keys of the cycle, and the request's processors but for the penalty.

        Any distribution is exact to draw from; one like the target's is accepted most.
        """
        keys_BU = batch.cycle_keys(self.limits.max_nodes - 1)
        if keys_BU is None:
            return None
        return Draws(keys_BU, lambda logits: process(logits, settings).softmax(-1))

    def _verify(self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor) -> TargetOutput:
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

    def _processed(
        self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor, output: TargetOutput, settings: GenerationSettings
    ) -> Tensor:
        """The target's logits at every node after the request's processors, float32 [B, N, V]."""
        if batch.texts is not None:
            return process_texts(self.target.logits(output.normed), tree, batch.texts)
        seen_BNV = None
        if batch.seen_BV is not None:
            seen_BNV = batch.seen_BV[:, None].repeat(1, tree.num_nodes, 1)
            own_BNN = tree.tokens_BN[:, None, :].expand_as(ancestors_BNN)
            # A node that is no ancestor contributes the root's token, which every node has seen.
            seen_BNV.scatter_(2, torch.where(ancestors_BNN, own_BNN, tree.tokens_BN[:, :1, None]), True)
        return process(self.target.logits(output.normed), settings, seen_BNV)

    def _choose(self, batch: Batch, tree: DraftTree, logits_BNV: Tensor, settings: GenerationSettings) -> Tensor:
        """The target's chosen next token at every node, int64 [B, N]."""
        return choose(logits_BNV, settings, batch.next_keys(tree.max_depth + 1), tree.depths_BN)

    def _walk(
        self,
        batch: Batch,
        tree: DraftTree,
        ancestors_BNN: Tensor,
        logits_BNV: Tensor,
        output: TargetOutput,
        settings: GenerationSettings,
    ) -> Walk:
        """Rejection of candidates in a sampled tree, the target's own choices in any other; beside them what a lossy rule allows."""
        sampled = self.limits.sampled
        keys_BU = None if sampled is None else batch.cycle_keys(self.limits.max_nodes - 1 + num_draws(sampled))
        if tree.draft_probs_BMV is None or keys_BU is None or sampled is None:
            choices_BN = self._choose(batch, tree, logits_BNV, settings)
            if self.rule is None or tree.num_nodes == 1:
                return walk(tree, ancestors_BNN, choices_BN)
            allowed_BN = self.rule.allows(tree, logits_BNV, output)
            # What the model's maker forbids never stands, and that a reply ends is for the target to say.
            if batch.texts is not None:
                allowed_BN = allowed_BN & (of_tokens(tree, logits_BNV) > torch.finfo(logits_BNV.dtype).min)
            for token in settings.eos_token_ids:
                allowed_BN = allowed_BN & (tree.tokens_BN != token)
            return lossy_walk(tree, choices_BN, allowed_BN)
        unseen_BU = keys_BU[:, self.limits.max_nodes - 1 :]
        return candidate_walk(tree, sampled, logits_BNV.softmax(-1), unseen_BU)

    def _advance(self, batch: Batch, tree: DraftTree, steps: Walk, output: TargetOutput) -> None:
        """Compact the accepted path in the cache and move every row's root; rows that end are retired right after."""
        if not tree.chain:
            place_E = torch.arange(steps.path_BE.shape[1], device=steps.path_BE.device)
            batch.cache.move(batch.lengths_B[:, None] + steps.path_BE, batch.lengths_B[:, None] + place_E)
        batch.lengths_B = batch.lengths_B + steps.counts_B
        batch.num_emitted_B = batch.num_emitted_B + steps.counts_B
        batch.root_B = steps.emitted_BE.gather(1, steps.counts_B[:, None] - 1).squeeze(1)
        if batch.seen_BV is not None:
            place_E = torch.arange(steps.emitted_BE.shape[1], device=steps.emitted_BE.device)
            real_BE = torch.where(place_E < steps.counts_B[:, None], steps.emitted_BE, batch.root_B[:, None])
            batch.seen_BV.scatter_(1, real_BE, True)
        if batch.stop is not None:
            batch.stop = batch.stop.after(tree, steps.counts_B)
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
        if isinstance(steps, LossyWalk):
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
        self,
        prompts: list[list[int]],
        settings: GenerationSettings,
        request_ids: list[int],
        recorder: Recorder,
    ) -> Batch:
        """Cache the prompts, choose each row's first token and start the drafter."""
        device = self.target.device
        host_lengths = [len(prompt) for prompt in prompts]
        longest = max(host_lengths)
        tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        lengths_B = torch.tensor(host_lengths, device=device)
        room = longest + settings.max_new_tokens
        batch = Batch(
            requests=list(range(len(prompts))),
            cache=SlotCache(room + self.limits.max_nodes + self._slot_step, self.target.config.num_hidden_layers),
            lengths_B=lengths_B,
            host_lengths=list(host_lengths),
            host_fresh=list(host_lengths),
            root_B=tokens_BT[:, 0],
            num_emitted_B=torch.zeros_like(lengths_B),
            keys_B=request_keys(settings.seed, request_ids, "choices", device) if settings.temperature > 0.0 else None,
            cycle_keys_B=request_keys(settings.seed, request_ids, "cycles", device) if self._samples_trees else None,
            seen_BV=self._seen(tokens_BT, lengths_B, settings),
            texts=self._texts(prompts, settings, recorder),
        )
        layers = tuple({PRE_NORM, *self._layers})
        states = read_prompts(
            self.target, batch.cache, tokens_BT, lengths_B, layers, self._prefill_chunk, self._slot_step
        )
        last_B1 = lengths_B[:, None] - 1
        last_normed_B1D = self.target.ends.final_norm(
            states[PRE_NORM].gather(1, last_B1[..., None].expand(-1, -1, states[PRE_NORM].shape[-1]))
        )
        first = root_tree(batch.root_B)
        output = TargetOutput(states[PRE_NORM], last_normed_B1D)
        seen_ancestors = torch.zeros(len(prompts), 1, 1, dtype=torch.bool, device=device)
        logits_B1V = self._processed(batch, first, seen_ancestors, output, settings)
        choices_B1 = self._choose(batch, first, logits_B1V, settings)
        steps = Walk(torch.zeros_like(choices_B1), choices_B1, torch.ones_like(lengths_B))
        batch.root_B = choices_B1[:, 0]
        batch.num_emitted_B = steps.counts_B
        if batch.seen_BV is not None:
            batch.seen_BV.scatter_(1, choices_B1, True)
        if self.drafter is not None:
            emitted_BE = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1).scatter_(1, last_B1, choices_B1)
            pairs = Emitted(emitted_BE, {name: states[name] for name in self.drafter.features}, lengths_B)
            batch.draft = self.drafter.start(Opening(pairs, tokens_BT[:, 0], self.limits, room))
            if self.limits.early_stop is not None:
                batch.stop = StopState.begin(self.limits.early_stop, self.limits.draft_length, len(prompts), device)
        self._record(batch, recorder, steps, logits_B1V, drafted=None)
        return batch

    @property
    def _samples_trees(self) -> bool:
        return self.drafter is not None and self.limits.sampled is not None

    def _seen(self, tokens_BT: Tensor, lengths_B: Tensor, settings: GenerationSettings) -> Tensor | None:
        if settings.repetition_penalty == 1.0 or settings.constraints is not None:
            return None
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        real_BT = torch.where(place_T < lengths_B[:, None], tokens_BT, tokens_BT[:, :1])
        seen_BV = torch.zeros(
            tokens_BT.shape[0], self.target.ends.vocab_size, dtype=torch.bool, device=tokens_BT.device
        )
        return seen_BV.scatter_(1, real_BT, True)

    def _texts(
        self, prompts: list[list[int]], settings: GenerationSettings, recorder: Recorder
    ) -> list[RequestText] | None:
        """What constraints read of each request; its processors include the penalty and the warpers."""
        if settings.constraints is None:
            return None
        found, vocab_size = [], self.target.ends.vocab_size
        for prompt, budget, generation in zip(prompts, recorder.budgets, recorder.generations, strict=True):
            processors = processors_of(settings, prompt, budget, vocab_size, self.target.device)
            found.append(RequestText(prompt, processors, generation.token_ids))
        return found

    def _check(self, prompts: list[list[int]], settings: GenerationSettings) -> None:
        if self._samples_trees and settings.temperature == 0.0:
            raise ValueError(
                "temperature is 0 and the draft tree is sampled; rejection needs a distribution to sample from: give a temperature above "
                "0, or draft with beams, a dynamic or a static tree"
            )
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
