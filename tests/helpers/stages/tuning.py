"""What tests of the search for a draft shape share: prompts, a drafter that is often right, costs that are easy to follow.

Shape legend: B batch rows, M nodes of a layer.
"""

from __future__ import annotations

import torch
from doubles import BOS, VOCAB, HistoryState, PlannedDrafter
from torch import Tensor

from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.tune.costs import Cost, Costs
from draftsmith.models import Cycle, Drafter, DraftLimits, Target
from draftsmith.models.tree.search import Expander

SAMPLES = [
    Sample("a", "s", (BOS, 5, 9, 11, 4)),
    Sample("b", "s", (BOS, 7)),
    Sample("c", "s", (BOS, 8, 8, 8, 30, 31)),
    Sample("d", "s", (BOS, 20, 21)),
]


class NoisyOracle(PlannedDrafter):
    """Continues nodes with the target's own logits and noise on top: right now and then, at any depth, and the same for one text."""

    propose = Drafter.propose  # type: ignore[assignment]

    def __init__(self, target: Target, noise: float = 0.7) -> None:
        super().__init__(target, "oracle")
        self.target, self.noise = target, noise

    def expander(self, state: HistoryState, cycle: Cycle, limits: DraftLimits) -> Expander:  # type: ignore[override]
        return NoisyExpander(self.target, self.noise, state.texts)


class NoisyExpander:
    """See :class:`NoisyOracle`."""

    def __init__(self, target: Target, noise: float, texts: list[list[int]]) -> None:
        self.root_B = torch.tensor([text[-1] for text in texts])
        self._target, self._noise = target, noise
        self._texts = [[text] for text in texts]

    def begin(self) -> Tensor:
        return torch.stack([self._logits(texts) for texts in self._texts])

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        self._texts = [
            [texts[above] + [token] for token, above in zip(tokens, aboves, strict=True)]
            for texts, tokens, aboves in zip(self._texts, tokens_BM.tolist(), above_BM.tolist(), strict=True)
        ]
        return self.begin()

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids

    def _logits(self, texts: list[list[int]]) -> Tensor:
        logits_MV = self._target.model(input_ids=torch.tensor(texts), use_cache=False).logits[:, -1]
        seeds = [hash(tuple(text[-4:])) % 2**31 for text in texts]
        noise = [torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return logits_MV + self._noise * torch.stack(noise)


def flat_costs(shapes: list[DraftLimits]) -> Costs:
    """Drafting a level costs a tenth of a plain step, checking nothing more than it."""
    whole = {limits: Cost(0.1 * limits.draft_length, 1.0) for limits in shapes if limits.node_budget is None}
    sizes = {(limits.beam_width, limits.draft_length) for limits in shapes if limits.node_budget is not None}
    return Costs(1.0, 0.0, whole, {size: 0.1 * size[1] for size in sizes}, {1: 1.0, 99: 1.0})
