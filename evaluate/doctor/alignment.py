"""Do tokens, states and labels stand beside each other? The drafter's first step is judged with each of them moved by one.

Owns the check `shifts`, the accuracy of every draft step, and that under other settings. Does not know decoding.

Shape legend: T packed tokens, A anchors, P anchors of all samples, K draft steps, E head inputs, Vd draft vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.data.shards.packing import pack
from draftsmith.evaluate.doctor.case import Case, NotChecked, names_target, with_states
from draftsmith.evaluate.doctor.report import Finding
from draftsmith.evaluate.doctor.states import as_named
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.drafters.registry import registry
from draftsmith.models.drafters.returned_shapes import checked_head_inputs
from draftsmith.models.drafters.rollout import PackedBatch, Rollout, data_rollout
from draftsmith.models.target.target import PRE_NORM

_SHIFTS = (-1, 0, 1)
_ROWS = 1024  # logits of so many rows are in memory at a time
_LOSES, _CLEAR = (
    0.02,
    0.10,
)  # another shift is better by more than the first: a fault; shift 0 leads by less than the second: a warning
_TRIED = 16  # samples on which other settings are tried
_FED = 2  # steps that they are judged by: a wrong place of the last norm shows from the second on
_MISCONFIGURED = 0.05  # by which another setting must be better to be named
_DEVIATIONS = 3  # of chance, by which it must lead, too
_ENOUGH = 30  # predictions below which nothing is concluded


def batches(case: Case) -> Iterator[PackedBatch]:
    """The samples one by one, on the drafter's device."""
    for sample in case.samples:
        yield pack([sample], case.trainable.features).to(case.ends.device)


@torch.no_grad()
def guesses(drafter: Drafter, batch: PackedBatch, rollout: Rollout) -> Tensor:
    """int64 [A, K]: the target id that the drafter thinks likeliest at every step of every anchor."""
    if not len(rollout.anchors):
        return rollout.targets
    inputs = checked_head_inputs(drafter, batch, rollout)
    steps = [
        torch.cat([drafter.logits(part_AE, step).argmax(-1) for part_AE in inputs_AE.split(_ROWS)])
        for step, inputs_AE in enumerate(inputs)
    ]
    return drafter.to_target_ids(torch.stack(steps, dim=1))


def shift_labels(batch: PackedBatch, rollout: Rollout, shift: int) -> Tensor:
    """int64 [A]: the token `shift` positions after the one that step 0 predicts.

    At anchor t step 0 predicts x[t + 2]. Example: text `a b c d e`, anchor 0: shift -1 gives b (the root itself), 0 c, +1 d.
    """
    return batch.input_ids[(rollout.anchors + 2 + shift).clamp(max=len(batch.input_ids) - 1)]


def shift_states(batch: PackedBatch, shift: int) -> PackedBatch:
    """The batch with the state of token t + shift at token t; those rolled in from the other end are at nobody's anchor."""
    return replace(batch, hidden={name: states.roll(-shift, 0) for name, states in batch.hidden.items()})


def check_shifts(case: Case) -> Finding:
    """Accuracy of step 0 with labels, and with states, moved by -1, 0 and +1: 0 must win.

    Raises:
        NotChecked: the samples hold too few predictions.
    """
    drafter = case.trainable
    hits = {(kind, shift): 0 for kind in ("labels", "states") for shift in _SHIFTS}
    total = 0
    for batch in batches(case):
        rollout = data_rollout(batch, 1)
        last = len(batch.input_ids) - 1
        # Positions that exist whichever way things are moved, so that all shares are of the same predictions.
        kept_A = rollout.valid[:, 0] & (rollout.anchors >= 1) & (rollout.anchors + 3 <= last)
        total += int(kept_A.sum())
        for shift in _SHIFTS:
            first_A = guesses(drafter, shift_states(batch, shift), rollout)[:, 0]
            hits["states", shift] += int((first_A == rollout.targets[:, 0])[kept_A].sum())
            if shift == 0:
                for moved in _SHIFTS:
                    hits["labels", moved] += int((first_A == shift_labels(batch, rollout, moved))[kept_A].sum())
    if total < _ENOUGH:
        raise NotChecked(f"the samples hold {total} predictions only: raise --samples")
    shares = {key: count / total for key, count in hits.items()}
    # By the layers that this drafter reads: another one may be sound beside them.
    return _judge(shares, total, as_named(case, drafter.features))


def _judge(shares: dict[tuple[str, int], float], total: int, sound: bool) -> Finding:
    own = shares["labels", 0]
    figures = {f"{kind} {shift:+d}": share for (kind, shift), share in shares.items()} | {"predictions": total}
    details = tuple(
        f"{kind} moved by -1, 0, +1: " + ", ".join(f"{shares[kind, shift]:.1%}" for shift in _SHIFTS)
        for kind in ("labels", "states")
    )
    others = {key: share for key, share in shares.items() if key[1] != 0}
    kind, shift = max(others, key=lambda key: others[key])
    rival = others[kind, shift]
    measured = f"step 0 is right at {own:.1%}; next: {kind} {shift:+d} with {rival:.1%}"
    expected = "0 wins clearly"
    if rival > own + _LOSES:
        remedy = f"the drafter is right more often with {kind} moved by {shift:+d}" + (
            f", and this cache is sound: either it learnt from {kind} that were moved (a state one token ahead holds the answer, which "
            "decoding has not), or it has hardly learnt at all (see `steps`, `drafter-file`); train it from this cache"
            if sound
            else f": cache and drafter are {abs(shift)} token apart; extract the cache again, and train from that"
        )
        return Finding("shifts", "fault", measured, expected, remedy, figures, details)
    if own < max(shares["labels", -1], shares["labels", 1]) + _CLEAR:
        remedy = (
            "the drafter has learnt little, or the text repeats one token over and over: look at the samples, train longer, and see the "
            "check `overfit`"
        )
        return Finding("shifts", "warning", measured, expected, remedy, figures, details)
    return Finding("shifts", "ok", measured, expected, "", figures, details)


def check_steps(case: Case) -> Finding:
    """Accuracy at every draft step it was trained for: which depth is lost.

    Raises:
        NotChecked: the samples hold too few predictions.
    """
    drafter = case.trainable
    num_steps = max(1, drafter.config.num_draft_steps)
    right_K, rows_K = torch.zeros(num_steps), torch.zeros(num_steps)
    for batch in batches(case):
        rollout = data_rollout(batch, num_steps)
        correct_AK = (guesses(drafter, batch, rollout) == rollout.targets) & rollout.valid
        right_K += correct_AK.sum(0).cpu()
        rows_K += rollout.valid.sum(0).cpu()
    if float(rows_K[0]) < _ENOUGH:
        raise NotChecked(f"the samples hold {int(rows_K[0])} predictions only: raise --samples")
    shares = [float(share) for share in right_K / rows_K.clamp(min=1)]
    figures = {f"step {step}": share for step, share in enumerate(shares)}
    proxy = 1.0 + float(torch.tensor(shares).cumprod(0).sum())
    figures["proxy tokens per step"] = proxy
    measured = " ".join(f"{share:.0%}" for share in shares) + f" (proxy: {proxy:.2f} tokens per step)"
    if shares[0] < 0.3:
        remedy = "the first draft step is mostly wrong on the training's own text: train longer; see `overfit`, `states` and `labels` first"
        if not names_target(case.inputs.folder):
            remedy += "; the drafter's folder names no target, and one that was made for another target of these sizes loads as well"
        return Finding("steps", "warning", measured, "step 0 above 30%", remedy, figures)
    return Finding("steps", "ok", measured, "step 0 above 30%", "", figures)


def check_settings(case: Case) -> Finding:
    """Accuracy under settings that the tensors fit as well, such as the place of a norm or the layers that are read.

    Another setting is named where it is better by 5 points, and leads by more than chance: see :func:`_leads`. Of several, the best one.

    Raises:
        NotChecked: the samples hold too few predictions, or lack the states that every other setting reads.
    """
    drafter = case.trainable
    family = registry().get(drafter.config.model_type)
    if family is None or type(drafter) is not family.drafter:
        raise NotChecked("it is made of others, whose folders are checked one by one")
    num_steps = min(_FED, max(1, drafter.config.num_draft_steps))
    own_PK = _outcomes(case, drafter, num_steps)
    own, total = _share(own_PK), int((own_PK >= 0).sum())
    if total < _ENOUGH:
        raise NotChecked(f"the samples hold {total} predictions only: raise --samples")
    shares, leads, fitting = dict[str, float](), dict[str, bool](), 0
    for setting, other in variants(case):  # one copy of the weights at a time
        fitting += 1
        if _has_states(case, other):
            other_PK = _outcomes(case, other, num_steps)
            shares[setting], leads[setting] = _share(other_PK), _leads(other_PK, own_PK)
    expected = "no other leads by 5 points and more than chance"
    if not fitting:
        measured = "its tensors fit no other settings"
        return Finding("settings", "ok", measured, expected, "", {"as configured": own})
    if not shares:
        raise NotChecked("the samples lack the states that other settings read: leave --ends-only out")
    better = [name for name, share in shares.items() if leads[name] and share > own + _MISCONFIGURED]
    setting = max(better or shares, key=lambda name: shares[name])
    measured = f"right at {own:.1%} as its config says; with {setting} at {shares[setting]:.1%}"
    figures = {"as configured": own, **shares, "predictions": total}
    if not better:
        return Finding("settings", "ok", measured, expected, "", figures)
    remedy = (
        f"the weights were trained with {setting}: correct that in the config.json of {case.inputs.folder}, or fetch both files of one "
        "export; its acceptance is measured with the wrong setting until then"
    )
    return Finding("settings", "fault", measured, expected, remedy, figures)


def variants(case: Case) -> Iterator[tuple[str, Drafter]]:
    """The same weights under each other setting that they fit: a flag turned, the layers moved by one, the blocks that riders enter."""
    drafter = case.trainable
    fields = {name: getattr(drafter.config, name) for name in drafter.config.rules}
    for setting, changed in _other_settings(fields, case.ends.config.num_hidden_layers):
        view = _under(case, fields | changed)
        if view is not None:
            yield setting, view


def _has_states(case: Case, drafter: Drafter) -> bool:
    """Whether the samples have the states that a drafter reads, or the whole target is there to compute them."""
    return case.target is not None or all(name in sample.hidden for sample in case.samples for name in drafter.features)


def _under(case: Case, fields: Mapping[str, Any]) -> Drafter | None:
    """The drafter's weights under other settings, attached; None where they do not fit, or the target takes no such drafter."""
    drafter, kind = case.trainable, type(case.trainable)
    specs, tensors = module_table(kind, drafter.config).specs, drafter.state_dict()
    for steps in (fields["num_draft_steps"], fields["num_draft_steps"] - 1):  # a block may have one slot less then
        config = kind.config_class(**{**fields, "num_draft_steps": steps})
        if steps < 1 or config.fault() or module_table(kind, config).specs != specs:
            continue
        module = assemble(kind, config, tensors)
        nn.Module.to(module, case.ends.device)
        try:
            return module.for_any_target().bound(case.ends)
        except ValueError:  # the target has no such block
            return None
    return None


def _other_settings(fields: Mapping[str, Any], depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be set otherwise, in words and as fields. ``depth``: blocks of the target."""
    for name, value in fields.items():
        if isinstance(value, bool):
            yield f"{name} {str(not value).lower()}", {name: not value}
    names = [re.fullmatch(r"layer\.(\d+)\.output|" + re.escape(PRE_NORM), name) for name in fields.get("layers") or ()]
    if names and all(names):
        blocks = [int(name[1] or depth - 1) for name in names if name]
        for shift in (-1, 1):
            moved = [block + shift for block in blocks]
            if 0 <= min(moved) <= max(moved) < depth:
                named = [PRE_NORM if block + 1 == depth else f"layer.{block}.output" for block in moved]
                yield f"layers {', '.join(named)}", {"layers": named}
    if entries := fields.get("entries"):
        for shift in (-1, 1):
            moved = [entry + shift for entry in entries]
            if 0 <= min(moved) <= max(moved) < depth:
                yield f"entries {moved}", {"entries": moved}


def _outcomes(case: Case, drafter: Drafter, num_steps: int) -> Tensor:
    """int8 [P, K]: 1 where a prediction of the first steps over some samples is right, 0 where it is wrong, -1 where there is none."""
    parts = [torch.empty(0, num_steps, dtype=torch.int8)]
    for sample in case.samples[:_TRIED]:
        if case.target is not None:
            sample = with_states(sample, drafter.features, case.target)
        batch = pack([sample], drafter.features).to(case.ends.device)
        rollout = data_rollout(batch, min(num_steps, drafter.max_draft_steps or num_steps))
        right_AK = (guesses(drafter, batch, rollout) == rollout.targets).to(torch.int8)
        right_AK = right_AK.masked_fill(~rollout.valid, -1).cpu()
        parts.append(nn.functional.pad(right_AK, (0, num_steps - right_AK.shape[1]), value=-1))
    return torch.cat(parts)


def _share(outcomes_PK: Tensor) -> float:
    return int((outcomes_PK == 1).sum()) / max(1, int((outcomes_PK >= 0).sum()))


def _leads(other_PK: Tensor, own_PK: Tensor) -> bool:
    """Whether another setting is right more often than chance explains, on the predictions that both make.

    Only those count that one of the two gets right and the other does not. By chance each is as likely the other's as the own: of n, the
    lead deviates by sqrt(n).
    """
    both_PK = (other_PK >= 0) & (own_PK >= 0)
    difference_PK = (other_PK - own_PK) * both_PK
    return int(difference_PK.sum()) > _DEVIATIONS * float(difference_PK.abs().sum()) ** 0.5
