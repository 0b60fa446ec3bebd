"""What belongs to each row of a batch besides its caches: noise, processors, the early stop, and whether its text is inside a thought.

Owns these tensors, most of which a request may do without, their growth and the selection of rows. Knows no model, no cache, no drafter
and no rule of verification.

Shape legend: B batch rows, T prompt tokens, N tree nodes, E path slots, P output positions, U draws of a cycle, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decode.processors import RequestText, process_texts
from draftsmith.decode.sampling import GenerationSettings, process
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.row_state import write_over
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.tree.early_stop import StopState
from draftsmith.models.tree.noise import keys_at, keys_behind, keys_below, keys_from
from draftsmith.models.tree.tree import DraftTree


@dataclass
class Rows:
    """State of the rows still decoding; None where the request or the verifier does not need it.

    Attributes:
        choice_keys_B: int64, the noise keys by which the target's choices are drawn, or None at temperature 0. The place below a key is
            how many tokens are cached, which grows with the reply.
        cycle_keys_B: int64, the noise keys of cycles, likewise, or None where drafts are not drawn.
        seen_BV: bool, tokens in the prompt and the reply, or None without a repetition penalty.
        texts: what constraints read of each row, or None without constraints.
        stop: the early stop's controller, or None without one.
        inside_B: bool, whether the text is inside a thought, or None where the verifier does not ask.
    """

    choice_keys_B: Tensor | None = None
    cycle_keys_B: Tensor | None = None
    seen_BV: Tensor | None = None
    texts: list[RequestText] | None = None
    stop: StopState | None = None
    inside_B: Tensor | None = None

    def select(self, kept: KeptRows) -> Rows:
        """The state of some rows only, in the order of ``kept``."""
        return Rows(
            choice_keys_B=None if self.choice_keys_B is None else self.choice_keys_B[kept.index],
            cycle_keys_B=None if self.cycle_keys_B is None else self.cycle_keys_B[kept.index],
            seen_BV=None if self.seen_BV is None else self.seen_BV[kept.index],
            texts=None if self.texts is None else [self.texts[row] for row in kept.order],
            stop=None if self.stop is None else self.stop.select_rows(kept.index),
            inside_B=None if self.inside_B is None else self.inside_B[kept.index],
        )

    def number_keys(self, first_B: Tensor) -> None:
        """Number the places below the keys anew: the first output position becomes ``first_B``, int64."""
        self.choice_keys_B = None if self.choice_keys_B is None else keys_from(self.choice_keys_B, first_B)
        self.cycle_keys_B = None if self.cycle_keys_B is None else keys_from(self.cycle_keys_B, first_B)

    def choice_keys(self, lengths_B: Tensor, count: int) -> Tensor | None:
        """The noise keys of the next output positions.

        Args:
            lengths_B: int64, cached tokens of each row.
            count: P, how many positions.

        Returns:
            int64 [B, P], or None at temperature 0.
        """
        if self.choice_keys_B is None:
            return None
        return keys_behind(self.choice_keys_B, lengths_B, count)

    def cycle_keys(self, lengths_B: Tensor, count: int) -> Tensor | None:
        """The noise keys of the cycle at this output position.

        Args:
            lengths_B: int64, cached tokens of each row.
            count: U, how many keys.

        Returns:
            int64 [B, U], or None where there are none.
        """
        if self.cycle_keys_B is None or count == 0:
            return None
        return keys_below(keys_at(self.cycle_keys_B, lengths_B), count)

    def process(
        self, logits_BNV: Tensor, tree: DraftTree, ancestors_BNN: Tensor, settings: GenerationSettings
    ) -> Tensor:
        """The target's logits after the request's processors, float32 [B, N, V].

        Args:
            logits_BNV: float, after each node.
            tree: its root is the last emitted token.
            ancestors_BNN: bool, ``tree.ancestors()``.
            settings: of the request.
        """
        if self.texts is not None:
            return process_texts(logits_BNV, tree, self.texts)
        seen_BNV = None
        if self.seen_BV is not None:
            seen_BNV = self.seen_BV[:, None].repeat(1, tree.num_nodes, 1)
            tokens_BNN = tree.tokens_BN[:, None, :].expand_as(ancestors_BNN)
            # A node that is no ancestor contributes the root's token, which every node has seen.
            seen_BNV.scatter_(2, torch.where(ancestors_BNN, tokens_BNN, tree.tokens_BN[:, :1, None]), True)
        return process(logits_BNV, settings, seen_BNV)

    def emit(
        self, emitted_BE: Tensor, counts_B: Tensor, active_B: Tensor, thoughts: ThoughtMarks | None = None
    ) -> None:
        """Remember what the text holds with emitted tokens.

        Args:
            emitted_BE: int64, tokens; of each row only the first ``counts_B`` are real.
            counts_B: int64, at least 1.
            active_B: bool, False for idle rows, of which no token is real.
            thoughts: the tokens around thoughts, where the rows follow these.
        """
        if self.inside_B is not None and thoughts is not None:
            self.inside_B.copy_(thoughts.behind(emitted_BE, counts_B * active_B, self.inside_B))
        if self.seen_BV is not None:
            place_E = counting(emitted_BE.shape[1], emitted_BE.device)
            real_BE = torch.where(place_E < (counts_B * active_B)[:, None], emitted_BE, emitted_BE[:, :1])
            self.seen_BV.scatter_(1, real_BE, True)

    def steer_stop(self, tree: DraftTree, counts_B: Tensor) -> None:
        """Move the thresholds of the early stop after a cycle; see :meth:`StopState.after`."""
        if self.stop is not None:
            write_over(self.stop, self.stop.after(tree, counts_B))


def seen_tokens(tokens_BT: Tensor, lengths_B: Tensor, vocab_size: int) -> Tensor:
    """Which tokens each prompt holds, bool [B, V].

    Args:
        tokens_BT: int64, padded on the right.
        lengths_B: int64, tokens of each prompt.
        vocab_size: V.
    """
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    real_BT = torch.where(place_T < lengths_B[:, None], tokens_BT, tokens_BT[:, :1])
    seen_BV = torch.zeros(tokens_BT.shape[0], vocab_size, dtype=torch.bool, device=tokens_BT.device)
    return seen_BV.scatter_(1, real_BT, True)
