"""Which verifier a decoder needs.

Owns the choice between the lossless walk, rejection of candidates and a lossy rule. Knows nothing of how each works.
"""

from __future__ import annotations

from draftsmith.decode.verify.candidates import CandidateVerifier
from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_walk import LossyVerifier
from draftsmith.decode.verify.verifier import Verifier
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits


def verifier_for(target: Target, limits: DraftLimits | None, rule: LossyRule | None = None) -> Verifier:
    """The verifier of drafts of such limits.

    Args:
        target: decodes.
        limits: how much is drafted; None where nothing drafts.
        rule: keeps draft tokens that the target would not have chosen; None verifies losslessly. The caller's rule stays as it is.

    Raises:
        ValueError: the rule belongs to another target, cannot verify such drafts, or nothing drafts for it.
    """
    if rule is not None and limits is None:
        raise ValueError(
            f"the rule {rule} lets draft tokens stand, and nothing drafts; give a drafter, or leave the rule out"
        )
    if rule is not None and limits is not None:
        return LossyVerifier(rule.bound(target), limits)
    if limits is not None and limits.sampled is not None:
        return CandidateVerifier(limits, limits.sampled)
    return LosslessVerifier()
