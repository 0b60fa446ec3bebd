"""The chunked losses against their eager twins, in double precision, and what they promise about memory and dtypes."""

from dataclasses import dataclass, field, replace
from typing import TypedDict, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.train.losses import (
    OUTSIDE,
    StepSums,
    TeacherLogits,
    TopEmphasis,
    feature_smooth_l1,
    group_by_teacher,
    head_cross_entropy,
    head_distillation,
)
from draftsmith.train.losses.divergences import DivergenceLoss, HeadDivergence
from draftsmith.train.losses.eager import (
    feature_smooth_l1_eager,
    head_cross_entropy_eager,
    head_distillation_eager,
)

STEPS, ANCHORS, WIDTH, VOCAB = 3, 11, 6, 17


@dataclass(frozen=True)
class Case:
    head_inputs: Tensor
    head_weight: Tensor
    targets: Tensor
    valid: Tensor
    step_weights: Tensor
    teacher_logits: Tensor
    teacher_rows: Tensor
    heads: tuple[Tensor, ...] = ()


def make_case(dtype: torch.dtype = torch.float64, seed: int = 0, anchors: int = ANCHORS, vocab: int = VOCAB) -> Case:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, vocab, (anchors, STEPS), generator=generator)
    return Case(
        head_inputs=torch.randn(STEPS, anchors, WIDTH, generator=generator, dtype=dtype).requires_grad_(),
        head_weight=torch.randn(vocab, WIDTH, generator=generator, dtype=dtype).requires_grad_(),
        targets=targets,
        valid=torch.rand(anchors, STEPS, generator=generator) < 0.8,
        step_weights=torch.tensor([1.0, 0.8, 0.64], dtype=dtype),
        teacher_logits=3 * torch.randn(anchors + STEPS, vocab, generator=generator, dtype=dtype),
        teacher_rows=torch.arange(anchors)[:, None] + torch.arange(STEPS)[None],
    )


KEPT = torch.tensor([place % 3 != 1 for place in range(ANCHORS + STEPS)])
LOG_MASS = torch.linspace(0.3, 1.0, ANCHORS + STEPS, dtype=torch.float64).log()


class Extra(TypedDict, total=False):
    """What head_distillation and its twin take beside the usual."""

    divergence: DivergenceLoss
    text_weight: float
    d_pace: float


@dataclass(frozen=True)
class Teaching:
    """What is learned, and of which teacher."""

    kept: Tensor | None = None
    emphasis: TopEmphasis | None = None
    log_mass: Tensor | None = None
    extra: Extra = field(default_factory=Extra)


TEACHINGS = {
    "cross_entropy": Teaching(),
    "d-pace": Teaching(extra={"d_pace": 0.3}),
    "distillation": Teaching(),
    "top-k": Teaching(emphasis=TopEmphasis(0.7, 3)),
    "kept": Teaching(KEPT),
    "top-k of kept": Teaching(KEPT, TopEmphasis(1.5, 4)),
    "text beside": Teaching(KEPT, extra={"text_weight": 0.3}),
    "paced kl": Teaching(log_mass=LOG_MASS, extra={"d_pace": 0.5}),
    "paced kept acceptance": Teaching(
        KEPT, log_mass=LOG_MASS, extra={"divergence": DivergenceLoss("negative_log_acceptance"), "d_pace": 0.0}
    ),
    "dspark": Teaching(
        KEPT, log_mass=LOG_MASS, extra={"divergence": DivergenceLoss("l1"), "text_weight": 0.1, "d_pace": 0.5}
    ),
    **{
        name: Teaching(log_mass=LOG_MASS, extra={"divergence": DivergenceLoss(name)})
        for name in get_args(HeadDivergence)
    },
}
OF_TEXT = ("cross_entropy", "d-pace")
BY_ROW = ("cross_entropy", "distillation", "top-k", "kept", "top-k of kept")
"""Losses whose rows have weights of their own, whatever the other rows of their anchor are."""


def cross_entropy(
    case: Case, chunk_rows: int | None = None, metrics: bool = True, d_pace: float | None = None
) -> StepSums:
    heads, given = case.heads or case.head_weight, (case.targets, case.valid, case.step_weights, chunk_rows, metrics)
    return head_cross_entropy(case.head_inputs, heads, *given, d_pace=d_pace)


def teacher_of(case: Case, teaching: Teaching, rows: Tensor) -> TeacherLogits:
    of_rows = (None if each is None else each[rows] for each in (teaching.kept, teaching.log_mass))
    return TeacherLogits(case.teacher_logits[rows], *of_rows)


def fast_of(case: Case, kind: str, chunk_rows: int | None = None) -> StepSums:
    teaching = TEACHINGS[kind]
    if kind in OF_TEXT:
        return cross_entropy(case, chunk_rows, d_pace=teaching.extra.get("d_pace"))
    return distillation(case, chunk_rows, teaching)


def distillation(
    case: Case,
    chunk_rows: int | None = None,
    teaching: Teaching = Teaching(),
    entropy: bool = True,
    keep_accepted: bool = False,
) -> StepSums:
    return head_distillation(
        case.head_inputs,
        case.heads or case.head_weight,
        lambda rows: teacher_of(case, teaching, rows),
        case.teacher_rows,
        case.targets,
        case.valid,
        case.step_weights,
        chunk_rows,
        emphasis=teaching.emphasis,
        entropy=entropy,
        keep_accepted=keep_accepted,
        **teaching.extra,
    )


def eager(case: Case, kind: str) -> StepSums:
    teaching = TEACHINGS[kind]
    if kind in OF_TEXT:
        given = (case.head_inputs, case.head_weight, case.targets, case.valid, case.step_weights)
        return head_cross_entropy_eager(*given, d_pace=teaching.extra.get("d_pace"))
    return head_distillation_eager(
        case.head_inputs,
        case.head_weight,
        TeacherLogits(case.teacher_logits, teaching.kept, teaching.log_mass),
        case.teacher_rows,
        case.targets,
        case.valid,
        case.step_weights,
        teaching.emphasis,
        **teaching.extra,
    )


def gradients(sums: StepSums, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(1.7 * sums.total, (case.head_inputs, case.head_weight))


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("kind", TEACHINGS)
def test_the_chunked_loss_and_its_gradients_equal_the_eager_twin(kind: str, chunk_rows: int) -> None:
    case = make_case()
    fast = fast_of(case, kind, chunk_rows)
    plain = eager(case, kind)
    for name in ("total", "loss_sum", "loss_rows", "rows", "top1", "top5"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), msg=name)
    for fast_grad, plain_grad in zip(gradients(fast, case), gradients(plain, case), strict=True):
        torch.testing.assert_close(fast_grad, plain_grad)


@pytest.mark.parametrize("kind", BY_ROW)
def test_the_hand_written_gradient_equals_finite_differences(kind: str) -> None:
    case = make_case(anchors=4, vocab=5)

    def total(head_inputs: Tensor, head_weight: Tensor) -> Tensor:
        moved = Case(**{**case.__dict__, "head_inputs": head_inputs, "head_weight": head_weight})
        return fast_of(moved, kind, 3).total

    assert torch.autograd.gradcheck(total, (case.head_inputs, case.head_weight))


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("kind", [*BY_ROW, "text beside", "lk_hybrid"])
def test_heads_of_their_own_give_each_step_the_sums_and_gradients_of_that_step_alone(
    kind: str, chunk_rows: int
) -> None:
    case = make_case()
    heads = tuple(case.head_weight.detach().roll(step, 0).requires_grad_(step != 1) for step in range(STEPS))
    fast = fast_of(replace(case, heads=heads), kind, chunk_rows)
    fast.total.backward()
    assert heads[1].grad is None, "it is frozen"
    for step, head in enumerate(heads):
        alone = step_alone(case, head, step)
        plain = eager(alone, kind)
        for name in ("loss_sum", "loss_rows", "rows", "top1", "top5"):
            torch.testing.assert_close(getattr(fast, name)[step], getattr(plain, name)[0], msg=name)
        plain.total.backward()
        assert case.head_inputs.grad is not None
        assert alone.head_inputs.grad is not None
        torch.testing.assert_close(case.head_inputs.grad[step], alone.head_inputs.grad[0])
        if head.grad is not None:
            torch.testing.assert_close(head.grad, alone.head_weight.grad)


@pytest.mark.parametrize("num_heads", [1, STEPS])
@pytest.mark.parametrize("kind", ["cross_entropy", "distillation"])
def test_a_head_in_two_parts_gives_what_the_whole_one_gives(kind: str, num_heads: int) -> None:
    case = make_case()
    plain = fast_of(case, kind, 4)
    wanted = torch.autograd.grad(plain.total, (case.head_inputs, case.head_weight))
    parts = case.head_weight.detach().split([4, WIDTH - 4], dim=1)
    heads, correction = [parts[0].clone().requires_grad_() for _ in range(num_heads)], parts[1].clone().requires_grad_()
    given = (case.targets, case.valid, case.step_weights, 4)
    if kind == "cross_entropy":
        sums = head_cross_entropy(case.head_inputs, heads, *given, correction=correction)
    else:
        sums = head_distillation(
            case.head_inputs,
            heads,
            lambda rows: TeacherLogits(case.teacher_logits[rows]),
            case.teacher_rows,
            *given,
            correction=correction,
        )
    for name in ("total", "loss_sum", "loss_rows", "rows", "top1", "top5"):
        torch.testing.assert_close(getattr(sums, name), getattr(plain, name), msg=name)
    of_inputs, of_correction, *of_heads = torch.autograd.grad(sums.total, (case.head_inputs, correction, *heads))
    torch.testing.assert_close(of_inputs, wanted[0])
    torch.testing.assert_close(torch.cat([torch.stack(of_heads).sum(0), of_correction], dim=1), wanted[1])


def step_alone(case: Case, head: Tensor, step: int) -> Case:
    """One step of a case as a case of its own, with another head."""
    one = slice(step, step + 1)
    return replace(
        case,
        head_inputs=case.head_inputs[one].detach().requires_grad_(),
        head_weight=head.detach().requires_grad_(),
        targets=case.targets[:, one],
        valid=case.valid[:, one],
        step_weights=case.step_weights[one],
        teacher_rows=case.teacher_rows[:, one],
    )


def test_a_frozen_head_gets_no_gradient_and_the_inputs_keep_theirs() -> None:
    case = make_case()
    wanted = gradients(cross_entropy(case), case)[0]
    case.head_weight.requires_grad_(False)
    cross_entropy(case, 4).total.backward()
    assert case.head_weight.grad is None
    torch.testing.assert_close(case.head_inputs.grad, wanted / 1.7)


def test_no_gradient_is_made_under_no_grad() -> None:
    case = make_case()
    with torch.no_grad():
        total = cross_entropy(case).total
    assert not total.requires_grad
    torch.testing.assert_close(total, eager(case, "cross_entropy").total.detach())


def test_distilling_from_oneself_costs_nothing_and_pulls_nowhere() -> None:
    case = make_case()
    own_logits = (case.head_inputs[0] @ case.head_weight.T).detach()
    same_rows = torch.arange(ANCHORS)[:, None].expand(ANCHORS, STEPS)
    inputs = case.head_inputs[:1].detach().expand(STEPS, -1, -1).clone().requires_grad_()
    sums = head_distillation(
        inputs,
        case.head_weight,
        lambda rows: TeacherLogits(own_logits[rows]),
        same_rows,
        case.targets,
        case.valid,
        case.step_weights,
    )
    torch.testing.assert_close(sums.loss_sum, torch.zeros(STEPS, dtype=torch.float64), atol=1e-12, rtol=0)
    grad = torch.autograd.grad(sums.total, inputs)[0]
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_a_token_the_target_can_never_say_adds_nothing_to_the_divergence() -> None:
    case = make_case()
    case.teacher_logits[:, 3] = -torch.inf
    fast, plain = distillation(case, 5), eager(case, "distillation")
    assert torch.isfinite(fast.total)
    torch.testing.assert_close(fast.total, plain.total)


@pytest.mark.parametrize("kind", ["distillation", "top-k of kept"])
def test_a_divergence_without_the_targets_entropy_is_cross_entropy_with_the_same_gradients(kind: str) -> None:
    case = make_case()
    teaching = TEACHINGS[kind]
    whole, without = distillation(case, 5, teaching), distillation(case, 5, teaching, entropy=False)
    for with_entropy, alone in zip(gradients(whole, case), gradients(without, case), strict=True):
        assert torch.equal(with_entropy, alone)
    assert (without.loss_sum > whole.loss_sum).all(), "the entropy of a distribution is positive"
    if kind == "distillation":
        target_probs = case.teacher_logits.softmax(-1)[case.teacher_rows].transpose(0, 1)
        entropy = torch.special.entr(target_probs).sum(-1)
        expected = torch.where(case.valid.T, entropy, 0.0).sum(1)
        torch.testing.assert_close(without.loss_sum - whole.loss_sum, expected)


def test_a_target_outside_the_draft_vocabulary_is_a_miss_but_no_loss() -> None:
    head_inputs, head_weight = torch.eye(2)[None], 9 * torch.eye(2)
    targets, valid = torch.tensor([[0], [OUTSIDE]]), torch.ones(2, 1, dtype=torch.bool)
    sums = head_cross_entropy(head_inputs, head_weight, targets, valid, torch.ones(1))
    assert (sums.loss_rows.tolist(), sums.rows.tolist()) == ([1], [2])
    assert sums.top1 is not None
    assert sums.top5 is not None
    assert (sums.top1.tolist(), sums.top5.tolist()) == ([1], [1])
    assert sums.loss_sum.item() == pytest.approx(torch.log1p(torch.tensor(-9.0).exp()).item(), rel=1e-3)


def test_ties_go_to_the_smaller_id_so_that_a_zero_head_scores_as_argmax_would() -> None:
    targets, valid = torch.tensor([[0], [1], [4], [5]]), torch.ones(4, 1, dtype=torch.bool)
    sums = head_cross_entropy(torch.zeros(1, 4, 3), torch.zeros(8, 3), targets, valid, torch.ones(1))
    assert sums.top1 is not None
    assert sums.top5 is not None
    assert (sums.top1.tolist(), sums.top5.tolist()) == ([1], [3])


def test_rows_are_grouped_by_teacher_with_masked_ones_left_out() -> None:
    teacher_rows = torch.tensor([7, 8, 7, 9])
    ids, grid = group_by_teacher(teacher_rows, torch.tensor([True, True, True, False]))
    assert ids.tolist() == [7, 8]
    assert grid.tolist() == [[0, 2], [1, -1]]


@pytest.mark.parametrize("num_heads", [1, STEPS])
def test_each_teacher_distribution_is_asked_for_once(num_heads: int) -> None:
    case = make_case()
    asked: list[int] = []

    def teacher(rows: Tensor) -> TeacherLogits:
        asked.extend(rows.tolist())
        return TeacherLogits(case.teacher_logits[rows])

    head_distillation(
        case.head_inputs,
        [case.head_weight] * num_heads,
        teacher,
        case.teacher_rows,
        case.targets,
        case.valid,
        case.step_weights,
        6,
    )
    assert sorted(asked) == sorted(set(case.teacher_rows[case.valid].tolist()))


@pytest.mark.parametrize("kind", ["cross_entropy", "d-pace", "distillation", "dspark"])
def test_a_batch_without_a_valid_row_gives_zero_and_zero_gradients(kind: str) -> None:
    case = make_case()
    case.valid[:] = False
    sums = fast_of(case, kind)
    assert sums.total.item() == 0.0
    assert all(not grad.any() for grad in gradients(sums, case))


def test_bf16_inputs_are_normalised_in_float32() -> None:
    case = make_case(torch.float32)
    exact = cross_entropy(case).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cross_entropy(case)
    assert mixed.total.dtype == torch.float32
    assert mixed.total.item() == pytest.approx(exact.item(), rel=2e-2)
    assert mixed.total.item() != exact.item(), "autocast was ignored"
    for grad, wanted in zip(gradients(mixed, case), gradients(cross_entropy(case), case), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted, atol=0.15, rtol=0.1)
    half = Case(
        **{**case.__dict__, "head_inputs": case.head_inputs.bfloat16(), "head_weight": case.head_weight.bfloat16()}
    )
    assert cross_entropy(half).total.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements any operation produced."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["cross_entropy", "distillation", "dspark"])
def test_no_tensor_exceeds_a_chunk_of_logits_at_a_vocabulary_of_128k(kind: str) -> None:
    vocab, chunk_rows, peaks = 8 * 1024 if kind == "dspark" else 128 * 1024, 6, []
    for anchors in (8, 64):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(STEPS, anchors, 2, generator=generator).requires_grad_()
        weight = torch.randn(vocab, 2, generator=generator).requires_grad_()
        targets = torch.randint(0, vocab, (anchors, STEPS), generator=generator)
        valid, step_weights = torch.ones(anchors, STEPS, dtype=torch.bool), torch.ones(STEPS)
        with LargestTensor() as seen:
            if kind == "cross_entropy":
                sums = head_cross_entropy(inputs, weight, targets, valid, step_weights, chunk_rows)
            else:
                rows = torch.arange(anchors)[:, None] + torch.arange(STEPS)[None]
                sums = head_distillation(
                    inputs,
                    weight,
                    lambda ids: TeacherLogits(ids[:, None] * torch.linspace(0, 1, vocab)),
                    rows,
                    targets,
                    valid,
                    step_weights,
                    chunk_rows,
                    **({} if kind == "distillation" else TEACHINGS[kind].extra),
                )
            sums.total.backward()
        peaks.append(seen.numel)
    assert peaks[0] == peaks[1] <= chunk_rows * vocab


def test_a_correction_of_another_vocabulary_is_named() -> None:
    case = make_case()
    given = (case.head_inputs, case.head_weight[:, :4], case.targets, case.valid, case.step_weights)
    with pytest.raises(ValueError, match="a correction of 5 rows is given beside a head of 17"):
        head_cross_entropy(*given, correction=case.head_weight[:5, :2])


def test_shapes_that_do_not_fit_are_named() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"targets has shape \(3, 11\)"):
        head_cross_entropy(case.head_inputs, case.head_weight, case.targets.T, case.valid, case.step_weights)
    given = (case.targets, case.valid, case.step_weights)
    with pytest.raises(ValueError, match=r"a head has shape \(17, 4\); head_inputs of width 6"):
        head_cross_entropy(case.head_inputs, case.head_weight[:, :4], *given)
    with pytest.raises(ValueError, match="2 heads are given for 3 draft steps"):
        head_cross_entropy(case.head_inputs, [case.head_weight] * 2, *given)


@pytest.mark.parametrize("kind", ["distillation", "paced kept acceptance", "dspark"])
def test_the_acceptance_of_each_row_is_that_of_the_targets_whole_distribution(kind: str) -> None:
    case, teaching = make_case(), TEACHINGS[kind]
    accepted = distillation(case, 4, teaching, keep_accepted=True).accepted
    assert accepted is not None
    target = case.teacher_logits.softmax(-1)
    if teaching.log_mass is not None:
        target = target * teaching.log_mass.exp()[:, None]
    draft = (case.head_inputs @ case.head_weight.T).softmax(-1)
    shared = torch.minimum(target[case.teacher_rows.T], draft).sum(-1).detach()
    torch.testing.assert_close(accepted, torch.where(case.valid.T, shared, 0.0))
    torch.testing.assert_close(eager(case, kind).accepted, accepted)
    assert distillation(case, 4, teaching).accepted is None


def test_paced_acceptance_pulls_along_the_expected_number_of_accepted_tokens() -> None:
    case = make_case()
    case.valid[:] = True
    teaching = Teaching(extra={"divergence": DivergenceLoss("negative_log_acceptance"), "d_pace": 0.0})
    case = replace(case, step_weights=torch.ones(STEPS, dtype=torch.float64))
    [found] = torch.autograd.grad(distillation(case, 7, teaching).total, case.head_inputs)
    draft, target = (case.head_inputs @ case.head_weight.T).softmax(-1), case.teacher_logits.softmax(-1)
    expected = torch.minimum(draft, target[case.teacher_rows.T]).sum(-1).cumprod(0).sum()
    [wanted] = torch.autograd.grad(-expected, case.head_inputs)
    torch.testing.assert_close(found, wanted)


def test_a_certain_teacher_makes_cross_entropy_of_the_negative_log_acceptance() -> None:
    """Even where the draft hardly knows the token: the gradient does not vanish with the acceptance."""
    inputs, head = torch.tensor([[[1.0]]]).double().requires_grad_(), torch.tensor([[0.0], [80.0]]).double()
    given = (torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool), torch.ones(1).double())
    certain = TeacherLogits(torch.tensor([[0.0, -torch.inf]]).double())
    rows = torch.zeros(1, 1, dtype=torch.int64)
    sums = head_distillation(
        inputs, head, lambda ids: certain, rows, *given, divergence=DivergenceLoss("negative_log_acceptance")
    )
    plain = head_cross_entropy(inputs, head, *given)
    torch.testing.assert_close(sums.total, plain.total)
    for one, other in zip(*(torch.autograd.grad(each.total, inputs) for each in (sums, plain)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_feature_loss_equals_the_formula_row_by_row() -> None:
    case = make_case()
    features = 2 * torch.randn(ANCHORS + STEPS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (case.head_inputs, features, case.teacher_rows, case.valid, case.step_weights)
    fast, plain = feature_smooth_l1(*arguments), feature_smooth_l1_eager(*arguments)
    torch.testing.assert_close(fast.total, plain)
    torch.testing.assert_close((case.step_weights * fast.loss_sum).sum(), plain.detach())
    fast_grad, plain_grad = (torch.autograd.grad(total, case.head_inputs)[0] for total in (fast.total, plain))
    torch.testing.assert_close(fast_grad, plain_grad)
