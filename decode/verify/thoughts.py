"""Where a text is inside a thought: between the token that begins thoughts and the token that ends them.

Owns that phase of a text, of a batch's prompts, and behind each node of a draft. It is made of tensors alone, so a captured cycle stays one
graph. Knows no rule and no model.

Shape legend: B batch rows, T prompt tokens, N tree nodes, E path slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.models.slots.constants import counting
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class ThoughtMarks:
    """The tokens around a thought. A text is inside one where the last mark in it begins a thought.

    Attributes:
        begin: id of the token that begins a thought.
        end: id of the token that ends it.

    Raises:
        ValueError: an id below 0, or one token for both.
    """

    begin: int
    end: int

    def __post_init__(self) -> None:
        if min(self.begin, self.end) < 0 or self.begin == self.end:
            raise ValueError(
                f"thoughts begin with token {self.begin} and end with {self.end}; give two different token ids from 0 on"
            )

    def are(self, tokens: Tensor) -> Tensor:
        """Which tokens are marks: bool, of the same shape.

        Args:
            tokens: int64.
        """
        return (tokens == self.begin) | (tokens == self.end)

    def behind_prompts(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Whether each prompt ends inside a thought: bool [B]. Chat templates of thinking models often begin one.

        Args:
            tokens_BT: int64, padded on the right.
            lengths_B: int64, tokens of each prompt.
        """
        return self.behind(tokens_BT, lengths_B, torch.zeros_like(lengths_B, dtype=torch.bool))

    def behind(self, tokens_BE: Tensor, counts_B: Tensor, inside_B: Tensor) -> Tensor:
        """Whether each text is inside a thought after more tokens: bool [B].

        Args:
            tokens_BE: int64, the tokens; of each row only the first ``counts_B`` are real.
            counts_B: int64; may be 0.
            inside_B: bool, whether the text before them is inside one.

        Example:
            with marks 8 and 9, the tokens 9, 5, 8 end inside a thought, 8, 5, 9 outside; 5, 6 stay where the text was.
        """
        place_E = counting(tokens_BE.shape[1], tokens_BE.device)
        real_BE = place_E < counts_B[:, None]
        last_B = self._last((place_E + 1).expand_as(tokens_BE), tokens_BE, real_BE)
        return _inside(torch.maximum(last_B, inside_B.long()))

    def behind_nodes(self, tree: DraftTree, ancestors_BNN: Tensor, inside_B: Tensor) -> Tensor:
        """Whether the text that ends with each node is inside a thought: bool [B, N].

        Args:
            tree: its root is the text's last token.
            ancestors_BNN: bool, ``tree.ancestors()``: a node is among its own.
            inside_B: bool, whether the text as far as the root is.

        Example:
            with marks 8 and 9, a chain 5, 9, 6, 8 below a root inside a thought: inside at the root and at 5, not at 9 and 6, again at 8.
        """
        below_BNN = ancestors_BNN & (tree.depths_BN > 0)[:, None, :]
        last_BN = self._last(tree.depths_BN[:, None, :], tree.tokens_BN[:, None, :], below_BNN)
        return _inside(torch.maximum(last_BN, inside_B.long()[:, None]))

    def may_stand(self, tree: DraftTree, inside_BN: Tensor) -> Tensor:
        """Which drafted tokens are within a thought, and no marks themselves: bool [B, N]; the root's entry means nothing.

        Args:
            tree: the draft.
            inside_BN: bool, see :meth:`behind_nodes`.
        """
        return inside_BN.gather(1, tree.parents_BN.clamp(min=0)) & ~self.are(tree.tokens_BN)

    def _last(self, place: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        """int64, over the last dimension: twice the place of the last mark, and 1 more if it begins a thought; 0 where there is none."""
        marks = 2 * place + (tokens == self.begin)
        return torch.where(real & self.are(tokens), marks, 0).amax(-1)


def _inside(last: Tensor) -> Tensor:
    return last % 2 == 1
