"""The interface of LOSSY rules, which accept draft tokens that the target would not have chosen.

Owns the interface. Knows no rule.

Shape legend: B batch rows, N tree nodes, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from draftsmith.decode.verify.gates import Gate
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.models.target.target import Target, TargetOutput
from draftsmith.models.tree.tree import DraftTree


class LossyRule(ABC):
    """Accepts or rejects each draft token. The target's own choices are accepted without it.

    Attributes:
        name: of the rule, as reports have it.
        threshold: its one number; larger or smaller accepts more, depending on the rule.
        features: names of the target's layers that it reads.
        reads_draft: whether it needs the draft's distributions, which only chains keep.
        reads_raw_logits: whether it reads the target's logits as the model gives them, not as the request shapes them.
        thoughts: the tokens around thoughts, for a rule that accepts only inside of them; None for one that accepts everywhere. The marks
            themselves are always the target's.
        gate: what several tokens in a row must pass together; None where each stands alone. Only chains have gates.
    """

    name: ClassVar[str]
    threshold: float
    reads_draft: ClassVar[bool] = False
    reads_raw_logits: ClassVar[bool] = False
    thoughts: ThoughtMarks | None = None
    gate: Gate | None = None

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
        """Which draft tokens the rule accepts.

        Args:
            tree: the draft.
            logits_BNV: float32, the target's logits after each node, after the request's processors; before them for a rule that
                `reads_raw_logits`.
            output: the target's states at the nodes.

        Returns:
            bool [B, N], for the token of each node; nobody reads the root's entry.
        """

    def allows_beside(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput, choices_BN: Tensor) -> Tensor:
        """As :meth:`allows`, for a rule that also looks at what the target itself chooses. Most rules do not.

        Args:
            tree: see there, as the next two.
            logits_BNV: see there.
            output: see there.
            choices_BN: int64, the target's own next token after each node.

        Returns:
            bool [B, N].
        """
        return self.allows(tree, logits_BNV, output)

    def __str__(self) -> str:
        return f"{self.name} {self.threshold:g}"


def of_tokens(tree: DraftTree, values_BNV: Tensor) -> Tensor:
    """The entry of each node's token at its parent: [B, N, V] -> [B, N]; the root's entry means nothing."""
    V = values_BNV.shape[-1]
    return values_BNV.flatten(1).gather(1, tree.parents_BN.clamp(min=0) * V + tree.tokens_BN)
