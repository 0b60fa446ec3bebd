"""Can a drafter learn one sample by heart? If not, features, masks or the learning rate are broken, and more data will not help.

Owns the check `overfit`: a fresh drafter of the same family, one sample, some tens of steps. Does not know Lightning.
"""

from __future__ import annotations

import copy
import inspect
import time
from dataclasses import dataclass

import torch

from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.doctor.alignment import guesses
from draftsmith.evaluate.doctor.case import Case, NotChecked, portion
from draftsmith.evaluate.doctor.report import Finding, Verdict
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import fresh_drafter
from draftsmith.models.drafters.registry import family_of
from draftsmith.models.drafters.rollout import PackedBatch, data_rollout
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run

_TOKENS, _LABELS = 256, 16  # at most so many tokens, at least so many labels
_LEARNT, _GAVE_UP = 0.95, 0.80
_USUAL_LR = 3e-3
_SECONDS = 180  # a drafter for a large target may take hours on a CPU


@dataclass(frozen=True)
class Learnt:
    """Step-0 accuracy on the one sample before and after, the steps taken, and the learning rate."""

    before: float
    after: float
    steps: int
    lr: float


def check_overfit(case: Case, max_steps: int) -> Finding:
    """Trains on one sample with the run's learning rate; if that fails, once more with a usual one.

    Raises:
        NotChecked: it is switched off, takes too long, or no sample has labels enough that the draft vocabulary holds.
    """
    if max_steps < 1:
        raise NotChecked("left out by --overfit-steps 0")
    trained = case.trainable
    sample, batch = _one_sample(case)
    reachable = _reachable(trained, batch)
    if not reachable > 0.0:  # nan where the part has labels, but none behind another
        raise NotChecked("the draft vocabulary has none of the sample's labelled tokens: see `draft-vocabulary`")
    lr = float(case.inputs.record.get("lr") or _USUAL_LR)
    learnt = learn(case, batch, lr, max_steps, reachable)
    expected = f"{_LEARNT:.0%} or more within {max_steps} steps"
    share = learnt.after / reachable
    measured = f"step 0: {learnt.before:.0%} -> {learnt.after:.0%} in {learnt.steps} steps at lr {lr:g} ({sample.id})"
    figures = {"before": learnt.before, "after": learnt.after, "reachable": reachable, "steps": learnt.steps, "lr": lr}
    if share >= _LEARNT:
        return Finding("overfit", "ok", measured, expected, "", figures)
    again = learn(case, batch, _USUAL_LR, max_steps, reachable) if lr != _USUAL_LR else learnt
    figures |= {f"after at lr {_USUAL_LR:g}": again.after}
    if again.after / reachable >= _LEARNT:
        verdict: Verdict = "fault" if share < _GAVE_UP else "warning"
        remedy = f"the learning rate is the cause: with {_USUAL_LR:g} it reaches {again.after:.0%} on the same sample; change lr"
        return Finding("overfit", verdict, measured, expected, remedy, figures)
    remedy = (
        "neither this learning rate nor a usual one learns a single sample: states, labels or vocabulary do not fit together; see "
        "`sound-states`, `states`, `labels`, `draft-vocabulary`, or give it more time (--overfit-steps)"
    )
    return Finding("overfit", "fault" if share < _GAVE_UP else "warning", measured, expected, remedy, figures)


def learn(case: Case, batch: PackedBatch, lr: float, max_steps: int, reachable: float) -> Learnt:
    """A fresh drafter after at most `max_steps` steps of AdamW on one batch, by plain cross-entropy of the first draft step.

    Raises:
        NotChecked: the steps take too long.
    """
    drafter = fresh(case)
    ends = case.ends
    objective = Objective(1)
    lesson = prepare(objective, batch, inverse_draft_ids(drafter.draft_ids(), ends.vocab_size).to(ends.device))
    weights = 1.0 / lesson.loss_rows.float().clamp(min=1.0)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in drafter.parameters() if parameter.requires_grad], lr=lr, weight_decay=0.0
    )
    before = after = accuracy(drafter.eval(), batch)
    began = time.monotonic()
    for step in range(max_steps):
        if time.monotonic() - began > _SECONDS:
            raise NotChecked(
                f"{step} of {max_steps} steps took {_SECONDS} seconds and brought {after:.0%}: give it a faster --device"
            )
        if after >= 0.999 * reachable:
            return Learnt(before, after, step, lr)
        loss = run(objective, lesson, drafter.train(), ends, weights, False).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 4 or step + 1 == max_steps:
            after = accuracy(drafter.eval(), batch)
    return Learnt(before, after, max_steps, lr)


def fresh(case: Case) -> Drafter:
    """A drafter as its training began: of the same family, shape and draft vocabulary, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        made = _as_begun(case)
        if made is None:  # the record tells of another shape, or of none: the config alone still makes one
            made = type(case.trainable)(copy.deepcopy(case.trainable.config))
            if made.d2t is not None:
                made.set_draft_ids(case.trainable.draft_ids().cpu())
    torch.nn.Module.to(made, case.ends.device)
    return made.for_any_target().bound(case.ends)


def _as_begun(case: Case) -> Drafter | None:
    """By its family's settings, from the record and else from the config; None where that gives another drafter than the trained one."""
    trained = case.trainable
    recorded = dict(case.inputs.record.get("drafter") or {})
    family = family_of(trained).settings
    names = list(inspect.signature(family).parameters)
    settings = {name: getattr(trained.config, name) for name in names if hasattr(trained.config, name)}
    settings |= {name: value for name, value in recorded.items() if name in names}
    ids = None if trained.d2t is None else trained.draft_ids().cpu()
    try:
        made = fresh_drafter(family(**settings), case.ends, ids, trained.config.num_draft_steps, "")
    except ValueError:  # a shape of somebody else's, which this family does not start from the target
        return None
    return made if _shapes(made) == _shapes(trained) and made.features == trained.features else None


def _shapes(drafter: Drafter) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in drafter.state_dict().items()}


def accuracy(drafter: Drafter, batch: PackedBatch) -> float:
    """Step-0 accuracy over the batch's labelled predictions."""
    rollout = data_rollout(batch, 1)
    valid = rollout.valid[:, 0]
    return float((guesses(drafter, batch, rollout)[:, 0] == rollout.targets[:, 0])[valid].float().mean())


def _reachable(drafter: Drafter, batch: PackedBatch) -> float:
    """The share of the batch's predictions that the draft vocabulary can express."""
    rollout = data_rollout(batch, 1)
    return float(torch.isin(rollout.targets[:, 0][rollout.valid[:, 0]], drafter.draft_ids()).float().mean())


def _one_sample(case: Case) -> tuple[CachedSample, PackedBatch]:
    """The first sample with labels enough, cut to the text around its first label."""
    for sample in case.samples:
        labelled = torch.nonzero(sample.loss_mask).flatten()
        if len(labelled) >= _LABELS:
            first = int(labelled[0])
            start, stop = max(0, first - _TOKENS // 2), first + _TOKENS // 2
            short = portion(sample, start, stop)
            return sample, pack([short], case.trainable.features).to(case.ends.device)
    raise NotChecked(f"no sample has {_LABELS} labelled tokens: raise --samples")
