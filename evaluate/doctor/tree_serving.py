"""Does the drafter say in a tree what it says in a chain? Every drafted node against the same tokens drafted one after another.

Owns the comparison that `train-serve` adds for trees: it finds a family that takes a node's share from the wrong node above it. Does not
know engines or verification.

Shape legend: M nodes of one call, Vd draft vocabulary; E tokens of a text, K riders of each, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.evaluate.doctor.case import NotChecked
from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.registry import default_limits
from draftsmith.models.drafters.returned_shapes import checked_expander
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander, search
from draftsmith.models.trunk.riders import RIDERS
from draftsmith.models.trunk.text_riders import ride_behind


@dataclass
class RecordedDraft:
    """An expander that passes every call to another one and keeps what went in and out.

    Attributes:
        inner: the expander that continues the nodes.
        logits: [M, Vd] of each call.
        tokens: int64 [M] of each call after the first.
        above: the node of the call before, of each node of each call after the first.
    """

    inner: Expander
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    above: list[list[int]] = field(default_factory=list)

    @property
    def root_B(self) -> Tensor:
        """See :class:`Expander`."""
        return self.inner.root_B

    def begin(self) -> Tensor:
        """See :class:`Expander`."""
        return self._kept(self.inner.begin())

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`."""
        self.tokens.append(tokens_BM[0].clone())
        self.above.append(above_BM[0].tolist())
        return self._kept(self.inner.extend(tokens_BM, above_BM))

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """See :class:`Expander`."""
        return self.inner.target_ids(draft_ids)

    def chain_to(self, call: int, node: int) -> list[Tensor]:
        """The tokens from the first drafted one to a node, int64 [] each; ``call`` counts the calls of :meth:`extend` from 0."""
        chain: list[Tensor] = []
        for depth in range(call, -1, -1):
            chain.insert(0, self.tokens[depth][node])
            node = self.above[depth][node]
        return chain

    def _kept(self, logits_BMV: Tensor) -> Tensor:
        self.logits.append(logits_BMV[0].clone())
        return logits_BMV


@torch.no_grad()
def tree_and_chain_logits(drafter: Drafter, batch: PackedBatch, root: int) -> tuple[Tensor, Tensor]:
    """float32 [N, Vd] twice: behind every node that a tree continues, and behind the same tokens drafted as a chain.

    The tree has the drafter's usual shape, or a small dynamic one where that is a chain.

    Args:
        drafter: attached.
        batch: one sample.
        root: the position whose token the tree hangs on, at least 1.
    """
    # Where the family names no shape it drafts chains, which have no branches to compare.
    limits = default_limits(drafter, DraftLimits(min(3, len(drafter.draft_ids())), 4, node_budget=8))
    recorded = RecordedDraft(_draft(drafter, batch, root, limits))
    search(recorded, None, limits)
    in_tree, in_chain = [recorded.logits[0][0]], [_draft(drafter, batch, root, limits).begin()[0, 0]]
    for call, above in enumerate(recorded.above):
        for node in range(len(above)):
            in_tree.append(recorded.logits[call + 1][node])
            in_chain.append(_behind(_draft(drafter, batch, root, limits), recorded.chain_to(call, node)))
    return torch.stack(in_tree).float(), torch.stack(in_chain).float()


def _draft(drafter: Drafter, batch: PackedBatch, root: int, limits: DraftLimits) -> Expander:
    """A new draft behind the text up to a root; each has a state of its own."""
    ids, device = batch.input_ids, batch.input_ids.device
    states = {name: batch.hidden[name][None, :root] for name in drafter.features}
    if drafter.riders is not None:
        states[RIDERS] = riding(drafter, batch, torch.arange(root, device=device), limits.draft_length)
    prompt = Emitted(ids[None, 1 : root + 1], states, torch.tensor([root], device=device))
    state = drafter.start(Opening(prompt, ids[:1], limits, room=len(ids) + limits.draft_length))
    return checked_expander(drafter, state, Cycle(torch.tensor([root], device=device), [root], [root]), limits)


def _behind(draft: Expander, tokens: list[Tensor]) -> Tensor:
    """[Vd]: what follows a chain of tokens."""
    logits_BMV = draft.begin()
    for token in tokens:
        token_BM = token[None, None]
        logits_BMV = draft.extend(token_BM, torch.zeros_like(token_BM))
    return logits_BMV[0, 0]


def riding(drafter: Drafter, batch: PackedBatch, anchors: Tensor, num_steps: int) -> Tensor:
    """[1, E, K D]: what rides through the target's forward behind tokens of a text.

    Args:
        drafter: attached to a whole target's ends.
        batch: the text.
        anchors: int64 [E], the tokens.
        num_steps: K, of the draft.

    Raises:
        NotChecked: only the target's ends are loaded.
    """
    trunk, riders = drafter.ends.trunk, drafter.riders
    if trunk is None or riders is None:
        raise NotChecked("this drafter drafts through the target's own blocks: leave --ends-only and --device-map out")
    states = ride_behind(trunk, riders.first(num_steps), batch.input_ids, batch.positions, batch.document_ids, anchors)
    return states.transpose(0, 1).flatten(1)[None]
