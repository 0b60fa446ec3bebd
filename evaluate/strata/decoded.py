"""What a contender emitted for a prompt, and acceptance at one draft depth.

Owns the two records and their small invariants. Does not know who decoded, or how long it took.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoded:
    """What one contender emitted for one prompt.

    Attributes:
        token_ids: the reply, EOS included when it was produced.
        accepted: accepted draft tokens of each decode cycle. The prefill emits the first token outside of any cycle.
        drafted: depth of the draft tree of each cycle; empty when the contender does not say.
        prefill_tokens: tokens that came with the prompt's own forward; more than one only where a prefill drafts.
        cycles_before: cycles that the rows of its call had run when the prompt took one; 0 when the contender does not say.
    """

    token_ids: tuple[int, ...]
    accepted: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    prefill_tokens: int = 1
    cycles_before: int = 0

    @property
    def stepped_tokens(self) -> int:
        """Tokens emitted by decode cycles, i.e. all but the prefill's."""
        return max(len(self.token_ids) - self.prefill_tokens, 0)

    @property
    def cycles(self) -> int:
        """Target forwards after the prefill."""
        return len(self.accepted)


@dataclass(frozen=True)
class DepthAcceptance:
    """Acceptance at one draft depth.

    Attributes:
        depth: 1 is the first drafted token after the root.
        reached: cycles whose previous depth was accepted and that drafted this deep.
        accepted: cycles that accepted this depth.
        conditional: accepted / reached.
        marginal: accepted / all cycles.
    """

    depth: int
    reached: int
    accepted: int
    conditional: float
    marginal: float
