"""LOSSY rules: which draft tokens may stand although the target would have chosen others.

Owns the judge as a rule of decoding and the rules that need no training, its rivals. With any of them the text is no longer the target's
own. Knows nothing of how a path is picked among what is allowed (:mod:`draftsmith.decode.verify.lossy_walk`), of caches or drafters.

Shape legend: B batch rows, N tree nodes, L drafted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decode.verify.gates import Gate
from draftsmith.decode.verify.lossy_rule import LossyRule, of_tokens
from draftsmith.escapes import visible
from draftsmith.models.judge import NO_GATE, Judge
from draftsmith.models.opinion import confidence, opinion
from draftsmith.models.target.target import Target, TargetOutput
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text
from draftsmith.models.tree.tree import DraftTree

_SURE = 0.9


class JudgeRule(LossyRule):
    """A trained judge (Judge Decoding, arXiv:2501.19309): allowed where it finds the draft token's own state to be a correct token's.

    A threshold of 1 allows nothing, so that the output is the lossless one.

    Args:
        judge: trained on the target's states alone.

    Raises:
        ValueError: the judge reads the draft model's states too, which no drafter hands on.
    """

    name = "judge"
    reads_raw_logits = True  # training knows no request

    def __init__(self, judge: Judge) -> None:
        if judge.reads_draft:
            raise ValueError(
                "this judge reads the draft model's states beside the target's, which decoding does not have; train one on the target's "
                "alone"
            )
        self.judge, self.threshold = judge, float(judge.config.threshold)
        self.gate = _gate(judge)

    @property
    def features(self) -> tuple[str, ...]:
        """The judge's."""
        return self.judge.features

    def bound(self, target: Target) -> JudgeRule:
        """With a copy of the judge, attached to the target's ends and on the target's device."""
        judge = self.judge.with_threshold(self.threshold).attach(target.ends)
        return JudgeRule(torch.nn.Module.to(judge, target.device))

    def __str__(self) -> str:
        gate = self.judge.config.gate
        veto = " with a veto" if self.judge.config.veto else ""
        return f"{super().__str__()}{'' if gate == NO_GATE else f', {gate} gate{veto}'}"

    def check_tokenizer(self, fingerprint: str) -> None:
        """The judge's."""
        self.judge.check_tokenizer(fingerprint)

    def unknown_draft(self, drafter: str, fingerprint: str, limits: DraftLimits) -> str:
        """What a user should know who drafts otherwise than the judge has seen: a sentence, empty where the judge knows such drafts, or
        accepts nothing.

        A judge finds the errors that it has learnt from. Another drafter makes others.

        Args:
            drafter: its name, for the sentence.
            fingerprint: of its folder.
            limits: how much is drafted.
        """
        if self.threshold >= 1.0:
            return ""
        remedy = (
            "measure them with draftsmith judge evaluate, or tune the judge for this drafter with draftsmith judge tune"
        )
        if not self.judge.config.drafters:
            return f"nobody recorded whose drafts this judge has seen; it may let errors of {visible(drafter)} stand: {remedy}"
        known = [seen for seen in self.judge.config.drafters if seen["fingerprint"] == fingerprint]
        if not known:
            names = ", ".join(visible(seen["name"]) for seen in self.judge.config.drafters)
            return f"this judge has seen drafts of {names}, not of {visible(drafter)}; it may let their errors stand: {remedy}"
        shapes = [shape for seen in known for shape in seen["shapes"]]
        if shape_text(limits) in shapes:
            return ""
        return (
            f"this judge was tuned for drafts of {', '.join(map(visible, shapes))}, not of {shape_text(limits)}; right answers may differ: "
            "measure them with draftsmith judge evaluate"
        )

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        six_BN6 = opinion_of_draft(tree, logits_BNV) if self.judge.reads_opinion else None
        return self.judge.accepts(output.feature(self.features[0]), opinion=six_BN6)


def _gate(judge: Judge) -> Gate | None:
    """The gate that a judge's config names, on the judge's device."""
    config = judge.config
    if config.gate == NO_GATE:
        return None
    ends_K = torch.tensor(config.line_end_ids, device=judge.weight.device) if config.gate == "line" else None
    return Gate(ends_K, config.veto)


def opinion_of_draft(tree: DraftTree, logits_BNV: Tensor) -> Tensor:
    """The target's opinion of each drafted token, as a judge reads it: float32 [B, N, 6]; the root's entry means nothing.

    Args:
        tree: the draft.
        logits_BNV: float32, the target's logits after each node.
    """
    log_probs_BNV = logits_BNV.log_softmax(-1)
    after_BN2 = confidence(log_probs_BNV)
    before_BN2 = after_BN2.gather(1, tree.parents_BN.clamp(min=0)[..., None].expand(-1, -1, 2))
    return opinion(of_tokens(tree, log_probs_BNV), before_BN2, after_BN2)


@dataclass(frozen=True, repr=False)
class TopK(LossyRule):
    """Allowed if among the target's likeliest tokens: the baseline of AutoJudge's experiments (arXiv:2504.20039).

    Attributes:
        threshold: how many tokens are allowed, a whole number of at least 1.

    Raises:
        ValueError: another threshold.
    """

    threshold: float
    name = "top-k"

    def __post_init__(self) -> None:
        if not (1 <= self.threshold < math.inf and self.threshold == int(self.threshold)):
            raise ValueError(f"top-k is {self.threshold}; it counts tokens: give a whole number from 1 on")

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        least_BN = logits_BNV.topk(min(int(self.threshold), logits_BNV.shape[-1]), dim=-1).values[..., -1]
        least_BN = least_BN.gather(1, tree.parents_BN.clamp(min=0))
        own_BN = of_tokens(tree, logits_BNV)
        # Where the request's own top-k or top-p leaves fewer tokens than these, those it ruled out tie at minus infinity.
        return (own_BN >= least_BN) & (own_BN > -torch.inf)


@dataclass(frozen=True, repr=False)
class Typical(LossyRule):
    """Medusa's typical acceptance (arXiv:2401.10774, section 2.3.1): p(token) > min(epsilon, delta * exp(-entropy of p)).

    p is the target's distribution at the request's temperature, at temperature 0 that of temperature 1. Delta is the square root of
    epsilon, as in the paper.

    Attributes:
        threshold: epsilon, a probability above 0.

    Raises:
        ValueError: another threshold.
    """

    threshold: float
    name = "typical"

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"typical's epsilon is {self.threshold}; it is a probability above 0; Medusa takes 0.09")

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        log_probs_BNV = logits_BNV.log_softmax(-1)
        entropy_BN = torch.special.entr(log_probs_BNV.exp()).sum(-1)
        floor_BN = (self.threshold**0.5 * (-entropy_BN).exp()).clamp(max=self.threshold)
        return of_tokens(tree, log_probs_BNV).exp() > floor_BN.gather(1, tree.parents_BN.clamp(min=0))


@dataclass(frozen=True, repr=False)
class Divergence(LossyRule):
    """Allowed where draft and target agree about the place: KL(draft || target) below ``threshold`` nats (after arXiv:2601.04766).

    In this direction it is finite for draft vocabularies that lack some of the target's tokens. The target's distribution is that of the
    request, the draft's is as it was learned: where top-k, top-p or min-p leave the target fewer tokens, it is mostly infinite. Chains
    only.

    Attributes:
        threshold: nats, at least 0.

    Raises:
        ValueError: another threshold.
    """

    threshold: float
    name = "kl"
    reads_draft = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < math.inf:
            raise ValueError(
                f"the KL threshold is {self.threshold}; a divergence is at least 0: give a number of nats, such as 0.5"
            )

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        assert tree.draft_probs_BMV is not None
        # The draft's l-th distribution is about what follows node l, of which node l + 1 is one token.
        log_target_BLV = logits_BNV[:, :-1].log_softmax(-1)
        apart_BL = divergence(tree.draft_probs_BMV, log_target_BLV)
        return torch.nn.functional.pad(apart_BL < self.threshold, (1, 0))


@dataclass(frozen=True, repr=False)
class UnsureDivergence(Divergence):
    """As :class:`Divergence`, but only where the target is not sure: its likeliest token has at most 0.9 (arXiv:2601.04766).

    Where a target is sure, a draft with nearly the same distribution can still hold the one token that it would never write.

    Attributes:
        threshold: nats, at least 0.

    Raises:
        ValueError: another threshold.
    """

    name = "kl-unsure"

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        best_BN = logits_BNV.softmax(-1).amax(-1).gather(1, tree.parents_BN.clamp(min=0))
        return super().allows(tree, logits_BNV, output) & (best_BN <= _SURE)


@dataclass(frozen=True, repr=False)
class Ensemble(LossyRule):
    """Allowed if it is the likeliest token of a mixture of target and draft, as Transformers' `assistant_ensemble_weight` has it.

    The mixture is threshold * target + (1 - threshold) * draft. The target's distribution is that of the request, the draft's is as it was
    learned. Transformers also draws from the mixture where it samples, and writes its likeliest token where it does not accept. Here the
    target's own choice ends a cycle, as with every rule. Chains only.

    Attributes:
        threshold: the target's weight, above 0 and below 1; half or less can accept what the target finds impossible.

    Raises:
        ValueError: another weight.
    """

    threshold: float
    name = "ensemble"
    reads_draft = True

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(
                f"the ensemble's weight is {self.threshold}; it is the target's share of the mixture: give a number above 0 and below 1"
            )

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        assert tree.draft_probs_BMV is not None
        target_BLV = logits_BNV[:, :-1].softmax(-1)
        likeliest_BL = torch.lerp(tree.draft_probs_BMV.float(), target_BLV, self.threshold).argmax(-1)
        return torch.nn.functional.pad(likeliest_BL == tree.tokens_BN[:, 1:], (1, 0))


@dataclass(frozen=True, repr=False)
class Everything(LossyRule):
    """Allows whatever was drafted: the most that any rule can gain, and the least quality. The end of a reply stays the target's.

    Attributes:
        threshold: without meaning here.
    """

    threshold: float = 0.0
    name = "everything"

    def allows(self, tree: DraftTree, logits_BNV: Tensor, output: TargetOutput) -> Tensor:
        """See :meth:`LossyRule.allows`."""
        return tree.valid_BN.clone()

    def __str__(self) -> str:
        return self.name


def divergence(probs: Tensor, log_others: Tensor) -> Tensor:
    """KL(probs || others) in nats over the last dimension; tokens of probability 0 add nothing."""
    cross = torch.where(probs > 0.0, probs * log_others, 0.0).sum(-1)
    return -torch.special.entr(probs).sum(-1) - cross
