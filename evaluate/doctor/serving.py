"""Does the drafter say in decoding what it said in training? The trained one in its training form against the served one, draft by draft.

Owns the checks `train-serve` and `drafter-file`. Does not know engines, trees or verification: it feeds the drafter the text itself.

Shape legend: T tokens of a sample, R roots, K draft steps, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.data.shards.packing import pack
from draftsmith.evaluate.doctor.case import Case, NotChecked
from draftsmith.evaluate.doctor.report import Finding, Verdict
from draftsmith.evaluate.doctor.tree_serving import riding, tree_and_chain_logits
from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.returned_shapes import checked_expander, checked_head_inputs
from draftsmith.models.drafters.rollout import PackedBatch, data_rollout
from draftsmith.models.files.finite import is_finite
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.trunk.riders import RIDERS

_NUM_ROOTS = 3
_MAX_SAMPLES = 16
_AGREE, _MOSTLY = 0.99, 0.95  # shares of equal argmax: sound; below the second, a fault
_SAME_FILE = 0.01  # relative difference of logits that no two ways of computing the same float32 weights have
_NARROW_FILE = 0.05  # the same of narrower weights
_SAME_TREE = 0.2  # the same of one drafter in a narrower dtype, in a tree and in a chain: rounding stays below it


@dataclass(frozen=True)
class Compared:
    """Two drafters' logits at the same places: largest difference, the same relative to the largest logit, shares of equal argmax."""

    max_difference: float
    relative: float
    agreement: float
    predictions: int


@torch.no_grad()
def trained_logits(drafter: Drafter, batch: PackedBatch, roots: list[int], num_steps: int) -> Tensor:
    """float32 [R, K, Vd]: training's own forward at the anchors before the roots."""
    inputs_KRE = _trained_inputs(drafter, batch, roots, num_steps)
    return drafter.rollout_logits(inputs_KRE).float().transpose(0, 1)


@torch.no_grad()
def choosing_logits(drafter: Drafter, batch: PackedBatch, roots: list[int], num_steps: int) -> Tensor:
    """float32 [R, K, Vd]: what training's own forward chooses the few tokens by that can be drafted at each place."""
    inputs_KRE, weight = _trained_inputs(drafter, batch, roots, num_steps), drafter.head_weight
    logits_KRV = F.linear(inputs_KRE[..., : weight.shape[1]].to(weight.dtype), weight)
    return drafter.without_mask(logits_KRV).float().transpose(0, 1)


def _trained_inputs(drafter: Drafter, batch: PackedBatch, roots: list[int], num_steps: int) -> Tensor:
    """[K, R, E]: what training gives the heads at the anchors before the roots."""
    rollout = data_rollout(batch, num_steps)
    place = {anchor: row for row, anchor in enumerate(rollout.anchors.tolist())}
    rows = torch.tensor([place[root - 1] for root in roots], device=rollout.anchors.device)
    return checked_head_inputs(drafter, batch, rollout)[:, rows]


@torch.no_grad()
def served_logits(drafter: Drafter, batch: PackedBatch, roots: list[int], num_steps: int) -> Tensor:
    """float32 [R, K, Vd]: what decoding computes when the text itself is drafted and accepted from root to root.

    The text up to the first root is the prompt; `start`, `expander` and `advance` are called as the engine calls them.
    """
    ids, device = batch.input_ids, batch.input_ids.device
    limits = DraftLimits(draft_length=num_steps)

    def emitted(before: int, root: int) -> Emitted:
        """Tokens before + 1 to root, each with the state before it."""
        states = {name: batch.hidden[name][None, before:root] for name in drafter.features}
        if drafter.riders is not None:
            states[RIDERS] = riding(drafter, batch, torch.arange(before, root, device=device), num_steps)
        return Emitted(ids[None, before + 1 : root + 1], states, torch.tensor([root - before], device=device))

    state = drafter.start(Opening(emitted(0, roots[0]), ids[:1], limits, room=len(ids) + num_steps))
    drafts, before = [], 0
    for root in roots:
        if before:
            state = drafter.advance(state, emitted(before, root))
        cycle = Cycle(torch.tensor([root], device=device), [root], [root - before])
        draft = checked_expander(drafter, state, cycle, limits)
        logits = [draft.begin()]
        for step in range(1, num_steps):
            token = ids[None, root + step, None]
            logits.append(draft.extend(token, torch.zeros_like(token)))
        drafts.append(torch.cat(logits, 1)[0].float())
        before = root
    return torch.stack(drafts)


def roots_of(loss_mask: Tensor, num_steps: int) -> list[int]:
    """Up to three labelled positions, evenly spread, that have a token before and `num_steps` after them.

    Example: mask `0011111111`, 2 steps -> [2, 4, 7].
    """
    fitting = [int(place) for place in torch.nonzero(loss_mask).flatten() if 1 <= place < len(loss_mask) - num_steps]
    if len(fitting) <= _NUM_ROOTS:
        return fitting
    return [fitting[number * (len(fitting) - 1) // (_NUM_ROOTS - 1)] for number in range(_NUM_ROOTS)]


def compare_forms(case: Case) -> Compared:
    """The trained drafter in training's form against the served one in decoding's.

    Raises:
        NotChecked: no sample is long enough, or the two have draft vocabularies of different sizes.
    """
    trained, served = case.trainable, case.drafter
    num_steps = max(1, min(trained.config.num_draft_steps, 5))
    most, largest, equal, count = 0.0, 1e-12, 0, 0
    for sample in case.samples[:_MAX_SAMPLES]:
        roots = roots_of(sample.loss_mask, num_steps)
        if not roots:
            continue
        batch = pack([sample], trained.features).to(case.ends.device)
        before = trained_logits(trained, batch, roots, num_steps)
        after = served_logits(served, batch, roots, num_steps)
        if before.shape != after.shape:
            raise NotChecked(
                f"the two have draft vocabularies of {before.shape[-1]} and {after.shape[-1]} tokens: see `drafter-file`"
            )
        if trained.num_candidates is not None:
            before, after = without_ties(before, after, choosing_logits(trained, batch, roots, num_steps), served.dtype)
        equal += int((before.argmax(-1) == after.argmax(-1)).sum())
        before, after = _scored(before, after)
        most = max(most, float((before - after).abs().max()))
        largest = max(largest, _largest(before))
        count += before.shape[0] * before.shape[1]
    if not count:
        raise NotChecked(f"no sample has a labelled token with {num_steps} tokens behind it: raise --samples")
    return Compared(most, most / largest, equal / count, count)


def compare_tree(case: Case) -> Compared:
    """The served drafter in a tree against itself in chains, behind one root of one sample; `compare_forms` has found such a sample."""
    served, num_steps = case.drafter, max(1, min(case.trainable.config.num_draft_steps, 5))
    sample = next(sample for sample in case.samples if roots_of(sample.loss_mask, num_steps))
    batch = pack([sample], served.features).to(case.ends.device)
    tree_NV, chain_NV = tree_and_chain_logits(served, batch, roots_of(sample.loss_mask, num_steps)[0])
    equal = float((tree_NV.argmax(-1) == chain_NV.argmax(-1)).float().mean())
    tree_NV, chain_NV = _scored(tree_NV, chain_NV)
    most = float((tree_NV - chain_NV).abs().max())
    return Compared(most, most / max(1e-12, _largest(chain_NV)), equal, len(tree_NV))


def without_ties(before: Tensor, after: Tensor, chosen_by: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Leave out tokens that only one form drafts because rounding turned a tie for the last of the few places.

    A GPU rounds the two forms differently, since it multiplies matrices of other shapes.

    Args:
        before: float32 [..., Vd], minus infinity at tokens that are not drafted.
        after: the same of the other form.
        chosen_by: float32 [..., Vd], the logits by which ``before`` chose its tokens.
        dtype: of the form with more rounding.

    Returns:
        Both, with minus infinity at tokens that one of them drafts and whose logit is the last chosen one's but for rounding. Where they
        draft different numbers of tokens, nothing is left out.
    """
    never_before, never_after = before == -torch.inf, after == -torch.inf
    last = chosen_by.masked_fill(never_before, torch.inf).amin(-1, keepdim=True)
    rounding = (_SAME_FILE if dtype == torch.float32 else _NARROW_FILE) * _largest(chosen_by)
    same_number = never_before.sum(-1, keepdim=True) == never_after.sum(-1, keepdim=True)
    tied = (never_before != never_after) & ((chosen_by - last).abs() <= rounding) & same_number
    return before.masked_fill(tied, -torch.inf), after.masked_fill(tied, -torch.inf)


def _scored(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Both with 0 where neither drafts a token, float [..., Vd]: some drafters score a few tokens of each place alone.

    Where only one of the two drafts it, minus infinity stays, and so their difference is infinite.
    """
    never = (before == -torch.inf) & (after == -torch.inf)
    return before.masked_fill(never, 0.0), after.masked_fill(never, 0.0)


def _largest(logits: Tensor) -> float:
    """The largest of the finite logits, whatever their signs; 0 where there are none."""
    return float(logits.where(logits.isfinite(), 0.0).abs().max())


def check_serving(case: Case) -> Finding:
    """Logits of training's forward against decoding's through the served file, along texts; and a tree's against those of chains."""
    compared, tree = compare_forms(case), compare_tree(case)
    dtypes = [str(drafter.dtype).removeprefix("torch.") for drafter in (case.trained, case.drafter)]
    through = f"trained {dtypes[0]}, served {dtypes[1]}" if dtypes[0] != dtypes[1] else dtypes[0]
    equal = f"argmax equal at {compared.agreement:.1%} of {compared.predictions}"
    measured = f"{equal}, logits within {compared.max_difference:.2g} ({through})"
    figures = {
        "agreement": compared.agreement,
        "max difference": compared.max_difference,
        "relative difference": compared.relative,
        "predictions": compared.predictions,
        "tree agreement": tree.agreement,
        "tree relative difference": tree.relative,
        "tree nodes": tree.predictions,
    }
    same = dtypes[0] == dtypes[1] == "float32"
    expected = f"{_AGREE:.0%} or more" + (f", within {_SAME_FILE:.0%} of the largest logit" if same else "")
    if tree.relative > (_SAME_FILE if case.drafter.dtype == torch.float32 else _SAME_TREE):
        apart = f"in a tree, argmax equal to that of a chain at {tree.agreement:.1%} of {tree.predictions} nodes"
        remedy = (
            "this family drafts other tokens behind the branches of a tree than in a chain: let `extend` of its draft take what a node "
            "reads from the node above it, above_BM; until then decode with chains"
        )
        return Finding("train-serve", "fault", f"{measured}; {apart}", expected, remedy, figures)
    exact = compared.relative <= _SAME_FILE or not same
    if compared.agreement >= _AGREE and exact:
        return Finding("train-serve", "ok", measured, expected, "", figures)
    remedy = (
        "what is served is not what was trained: export the drafter again from the training's folder and compare with `drafter-file`; if "
        "its files agree, the two forms of this family disagree, which is a fault of the family's code: report it to its authors"
        if same or compared.agreement < _MOSTLY
        else f"{dtypes[1]} rounds some likeliest tokens away: serve in {dtypes[0]}, or evaluate whether it costs anything"
    )
    verdict: Verdict = "fault" if compared.agreement < _MOSTLY or not exact else "warning"
    return Finding("train-serve", verdict, measured, expected, remedy, figures)


def check_file(case: Case) -> Finding:
    """Tensors of the served file: finite, and those of the folder that it was exported from."""
    own = case.drafter.state_dict()
    broken = sorted(name for name, tensor in own.items() if not _finite(tensor))
    parameters = sum(tensor.numel() for tensor in own.values())
    measured = f"{parameters:,} numbers in {len(own)} tensors, {str(case.drafter.dtype).removeprefix('torch.')}"
    expected = "finite, as trained"
    if broken:
        remedy = "training diverged: lower lr or set trainer.gradient_clip_val, and train again"
        if case.trained is not case.drafter and _all_finite(case.trained):
            remedy = f"{case.inputs.origin}, which it was exported from, is whole: export it again"
        return Finding(
            "drafter-file",
            "fault",
            f"NaN or infinity in {', '.join(broken[:3])}",
            expected,
            remedy,
            {"broken": len(broken)},
        )
    if case.trained is case.drafter:
        # Biases may well be zero, and so is the head of a drafter whose training begins there.
        empty = [
            name for name, tensor in own.items() if tensor.ndim > 1 and tensor.is_floating_point() and not tensor.any()
        ]
        figures = {"numbers": parameters, "all zero": len(empty)}
        rows = _rows_of_zeros(case.drafter, len(case.tokenizer))
        if empty:
            remedy = "these weights say nothing: they never learnt (fresh, or left out of training), or the file was damaged; train again"
            zero = f"{len(empty)} of {len(own)} tensors are all zero: {', '.join(empty[:3])}"
            return Finding("drafter-file", "warning", zero, expected, remedy, figures)
        if rows:
            remedy = "these rows say nothing: the file was damaged, or a step of its conversion left them out; copy or export it again"
            zero = ", ".join(f"{count} of {len(own[name])} rows of {name}" for name, count in list(rows.items())[:3])
            figures |= {f"zero rows of {name}": count for name, count in rows.items()}
            return Finding("drafter-file", "warning", f"all zero: {zero}", expected, remedy, figures)
        if case.inputs.exported:
            measured += "; not compared with what was trained, which is not there or had an adapter merged into it"
        return Finding("drafter-file", "ok", measured, expected, "", figures)
    trained = case.trained.state_dict()
    changed = {name: _away(trained.get(name), own.get(name)) for name in sorted(own.keys() | trained.keys())}
    worst = max(changed, key=lambda name: changed[name])
    figures = {"numbers": parameters, "largest change": changed[worst]}
    # bfloat16 keeps 8 bits of a number, float16 11.
    allowed = 0.0 if case.drafter.dtype == case.trained.dtype else 2.0**-8
    if changed[worst] <= allowed:
        return Finding("drafter-file", "ok", f"{measured}, as in {case.inputs.origin}", expected, "", figures)
    names = [name for name, change in changed.items() if change > allowed]
    remedy = f"it is not what {case.inputs.origin} holds (trained on since, or altered): export it again"
    measured = f"{len(names)} tensors differ from {case.inputs.origin}: {', '.join(names[:3])}"
    return Finding("drafter-file", "fault", measured, expected, remedy, figures)


def _rows_of_zeros(drafter: Drafter, num_tokens: int) -> dict[str, int]:
    """How many rows of a matrix are zero where others are not, by its name. Rows behind the tokenizer's last token are padding."""
    counts = {}
    for name, tensor in drafter.state_dict().items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            continue
        is_vocabulary = len(tensor) == drafter.config.vocab_size
        count = int((tensor[:num_tokens] if is_vocabulary else tensor).eq(0).all(-1).sum())
        if 0 < count < len(tensor):
            counts[name] = count
    return counts


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or is_finite(tensor)


def _all_finite(drafter: Drafter) -> bool:
    return all(_finite(tensor) for tensor in drafter.state_dict().values())


def _away(before: Tensor | None, after: Tensor | None) -> float:
    """The largest change, relative to the tensor's largest number; infinite where shapes differ or one is not there."""
    if before is None or after is None or before.shape != after.shape:
        return float("inf")
    largest = float(before.abs().max()) if before.numel() else 0.0
    change = float((before.double() - after.double()).abs().max()) if before.numel() else 0.0
    return change / max(largest, 1e-12)
