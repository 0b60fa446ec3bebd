"""Which labelled tokens a rule would let stand: the target reads labelled answers, and the rule is asked at every token.

Owns this one measure. Does not know where labels come from, or decoding.

Shape legend: T tokens of an answer behind its prompt, N = T + 1 nodes, S tokens of both, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.data.progress import progress
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.evaluate.strata.acceptance import ratio_interval
from draftsmith.label.token_labels import CORRECT, WRONG
from draftsmith.label.token_rows import LabelledRow
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.target import Target, TargetOutput
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """Shares of labelled tokens that stand, by the target's own choice or by the rule; the interval is 95 %, over questions."""

    wrong_share: float
    wrong_interval: tuple[float, float]
    correct_share: float


@torch.inference_mode()
def accepted_tokens(
    target: Target, drafter: Drafter, rules: Sequence[LossyRule | None], rows: Sequence[LabelledRow]
) -> list[Accepted | None]:
    """What each rule accepts (None: the target's own choice alone). None for a rule that needs a draft's distributions over given text
    where the drafter is no language model.

    Raises:
        ValueError: the rows lack tokens of one class, or a row cannot have been read by this target.
    """
    counts: list[dict[str, list[int]]] = [defaultdict(lambda: [0, 0, 0, 0]) for _ in rules]
    lm = drafter if isinstance(drafter, LMDrafter) else None
    rules = [None if rule is None else rule.bound(target) for rule in rules]
    layers = tuple({name for rule in rules if rule is not None for name in rule.features})
    with progress("labelled rows", len(rows), "rows") as advance:
        for row in rows:
            _check(row, target)
            output, logits_NV = _read(target, row, layers)
            chain = _as_chain(row, lm, logits_NV)
            choices_N = logits_NV.argmax(-1)
            own_T = chain.tokens_BN[0, 1:] == choices_N[:-1]
            labels_T = torch.tensor(row.labels, device=own_T.device)
            for rule, counted in zip(rules, counts, strict=True):
                if rule is not None and rule.reads_draft and lm is None:
                    continue
                stands_T = own_T
                if rule is not None:
                    approved_BN = rule.allows_beside(chain, logits_NV[None], output, choices_N[None])
                    if rule.thoughts is not None:
                        approved_BN = approved_BN & _within(rule.thoughts, chain, row)
                    stands_T = own_T | approved_BN[0, 1:]
                for place, label in ((0, WRONG), (2, CORRECT)):
                    counted[row.question][place] += int((stands_T & (labels_T == label)).sum())
                    counted[row.question][place + 1] += int((labels_T == label).sum())
            advance(1)
    return [_shares(list(counted.values())) if counted else None for counted in counts]


def _within(marks: ThoughtMarks, chain: DraftTree, row: LabelledRow) -> Tensor:
    """bool [1, N]: the answer's tokens inside thoughts."""
    prompt_1T = torch.tensor([row.prompt_ids], device=chain.tokens_BN.device)
    inside_1 = marks.behind_prompts(prompt_1T, torch.tensor([len(row.prompt_ids)], device=prompt_1T.device))
    return marks.may_stand(chain, marks.behind_nodes(chain, chain.ancestors(), inside_1))


def _check(row: LabelledRow, target: Target) -> None:
    if not row.prompt_ids:
        raise ValueError(
            f"row {row.id} has no prompt token; the target says nothing before its first reply token; leave it out"
        )
    ids, V = row.prompt_ids + row.reply_ids, target.ends.vocab_size
    foreign = next((token for token in ids if not 0 <= token < V), None)
    if foreign is not None:
        raise ValueError(
            f"row {row.id} holds token id {foreign}, the vocabulary of {target.name} goes from 0 to {V - 1}; make the rows with this "
            "target (draftsmith label rows)"
        )
    if target.max_positions is not None and len(ids) > target.max_positions:
        raise ValueError(
            f"row {row.id} has {len(ids)} tokens, the context of {target.name} is {target.max_positions}; make the rows with this target "
            "(draftsmith label rows)"
        )


def _read(target: Target, row: LabelledRow, layers: tuple[str, ...]) -> tuple[TargetOutput, Tensor]:
    """The target's states at the last prompt token and the reply's [1, N, D], and its logits there, float32 [N, V]."""
    ids_1S = torch.tensor([row.prompt_ids + row.reply_ids], device=target.device)
    read = target.prefix(ids_1S, layers=layers, read=torch.tensor([len(row.prompt_ids)], device=target.device))
    start = len(row.prompt_ids) - 1
    states = {name: read.feature(name)[:, start:] for name in layers}
    output = TargetOutput(read.pre_norm[:, start:], read.normed[:, start:], states)
    return output, target.logits(output.normed)[0].float()


def _as_chain(row: LabelledRow, lm: LMDrafter | None, logits_NV: Tensor) -> DraftTree:
    """The answer as if it had been drafted: a chain below the prompt's last token."""
    device = logits_NV.device
    tokens_1N = torch.tensor([[row.prompt_ids[-1], *row.reply_ids]], device=device)
    place_1N = torch.arange(tokens_1N.shape[1], device=device)[None]
    probs_1TV = None
    if lm is not None:
        ids_1S = torch.tensor([row.prompt_ids + row.reply_ids], device=device)
        read = lm.lm.prefix(lm.known(ids_1S))
        V = logits_NV.shape[-1]
        drafted_1TV = lm.lm.logits(read.normed[:, len(row.prompt_ids) - 1 : -1]).float()[..., :V]
        probs_1TV = torch.nn.functional.pad(drafted_1TV.softmax(-1), (0, V - drafted_1TV.shape[-1]))
    return DraftTree(
        tokens_1N,
        place_1N - 1,
        place_1N,
        torch.ones_like(tokens_1N, dtype=torch.bool),
        max_depth=len(row.reply_ids),
        chain=True,
        draft_probs_BMV=probs_1TV,
    )


def _shares(questions: list[list[int]]) -> Accepted:
    wrong, all_wrong, correct, all_correct = (sum(column) for column in zip(*questions, strict=True))
    if not all_wrong or not all_correct:
        raise ValueError(
            f"the labelled rows hold {all_wrong} wrong and {all_correct} correct tokens; shares need both; give rows with both labels"
        )
    interval = ratio_interval([counts[0] for counts in questions], [counts[1] for counts in questions])
    return Accepted(wrong / all_wrong, interval, correct / all_correct)
