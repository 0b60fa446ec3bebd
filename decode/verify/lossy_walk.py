"""Verification with a LOSSY rule: one walk down the tree along what the target chooses or the rule allows.

Owns the choice of the path. Wherever the target's own choice was drafted the walk follows it, so it loses nothing that lossless
verification accepts. Where the walk ends, the target chooses the next token. Knows no rule.

Shape legend: B batch rows, N tree nodes, E path slots (max_depth + 1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.lossy_rule import LossyRule, of_tokens
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.tree import DraftTree


class LossyVerifier:
    """Keeps what the target chooses and what a rule allows.

    Args:
        rule: bound to the target that decodes.
        limits: how much is drafted.

    Raises:
        ValueError: the rule cannot verify drafts of such limits.
    """

    num_draft_keys = 0
    num_walk_keys = 0

    def __init__(self, rule: LossyRule, limits: DraftLimits) -> None:
        if limits.sampled is not None:
            raise ValueError(
                f"a sampled tree is verified by rejection, which has no place for the rule {rule}; draft with beams, a dynamic or a static "
                "tree, or leave the rule out"
            )
        is_chain = limits.beam_width == 1 and limits.paths is None
        if rule.reads_draft and not is_chain:
            raise ValueError(
                f"the rule {rule} compares the distributions of draft and target, which only chains keep; draft a chain such as 1x16"
            )
        if rule.gate is not None and not is_chain:
            raise ValueError(
                f"the rule {rule} has a gate, which asks whether tokens in a row stand together; draft a chain such as 1x64"
            )
        self._rule = rule
        self._lossless = LosslessVerifier()

    @property
    def layers(self) -> tuple[str, ...]:
        """The rule's."""
        return self._rule.features

    @property
    def shares_noise(self) -> bool:
        """False: what a rule lets stand depends on the draft."""
        return False

    @property
    def reads_draft_probs(self) -> bool:
        """The rule's."""
        return self._rule.reads_draft

    @property
    def thoughts(self) -> ThoughtMarks | None:
        """The rule's."""
        return self._rule.thoughts

    def check_tokenizer(self, fingerprint: str) -> None:
        """Ask the rule; see :class:`~draftsmith.decode.verify.verifier.Verifier`."""
        self._rule.check_tokenizer(fingerprint)

    def check_temperature(self, temperature: float) -> None:
        """Accept every temperature; see :class:`~draftsmith.decode.verify.verifier.Verifier`."""

    def walk(self, reading: Reading, keys_BU: Tensor | None) -> Walk:
        """See :meth:`~draftsmith.decode.verify.verifier.Verifier.walk` and :func:`lossy_walk`."""
        if reading.tree.num_nodes == 1:
            steps = self._lossless.walk(reading, keys_BU)
            return replace(steps, by_rule_BE=torch.zeros_like(steps.emitted_BE, dtype=torch.bool))
        choices_BN = reading.choices.tokens()
        matches_BN = _matches(reading.tree, choices_BN)
        return lossy_walk(reading.tree, choices_BN, self._allowed(reading, choices_BN, matches_BN))

    def _allowed(self, reading: Reading, choices_BN: Tensor, matches_BN: Tensor) -> Tensor:
        """bool [B, N]: nodes that may stay although the target chooses others."""
        tree, logits_BNV = reading.tree, reading.logits_BNV
        read_BNV = logits_BNV
        if self._rule.reads_raw_logits and reading.raw_logits_BNV is not None:
            read_BNV = reading.raw_logits_BNV.float()
        approved_BN = self._rule.allows_beside(tree, read_BNV, reading.output, choices_BN)
        if self._rule.thoughts is not None:
            assert reading.inside_BN is not None, "the rows follow the phase that the verifier asks for"
            approved_BN = approved_BN & self._rule.thoughts.may_stand(tree, reading.inside_BN)
        allowed_BN = approved_BN
        # What the model's maker forbids never stays, and only the target ends a reply.
        if reading.is_constrained:
            allowed_BN = allowed_BN & (of_tokens(tree, logits_BNV) > torch.finfo(logits_BNV.dtype).min)
        for token in reading.eos_token_ids:
            allowed_BN = allowed_BN & (tree.tokens_BN != token)
        gate = self._rule.gate
        return (
            allowed_BN if gate is None else gate.kept(tree, matches_BN, allowed_BN, approved_BN, reading.eos_token_ids)
        )


def lossy_walk(tree: DraftTree, choices_BN: Tensor, allowed_BN: Tensor) -> Walk:
    """From the root, descend to the child that is the target's choice, else to the likeliest allowed one.

    Args:
        tree: proposed nodes.
        choices_BN: int64, the target's chosen next token at each node.
        allowed_BN: bool, nodes that may stand.

    Example:
        a chain 5, 6, 7 with choices 5, 8, 7, 9 at the root and its nodes, and 6 allowed: emits [5, 6, 7, 9], of which 6 is by the rule.
    """
    matches_BN = _matches(tree, choices_BN)
    stands_BN = (matches_BN | allowed_BN) & tree.valid_BN
    path_BE = _chain(stands_BN) if tree.chain else _descend(tree, stands_BN, matches_BN)
    counts_B = 1 + (path_BE > 0).sum(1)
    last_B1 = counts_B[:, None] - 1
    end_B1 = path_BE.gather(1, last_B1)
    own_B1 = choices_BN.gather(1, end_B1)
    emitted_BE = tree.tokens_BN.gather(1, path_BE).roll(-1, dims=1).scatter_(1, last_B1, own_B1)
    by_rule_BE = (~matches_BN).gather(1, path_BE).roll(-1, dims=1)
    place_E = torch.arange(path_BE.shape[1], device=path_BE.device)
    return Walk(path_BE, emitted_BE, counts_B, end_B1, own_B1, by_rule_BE & (place_E < last_B1))


def _matches(tree: DraftTree, choices_BN: Tensor) -> Tensor:
    """bool [B, N]: nodes that the target chooses at their parents; the root's entry means nothing."""
    return tree.tokens_BN == choices_BN.gather(1, tree.parents_BN.clamp(min=0))


def _chain(stands_BN: Tensor) -> Tensor:
    """int64 [B, E]: node indices of a chain as far as its nodes stand, 0 behind."""
    going_BN = stands_BN.clone()
    going_BN[:, 0] = True
    place_N = torch.arange(stands_BN.shape[1], device=stands_BN.device)
    return place_N * going_BN.long().cumprod(1)


def _descend(tree: DraftTree, stands_BN: Tensor, matches_BN: Tensor) -> Tensor:
    """int64 [B, E]: node indices of the path, 0 behind its end."""
    place_BN = torch.arange(tree.num_nodes, device=stands_BN.device).expand_as(stands_BN)
    likely_BN = -place_BN.float() if tree.scores_BN is None else tree.scores_BN.float().clamp(min=-1e30)
    rank_BN = torch.where(matches_BN, 1.0, likely_BN)  # log-probabilities are at most 0
    node_B1 = torch.zeros_like(place_BN[:, :1])
    path = [node_B1]
    for _ in range(tree.max_depth):
        child_BN = (tree.parents_BN == node_B1) & stands_BN & (place_BN > 0)
        best_B1 = rank_BN.masked_fill(~child_BN, -torch.inf).argmax(1, keepdim=True)
        # A row that has ended stays where it is: the parent index of no node.
        node_B1 = torch.where(child_BN.any(1, keepdim=True), best_B1, -2)
        path.append(node_B1.clamp(min=0))
    return torch.cat(path, dim=1)
