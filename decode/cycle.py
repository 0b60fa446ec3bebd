"""One cycle of the decoder: draft, verify, accept. A function of tensors, the same for every way of running it.

Owns the order of things within a cycle. Reads nothing from the device and makes no tensor from host data, so a cycle can be compiled or
captured whole where its shapes are fixed. Plain decoding is the same cycle with a tree of one node. Knows no drafter family and no way of
verifying.

Shape legend: B batch rows, N tree nodes, E path slots, C columns of a report, U draws of a cycle, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from draftsmith.decode.batch import Batch
from draftsmith.decode.ledger import Ledger, phase
from draftsmith.decode.sampling import Choices, GenerationSettings, process
from draftsmith.decode.verify.verifier import Reading, Verifier, Walk
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.files.finite import broken_nodes
from draftsmith.models.slots.constants import repeated
from draftsmith.models.slots.row_caches import RowCaches
from draftsmith.models.slots.row_state import write_over
from draftsmith.models.target.target import Target, TargetOutput
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.noise import SharedNoise
from draftsmith.models.tree.search import Draws
from draftsmith.models.tree.tree import DraftTree, root_tree
from draftsmith.models.trunk.forwards import read_tree, within_factors
from draftsmith.models.trunk.riders import RIDERS, Riders

BROKEN = -1
"""In a report, in the place of a token that was chosen by logits that hold NaN or infinity."""


@dataclass(frozen=True)
class CycleReport:
    """What the host reads of a cycle.

    Attributes:
        columns_BC: int64: how many tokens were emitted, E tokens (:data:`BROKEN` where the logits were no numbers) and, with a lossy rule,
            E flags. Rows without a request hold anything.
        num_slots: E.
        max_depth: how deep the draft could be.
        num_nodes: N, padding included.
        done: happens when the columns have arrived on the host; None where nothing copies them in the background.
    """

    columns_BC: Tensor
    num_slots: int
    max_depth: int
    num_nodes: int
    done: torch.cuda.Event | None = None

    def to_host(self) -> CycleReport:
        """Start the copy of the columns to the host, and do not wait for it; :meth:`read` does."""
        device = self.columns_BC.device
        if device.type != "cuda":
            return self
        copied_BC = torch.empty_like(self.columns_BC, device="cpu", pin_memory=True)
        copied_BC.copy_(self.columns_BC, non_blocking=True)
        done = torch.cuda.Event()
        # Without a stream it would be that of the current device, which may be another one.
        done.record(torch.cuda.current_stream(device))
        return replace(self, columns_BC=copied_BC, done=done)

    def read(self) -> list[list[int]]:
        """The columns, once they are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.columns_BC.tolist()


@dataclass(frozen=True)
class DecodeCycle:
    """Drafts, verifies and accepts for the rows of a batch, and moves their state on.

    Attributes:
        target: the frozen model.
        drafter: attached to it; None decodes plainly.
        limits: the most that a cycle of the same batch drafts; its state has room for it.
        verifier: decides what is emitted.
        layers: names of the target's layers that drafter and verifier read.
        shape: what this cycle drafts, within the limits; None drafts nothing, and the drafter's state follows the text.
        fixed_shapes: whether every cycle has the shapes of the others and all state keeps its address. The attention then sees all slots
            of the cache. Otherwise shapes follow the rows' lengths and what was drafted, which is less work.
        slot_step: where shapes are not fixed, the visible slots are a multiple of it.
    """

    target: Target
    drafter: Drafter | None
    limits: DraftLimits
    verifier: Verifier
    layers: tuple[str, ...]
    shape: DraftLimits | None
    fixed_shapes: bool = False
    slot_step: int = 1
    runs_ahead: ClassVar[bool] = False  # see draftsmith.decode.runners.Runner

    @property
    def riders(self) -> Riders | None:
        """What rides behind every node for the drafter: as much as the deepest draft reads."""
        own = None if self.drafter is None else self.drafter.riders
        return None if own is None else own.first(self.limits.draft_length)

    @property
    def num_slots(self) -> int:
        """Slots of the cache that a forward takes at most, for nodes and riders together."""
        riders = self.riders
        return self.limits.max_nodes * (1 if riders is None else 1 + len(riders.entries))

    def __call__(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None = None) -> CycleReport:
        """Run one cycle.

        Args:
            batch: its tensors are updated.
            settings: shared by the rows.
            ledger: where time is charged, or None.

        Returns:
            what was emitted.
        """
        with phase(ledger, "draft"):
            keys_BU = batch.rows.cycle_keys(batch.lengths_B, self.verifier.num_draft_keys + self.verifier.num_walk_keys)
            tree = within_factors(self.target, self._draft(batch, settings, keys_BU), batch.lengths_B)
        with phase(ledger, "verify"):
            ancestors_BNN = tree.ancestors()
            reading = self.reading(batch, tree, ancestors_BNN, self._read(batch, tree, ancestors_BNN), settings)
        with phase(ledger, "accept"):
            steps = self._walk(reading, keys_BU)
            self._advance(batch, steps, reading)
            return self.report(steps, reading)

    def reading(
        self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor, output: TargetOutput, settings: GenerationSettings
    ) -> Reading:
        """What the verifier judges: the target's logits after the request's processors, and its own choices.

        Args:
            batch: the rows.
            tree: the draft.
            ancestors_BNN: bool, ``tree.ancestors()``.
            output: the target's states at the nodes.
            settings: of the rows.
        """
        raw_logits_BNV = self.target.logits(output.normed)
        logits_BNV = batch.rows.process(raw_logits_BNV, tree, ancestors_BNN, settings)
        keys_BP = batch.rows.choice_keys(batch.lengths_B, tree.max_depth + 1)
        return Reading(
            tree,
            ancestors_BNN,
            logits_BNV,
            Choices(logits_BNV, settings, keys_BP, tree.depths_BN),
            output,
            settings.eos_token_ids,
            is_constrained=settings.constraints is not None,
            raw_logits_BNV=raw_logits_BNV,
            inside_BN=self._inside(batch, tree, ancestors_BNN),
        )

    def _inside(self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor) -> Tensor | None:
        """Where the draft is inside a thought, if the verifier asks."""
        marks, inside_B = self.verifier.thoughts, batch.rows.inside_B
        return None if marks is None or inside_B is None else marks.behind_nodes(tree, ancestors_BNN, inside_B)

    def report(self, steps: Walk, reading: Reading) -> CycleReport:
        """What the host reads of a walk, in one tensor.

        Args:
            steps: where verification went.
            reading: what it judged.
        """
        broken_BE = broken_nodes(reading.choices.soundness(), steps.path_BE)
        columns = [steps.counts_B[:, None], steps.emitted_BE.masked_fill(broken_BE, BROKEN)]
        if steps.by_rule_BE is not None:
            columns.append(steps.by_rule_BE.long())
        num_slots = steps.emitted_BE.shape[1]
        return CycleReport(torch.cat(columns, dim=1), num_slots, reading.tree.max_depth, reading.tree.num_nodes)

    def _draft(self, batch: Batch, settings: GenerationSettings, keys_BU: Tensor | None) -> DraftTree:
        if self.drafter is None or batch.draft is None:
            return root_tree(batch.root_B)
        num_rows, most_fresh = len(batch.host_lengths), self.limits.draft_length + 1
        cycle = Cycle(
            batch.lengths_B,
            [batch.room] * num_rows if self.fixed_shapes else batch.host_lengths,
            [most_fresh] * num_rows if self.fixed_shapes else batch.host_fresh,
            None if batch.rows.stop is None else batch.rows.stop.threshold_B,
            self._draws(settings, keys_BU),
            settings.temperature,
            self.verifier.reads_draft_probs,
            self.fixed_shapes,
            self._noise(batch, settings),
        )
        if self.shape is None:
            self._keep_draft(batch, self.drafter.follow(batch.draft, cycle, self.limits))
            return root_tree(batch.root_B)
        return self.drafter.propose(batch.draft, cycle, self.shape)

    def _draws(self, settings: GenerationSettings, keys_BU: Tensor | None) -> Draws | None:
        """What the drafter draws with: the first keys of the cycle, and the request's processors but for the penalty.

        Any distribution is exact to draw from; one like the target's is accepted most.
        """
        if keys_BU is None:
            return None
        return Draws(keys_BU[:, : self.verifier.num_draft_keys], lambda logits: process(logits, settings).softmax(-1))

    def _noise(self, batch: Batch, settings: GenerationSettings) -> SharedNoise | None:
        """The numbers by which the target will draw, for drafts that are not drawn themselves and do not ask for the likeliest tokens."""
        keys_B, shape = batch.rows.choice_keys_B, self.shape
        if (
            keys_B is None
            or shape is None
            or shape.sampled is not None
            or shape.likeliest
            or not self.verifier.shares_noise
        ):
            return None
        return SharedNoise(keys_B, batch.lengths_B, settings.temperature, lambda logits: process(logits, settings))

    def _read(self, batch: Batch, tree: DraftTree, ancestors_BNN: Tensor) -> TargetOutput:
        """One target forward over the packed tree, written behind each row's cached tokens."""
        return read_tree(
            self.target,
            batch.cache,
            tree,
            ancestors_BNN,
            batch.lengths_B,
            batch.host_lengths,
            self.layers,
            self.slot_step,
            self.fixed_shapes,
            self.riders,
        )

    def _walk(self, reading: Reading, keys_BU: Tensor | None) -> Walk:
        """Verify with keys of the cycle that the drafter has not seen."""
        return self.verifier.walk(reading, None if keys_BU is None else keys_BU[:, self.verifier.num_draft_keys :])

    def _advance(self, batch: Batch, steps: Walk, reading: Reading) -> None:
        """Keep the accepted path in the cache and move every row on; idle rows keep their lengths."""
        tree = reading.tree
        if isinstance(batch.cache, RowCaches):
            batch.cache.keep(tree.tokens_BN, steps.counts_B * batch.active_B)
        elif not tree.chain:
            batch.cache.keep(steps.path_BE)
        batch.lengths_B.addcmul_(steps.counts_B, batch.active_B)
        batch.rows.emit(steps.emitted_BE, steps.counts_B, batch.active_B, self.verifier.thoughts)
        batch.rows.steer_stop(tree, steps.counts_B)
        root_B = steps.final_B1.squeeze(1)
        if self.drafter is None or batch.draft is None:
            batch.root_B.copy_(root_B)
            return
        state = batch.draft
        if self.drafter.reads_choices:
            state = self.drafter.take_choices(state, tree, reading.choices.tokens())
        state = self.drafter.advance(state, self._emitted(self.drafter, batch, steps, reading.output))
        if self.fixed_shapes:
            write_over({"root": batch.root_B, "draft": batch.draft}, {"root": root_B, "draft": state})
        else:
            batch.root_B.copy_(root_B)
            batch.draft = state

    def _emitted(self, drafter: Drafter, batch: Batch, steps: Walk, output: TargetOutput) -> Emitted:
        """What the drafter learns of a cycle: all pairs, or the last one of each row."""
        names = (*drafter.features, *([] if self.riders is None else [RIDERS]))
        node_BE, tokens_BE = steps.path_BE, steps.emitted_BE
        one_1 = repeated((1,), (1,), tokens_BE.device)
        if drafter.reads_last_only:
            node_BE, tokens_BE, counts_B = steps.end_B1, steps.final_B1, one_1.expand(len(tokens_BE))
        else:
            # An idle row's length stands still: some token is read into its last slot again and again.
            counts_B = torch.where(batch.active_B, steps.counts_B, one_1)
        features = {}
        for name in names:
            states_BND = output.feature(name)
            features[name] = states_BND.gather(1, node_BE[..., None].expand(-1, -1, states_BND.shape[-1]))
        return Emitted(tokens_BE, features, counts_B)

    def _keep_draft(self, batch: Batch, state: DraftState) -> None:
        if not self.fixed_shapes:
            batch.draft = state
        elif state is not batch.draft:
            write_over(batch.draft, state)
