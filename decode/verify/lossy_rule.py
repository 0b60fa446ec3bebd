"""What a LOSSY rule is: whoever says of each draft token whether it may stand although the target would have chosen another.

Owns the interface that the engine asks. Knows no rule.

Shape legend: B batch rows, N tree nodes, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from draftsmith.models.target.target import Target, TargetOutput
from draftsmith.models.tree.tree import DraftTree


class LossyRule(ABC):
    """Says of each draft token whether it may stand. What the target chooses itself stands anyway.

    Attributes:
        name: of the rule, as reports have it.
        threshold: its one number; larger or smaller accepts more, depending on the rule.
        features: names of the target's layers that it reads.
        reads_draft: whether it needs the draft's distributions, which only chains keep.
    """

    name: ClassVar[str]
    threshold: float
    reads_draft: ClassVar[bool] = False

    @property
    def features(self) -> tuple[str, ...]:
        """None, for most rules."""
        return ()

    def bound(self, target: Target) -> LossyRule:
        """The rule for one target; this one stays as it is. Most rules fit every target and give themselves.

        Raises:
            ValueError: the rule is meant for another target.
        """
        return self

    def check_tokenizer(self, fingerprint: str) -> None:  # noqa: B027  (most rules fit any tokenizer)
        """Compare a tokenizer with the rule's.

        Raises:
            ValueError: they differ.
        """

    @abstractmethod
    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """bool [B, N]: whether the token of each node may stand; the root's entry is not read.

        Args:
            tree: the draft.
            logits_BNV: float32, what the target says behind each node, after the request's processors.
            output: the target's states at the nodes.
        """

    def __str__(self) -> str:
        return f"{self.name} {self.threshold:g}"


def of_tokens(tree: DraftTree, values_BNV: Tensor) -> Tensor:
    """The entry of each node's token at its parent: [B, N, V] -> [B, N]; the root's entry means nothing."""
    V = values_BNV.shape[-1]
    return values_BNV.flatten(1).gather(1, tree.parents_BN.clamp(min=0) * V + tree.tokens_BN)
