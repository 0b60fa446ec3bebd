"""Verification: one walk down the tree along the target's own choices.

Owns the lossless rule. The target chooses one token at every node (its argmax, or one draw from its processed distribution); the walk
descends while the choice is a child and emits the first choice that is not. Whatever the tree holds, the emitted tokens are exactly
what the target would have chosen alone: a choice is made of the target's distribution and the position's numbers, and of no draft. So a
drafter may even know the numbers (:class:`~draftsmith.models.tree.noise.SharedNoise`). Knows nothing of how choices were drawn, of
caches or drafters.

Shape legend: B batch rows, N tree nodes, E path slots (max_depth + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.models.slots.constants import counting, repeated
from draftsmith.models.tree.tree import DraftTree


class LosslessVerifier:
    """Emits what the target would have chosen alone, for every draft and every temperature."""

    layers: tuple[str, ...] = ()
    reads_draft_probs = False
    shares_noise = True
    num_draft_keys = 0
    num_walk_keys = 0
    thoughts = None

    def check_tokenizer(self, fingerprint: str) -> None:
        """Accept every tokenizer; see :class:`~draftsmith.decode.verify.verifier.Verifier`."""

    def check_temperature(self, temperature: float) -> None:
        """Accept every temperature; see :class:`~draftsmith.decode.verify.verifier.Verifier`."""

    def walk(self, reading: Reading, keys_BU: Tensor | None) -> Walk:
        """See :meth:`~draftsmith.decode.verify.verifier.Verifier.walk` and :func:`walk`."""
        return walk(reading.tree, reading.ancestors_BNN, reading.choices.tokens())


def walk(tree: DraftTree, ancestors_BNN: Tensor, choices_BN: Tensor) -> Walk:
    """Follow the target's choices from the root.

    Args:
        tree: proposed nodes.
        ancestors_BNN: bool, ``tree.ancestors()``.
        choices_BN: int64, the target's chosen next token at each node.

    Example:
        root, children 5 and 7 of it, child 6 of 5; choices 5 at the root, 6 at node "5", 9 at node "6" accept 5 and 6, emit [5, 6, 9].
    """
    (B, N), device, beyond = choices_BN.shape, choices_BN.device, tree.max_depth + 1
    if N == 1:
        root_B1 = counting(1, device).expand(B, 1)
        return Walk(root_B1, choices_BN, repeated((1,), (1,), device).expand(B), root_B1, choices_BN)
    # Of the drafted nodes only: the root is accepted anyway, and its parent is none.
    chosen_BN = choices_BN.gather(1, tree.parents_BN[:, 1:])
    agrees_BN = (tree.tokens_BN[:, 1:] == chosen_BN) & tree.valid_BN[:, 1:]
    # Accepted where all ancestors, the node itself among them, agree: "agrees or is no ancestor", written as an order of truth values.
    accepted_BN = (agrees_BN[:, None, :] >= ancestors_BNN[..., 1:]).all(-1)
    # At most one node is accepted at each depth, because siblings differ in their tokens. The others go to a place behind the path.
    depth_BN = torch.where(accepted_BN, tree.depths_BN, repeated((beyond,), (1,), device))
    zeros_BE = repeated((0,), (beyond + 1,), device).expand(B, -1)
    path_BE = zeros_BE.scatter(1, depth_BN, counting(N, device).expand(B, -1))[:, :beyond]
    end_B1 = path_BE.amax(1, keepdim=True)  # a child has a larger index than its parent
    return Walk(path_BE, choices_BN.gather(1, path_BE), accepted_BN.sum(1), end_B1, choices_BN.gather(1, end_B1))
