"""LOSSY rules that accept a draft token only where the target itself hesitates. They need no training.

Owns FLy, the margin, and relaxed acceptance inside thoughts. The other rules are in :mod:`draftsmith.decode.verify.lossy_rules`.

Shape legend: B batch rows, N tree nodes, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decode.verify.lossy_rule import LossyRule, of_tokens
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.models.target.target import Target, TargetOutput
from draftsmith.models.tree.tree import DraftTree

_LIKELIEST = 3


@dataclass(frozen=True, repr=False)
class Fly(LossyRule):
    """Allowed where the target hesitates and then agrees with what was drafted behind the token (FLy, arXiv:2511.22972).

    The target hesitates where its three likeliest tokens have an entropy of at least ``threshold`` nats. It agrees where the next
    ``window`` drafted tokens are its own choices, each given the draft before it. Two tokens closer than that do not help each other.
    In a tree that is asked along each path. A draft that is not deeper than the window never shows so many, so the window shrinks to one
    token less than the draft is deep.

    Attributes:
        threshold: nats, at least 0; vLLM takes 0.3.
        window: tokens that must agree, at least 1.

    Raises:
        ValueError: another threshold or window.
    """

    threshold: float
    window: int = 6
    name = "fly"

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < math.inf:
            raise ValueError(f"fly's entropy is {self.threshold}; give a number of nats of at least 0, such as 0.3")
        if self.window < 1:
            raise ValueError(f"fly's window is {self.window}; at least one token behind must agree")

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """Not without the target's choices: see :meth:`allows_beside`.

        Raises:
            ValueError: always.
        """
        raise ValueError("fly compares the draft with the target's choices; call allows_beside")

    def allows_beside(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput, choices_BN: Tensor) -> Tensor:
        """See :meth:`LossyRule.allows_beside`."""
        parents_BN = tree.parents_BN.clamp(min=0)
        probs_BNV = logits_BNV.softmax(-1)
        entropy_BN = torch.special.entr(probs_BNV.topk(min(_LIKELIEST, probs_BNV.shape[-1]), dim=-1).values).sum(-1)
        hesitates_BN = entropy_BN.gather(1, parents_BN) >= self.threshold
        window = min(self.window, max(1, tree.max_depth - 1))
        agrees_BN = agreeing_behind(tree, choices_BN) >= window
        return hesitates_BN & agrees_BN & (of_tokens(tree, probs_BNV) > 0.0)


def agreeing_behind(tree: DraftTree, choices_BN: Tensor) -> Tensor:
    """How many drafted tokens in a row the target would choose below each node, along the best path.

    Args:
        tree: the draft.
        choices_BN: int64, the target's own next token after each node.

    Returns:
        int64 [B, N].

    Example:
        a chain 5, 6, 7 with choices 9, 6, 7, 8 at the root and its nodes: 0 at the root, 2 below 5, 1 below 6, 0 below 7.
    """
    parents_BN = tree.parents_BN.clamp(min=0)
    matches_BN = (tree.tokens_BN == choices_BN.gather(1, parents_BN)) & tree.valid_BN
    matches_BN[:, 0] = False
    run_BN = torch.zeros_like(parents_BN)
    for _ in range(tree.max_depth):
        through_BN = (run_BN + 1).masked_fill(~matches_BN, 0)
        run_BN = torch.zeros_like(run_BN).scatter_reduce(1, parents_BN, through_BN, "amax")
    return run_BN


@dataclass(frozen=True, repr=False)
class Margin(LossyRule):
    """Allowed if it is the target's second choice, and the first is hardly likelier (after MARS, arXiv:2601.15498).

    MARS compares logits by their ratio, which a constant added to all logits changes. Here the difference of the two log-probabilities
    counts, which nothing of the kind changes.

    Attributes:
        threshold: nats, above 0: the first choice may be exp(threshold) times as likely.

    Raises:
        ValueError: another threshold.
    """

    threshold: float
    name = "margin"

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < math.inf:
            raise ValueError(f"the margin is {self.threshold}; give a number of nats above 0, such as 0.3")

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        best_BN2 = logits_BNV.topk(2, dim=-1).values.gather(
            1, tree.parents_BN.clamp(min=0)[..., None].expand(-1, -1, 2)
        )
        own_BN = of_tokens(tree, logits_BNV)
        close_BN = best_BN2[..., 0] - best_BN2[..., 1] < self.threshold
        return close_BN & (own_BN >= best_BN2[..., 1]) & (own_BN > -torch.inf)


@dataclass(frozen=True, repr=False)
class Relaxed(LossyRule):
    """Inside a thought, allowed if among the target's likeliest tokens and hardly less likely than its choice.

    This is the relaxed acceptance of TensorRT-LLM.
    Outside of thoughts nothing is allowed, so that the answer is what the target writes behind such a thought. The tokens that begin and
    end a thought are always the target's.

    Attributes:
        threshold: how much less probability than the likeliest token a token may have, from 0 to 1. TensorRT-LLM calls it the delta.
        thoughts: the tokens around thoughts.
        top_k: how many of the likeliest tokens are allowed, at least 1.

    Raises:
        ValueError: another threshold or count.
    """

    threshold: float
    thoughts: ThoughtMarks
    top_k: int = 10
    name = "relaxed"

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(
                f"relaxed's delta is {self.threshold}; it is a difference of probabilities: give 0 to 1, such as 0.5"
            )
        if not isinstance(self.thoughts, ThoughtMarks):
            raise ValueError(
                f"the thoughts are {self.thoughts!r}; relaxed needs the tokens around them: give ThoughtMarks"
            )
        if self.top_k < 1:
            raise ValueError(f"relaxed allows {self.top_k} tokens; give at least 1")

    def bound(self, target: Target) -> Relaxed:
        """Itself, where the target has the tokens around thoughts.

        Raises:
            ValueError: they are beyond its vocabulary.
        """
        marks, size = self.thoughts, target.ends.vocab_size
        if max(marks.begin, marks.end) >= size:
            raise ValueError(
                f"thoughts begin with token {marks.begin} and end with {marks.end}, and the vocabulary of {target.name} ends at {size - 1}"
                "; give ids of its own tokens: tokenizer.convert_tokens_to_ids('<think>') tells one"
            )
        return self

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`; where thoughts are, the verifier knows."""
        parents_BN = tree.parents_BN.clamp(min=0)
        best_BNK = logits_BNV.topk(min(self.top_k, logits_BNV.shape[-1]), dim=-1).values
        own_BN = of_tokens(tree, logits_BNV)
        normal_BN = logits_BNV.logsumexp(-1).gather(1, parents_BN)
        first_BN, last_BN = (best_BNK[..., place].gather(1, parents_BN) for place in (0, -1))
        near_BN = (own_BN - normal_BN).exp() >= (first_BN - normal_BN).exp() - self.threshold
        return near_BN & (own_BN >= last_BN) & (own_BN > -torch.inf)

    def __str__(self) -> str:
        marks = self.thoughts
        return f"{super().__str__()} of the likeliest {self.top_k}, between tokens {marks.begin} and {marks.end}"
