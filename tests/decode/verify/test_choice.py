"""Which verifier a decoder needs, and what each asks for."""

from __future__ import annotations

import pytest
from doubles import random_target

from draftsmith.decode.verify.candidates import CandidateVerifier
from draftsmith.decode.verify.choice import verifier_for
from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import Divergence, JudgeRule, TopK
from draftsmith.decode.verify.lossy_walk import LossyVerifier
from draftsmith.models import PRE_NORM, DraftLimits, Target
from draftsmith.models.judge import Judge, JudgeConfig
from draftsmith.models.tree.shapes import parse_shape


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.mark.parametrize("shape", [None, "1x4", "4x3n8", "t3.2.1"])
def test_what_is_searched_for_is_verified_losslessly(target: Target, shape: str | None) -> None:
    verifier = verifier_for(target, None if shape is None else parse_shape(shape))
    assert isinstance(verifier, LosslessVerifier)
    assert (verifier.layers, verifier.reads_draft_probs) == ((), False)
    assert (verifier.num_draft_keys, verifier.num_walk_keys) == (0, 0)


@pytest.mark.parametrize(("shape", "num_nodes"), [("s1.1.1", 3), ("s3.2.1", 3 + 6 + 6), ("k4.2", 4 + 8)])
def test_what_is_sampled_is_verified_by_rejection_with_a_key_for_each_node_and_more_for_the_walk(
    target: Target, shape: str, num_nodes: int
) -> None:
    limits = parse_shape(shape)
    assert limits.sampled is not None
    verifier = verifier_for(target, limits)
    assert isinstance(verifier, CandidateVerifier)
    assert verifier.num_draft_keys == num_nodes
    assert verifier.num_walk_keys == sum(limits.sampled.children) + 1
    verifier.check_temperature(0.5)
    with pytest.raises(ValueError, match="temperature is 0 and the draft tree is sampled"):
        verifier.check_temperature(0.0)


@pytest.mark.parametrize(
    ("rule", "layers", "reads_draft"), [("top-k", (), False), ("kl", (), True), ("judge", (PRE_NORM,), False)]
)
def test_a_rule_says_what_its_verifier_reads(
    target: Target, rule: str, layers: tuple[str, ...], reads_draft: bool
) -> None:
    judge = Judge(JudgeConfig(hidden_size=target.ends.hidden_size))
    rules: dict[str, LossyRule] = {"top-k": TopK(2), "kl": Divergence(0.1), "judge": JudgeRule(judge)}
    verifier = verifier_for(target, DraftLimits(1, 4), rules[rule])
    assert isinstance(verifier, LossyVerifier)
    assert (verifier.layers, verifier.reads_draft_probs) == (layers, reads_draft)


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        (None, TopK(2), "nothing drafts"),
        ("s2.1", TopK(2), "a sampled tree is verified by rejection"),
        ("2x4", Divergence(0.1), "only chains keep"),
        ("t2.1", Divergence(0.1), "only chains keep"),
    ],
)
def test_a_rule_that_cannot_verify_such_drafts_is_an_error(
    target: Target, shape: str | None, rule: LossyRule, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verifier_for(target, None if shape is None else parse_shape(shape), rule)
