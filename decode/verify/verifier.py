"""What verification asks for and gives back, whichever way drafts are verified.

Owns the interface that the engine asks, and what passes through it. The ways are :mod:`draftsmith.decode.verify.lossless`,
:mod:`draftsmith.decode.verify.candidates` and :mod:`draftsmith.decode.verify.lossy_walk`. Knows none of them, no caches and no drafters.

Shape legend: B batch rows, N tree nodes, E path slots (max_depth + 1), U draws of a walk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.models.target.target import TargetOutput
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class Walk:
    """Where verification went in each row.

    Attributes:
        path_BE: int64, node index at each depth, the root first; behind the end any.
        emitted_BE: int64, the token after each node of the path: accepted drafts, then one token of the target; behind it any.
        counts_B: int64, how many of ``emitted_BE`` are real: accepted drafts + 1.
        end_B1: int64, index of the last node of the path.
        final_B1: int64, the last emitted token, which follows it.
        by_rule_BE: bool, which of ``emitted_BE`` the target would not have chosen; None where verification is lossless.
    """

    path_BE: Tensor
    emitted_BE: Tensor
    counts_B: Tensor
    end_B1: Tensor
    final_B1: Tensor
    by_rule_BE: Tensor | None = None


class TargetChoices(Protocol):
    """The target's own next token after each node, and what it is drawn from. All is computed when it is first asked for."""

    def tokens(self) -> Tensor:
        """int64 [B, N]."""
        ...

    def probs(self) -> Tensor:
        """float32 [B, N, V], the target's distribution after the request's processors."""
        ...

    def soundness(self) -> Tensor:
        """float32 [B, N]: NaN where the logits hold NaN or infinity, any number elsewhere."""
        ...


@dataclass(frozen=True)
class Reading:
    """What the target says of one draft.

    Attributes:
        tree: the draft.
        ancestors_BNN: bool, ``tree.ancestors()``.
        logits_BNV: float32, the target's logits after each node and after the request's processors.
        choices: the target's own next token after each node; drawn only when asked for.
        output: the target's states at the nodes, with the layers that the verifier asked for.
        eos_token_ids: the request's end-of-sequence tokens.
        is_constrained: whether constraints of the model's maker are among the processors.
        raw_logits_BNV: float, the target's logits before any processor; None where no processor changes them.
        inside_BN: bool, whether the text that ends with each node is inside a thought; None where the verifier does not ask.
    """

    tree: DraftTree
    ancestors_BNN: Tensor
    logits_BNV: Tensor
    choices: TargetChoices
    output: TargetOutput
    eos_token_ids: tuple[int, ...] = ()
    is_constrained: bool = False
    raw_logits_BNV: Tensor | None = None
    inside_BN: Tensor | None = None


class Verifier(Protocol):
    """Decides which drafted tokens stay, and which token follows them."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the target's layers that it reads at the nodes."""

    @property
    def reads_draft_probs(self) -> bool:
        """Whether chains must carry the distributions that they were drafted from."""

    @property
    def shares_noise(self) -> bool:
        """Whether drafts may be guesses by the numbers that the target draws with; only where no emitted token depends on the draft."""

    @property
    def num_draft_keys(self) -> int:
        """Noise keys of a cycle with which the drafter draws its nodes; 0 where drafts are not drawn."""

    @property
    def num_walk_keys(self) -> int:
        """Further noise keys of a cycle that :meth:`walk` takes and the drafter does not see."""

    @property
    def thoughts(self) -> ThoughtMarks | None:
        """The tokens around thoughts, for a verifier that asks what is inside one."""

    def check_tokenizer(self, fingerprint: str) -> None:
        """Compare the fingerprint of a tokenizer with the one that the verifier was made for.

        Raises:
            ValueError: they differ.
        """

    def check_temperature(self, temperature: float) -> None:
        """Check that drafts can be verified at a temperature.

        Raises:
            ValueError: they cannot.
        """

    def walk(self, reading: Reading, keys_BU: Tensor | None) -> Walk:
        """Verify one draft.

        Args:
            reading: the draft and what the target says of it; a draft of the root alone emits the target's choice.
            keys_BU: int64, noise keys, ``num_walk_keys`` in number; None where that is 0, and for a draft of the root alone.

        Returns:
            at least one emitted token in every row.
        """
