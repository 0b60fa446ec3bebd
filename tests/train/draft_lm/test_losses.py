"""Divergences between a draft LM and its target: plain formulas, bounds, limits, gradients, and chunks that add up to the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from draftsmith.train.draft_lm.losses import (
    DIVERGENCES,
    DivergenceLoss,
    DivergenceName,
    DivergenceSums,
    acceptance,
    divergence_sums,
    forward_kl,
    jsd,
    reverse_kl,
    shared_log_probs,
    total_variation,
)

VOCAB = 5
logits = st.lists(st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB)


def log_probs(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log_softmax(-1)


def test_the_divergences_of_two_coins_by_hand() -> None:
    target, draft = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.75, 0.25]).double()
    pair = (target.log(), draft.log())
    assert forward_kl(*pair).item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert reverse_kl(*pair).item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert total_variation(*pair).item() == pytest.approx(0.25)
    assert acceptance(*pair).item() == pytest.approx(0.75)
    mean = [0.2 * 0.5 + 0.8 * 0.75, 0.2 * 0.5 + 0.8 * 0.25]
    of_target = 0.5 * math.log(0.5 / mean[0]) + 0.5 * math.log(0.5 / mean[1])
    of_draft = 0.75 * math.log(0.75 / mean[0]) + 0.25 * math.log(0.25 / mean[1])
    assert jsd(*pair, beta=0.2).item() == pytest.approx(0.2 * of_target + 0.8 * of_draft)


@given(logits, logits, st.floats(0.05, 0.95))
def test_divergences_are_bounded_and_vanish_for_equals(first: list[float], second: list[float], beta: float) -> None:
    target, draft = log_probs(first), log_probs(second)
    distance = total_variation(target, draft).item()
    assert 0.0 <= distance <= 1.0
    assert acceptance(target, draft).item() == pytest.approx(1.0 - distance)
    assert total_variation(draft, target).item() == pytest.approx(distance)
    assert forward_kl(target, draft).item() >= 2 * distance**2 - 1e-12  # Pinsker
    assert reverse_kl(target, draft).item() >= 2 * distance**2 - 1e-12
    entropy_of_beta = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert -1e-12 <= jsd(target, draft, beta).item() <= entropy_of_beta + 1e-12
    for name in set(DIVERGENCES) - {"cross_entropy"}:
        equal = DivergenceLoss(name, beta).value(target[None], target[None], torch.tensor([0]))
        assert equal.item() == pytest.approx(0.0, abs=1e-12)
        if distance > 1e-3:
            assert DivergenceLoss(name, beta).value(target[None], draft[None], torch.tensor([0])).item() > 1e-9


@given(logits, logits)
def test_the_jsd_tends_to_both_kls(first: list[float], second: list[float]) -> None:
    target, draft = log_probs(first), log_probs(second)
    small = 1e-7
    assert jsd(target, draft, small).item() / small == pytest.approx(
        forward_kl(target, draft).item(), rel=0.02, abs=1e-5
    )
    near_one = jsd(target, draft, 1 - small).item() / small
    assert near_one == pytest.approx(reverse_kl(target, draft).item(), rel=0.02, abs=1e-5)


@settings(deadline=None)
@given(logits, logits, st.sampled_from(DIVERGENCES), st.floats(0.1, 0.9), st.integers(0, VOCAB - 1))
def test_the_gradient_in_closed_form_is_that_of_the_formula(
    first: list[float], second: list[float], name: DivergenceName, beta: float, label: int
) -> None:
    divergence, target, labels = DivergenceLoss(name, beta), log_probs(first)[None], torch.tensor([label])
    draft_logits = torch.tensor([second], dtype=torch.float64, requires_grad=True)
    draft = draft_logits.log_softmax(-1)
    [wanted] = torch.autograd.grad(divergence.value(target, draft, labels).sum(), draft_logits)
    found = divergence.gradient(target, draft.detach(), labels)
    assert torch.allclose(found, wanted, atol=1e-10)


class Head(nn.Module):
    """A head with a bias, a scale and a soft cap: whatever a model may have."""

    def __init__(self, width: int, vocab: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab, dtype=dtype)

    def forward(self, states: Tensor) -> Tensor:
        return 5 * torch.tanh(self.linear(states) * 0.7 / 5)


def batch(rows: int = 7, draft_vocab: int = VOCAB, target_vocab: int = VOCAB) -> dict[str, object]:
    torch.manual_seed(0)
    draft_head, target_head = Head(3, draft_vocab), Head(4, target_vocab)
    return {
        "draft_states": torch.randn(rows, 3, dtype=torch.float64, requires_grad=True),
        "draft_head": draft_head,
        "head_parameters": list(draft_head.parameters()),
        "target_states": torch.randn(rows, 4, dtype=torch.float64),
        "target_head": target_head,
        "labels": torch.arange(rows) % min(draft_vocab, target_vocab),
    }


def whole(divergence: DivergenceLoss, given: dict[str, object], weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same with all logits at once and autograd: loss, and the gradients of states and the head's matrix."""
    draft, target, _ = shared_log_probs(
        given["draft_head"](given["draft_states"]),  # type: ignore[operator]
        given["target_head"](given["target_states"]).detach(),  # type: ignore[operator]
    )
    total = weight * divergence.value(target, draft, given["labels"]).sum()  # type: ignore[arg-type]
    matrix = given["head_parameters"][0]  # type: ignore[index]
    grads = torch.autograd.grad(total, [given["draft_states"], matrix])  # type: ignore[list-item]
    return total.detach(), *grads


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, None])
@pytest.mark.parametrize(("draft_vocab", "target_vocab"), [(5, 5), (8, 5), (5, 8)])
def test_chunks_add_up_to_the_whole(
    name: DivergenceName, chunk_rows: int | None, draft_vocab: int, target_vocab: int
) -> None:
    divergence, given = DivergenceLoss(name, 0.3), batch(draft_vocab=draft_vocab, target_vocab=target_vocab)
    total, grad_states, grad_matrix = whole(divergence, given, 0.25)
    sums = divergence_sums(divergence, row_weight=0.25, chunk_rows=chunk_rows, **given)  # type: ignore[arg-type]
    found = torch.autograd.grad(2.0 * sums.total, [given["draft_states"], given["head_parameters"][0]])  # type: ignore[list-item, index]
    assert sums.total.item() == pytest.approx(total.item())
    assert sums.loss.item() == pytest.approx(4 * total.item())
    assert torch.allclose(found[0], 2.0 * grad_states, atol=1e-7)
    assert torch.allclose(found[1], 2.0 * grad_matrix, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "lk_hybrid"])
def test_gradients_agree_with_finite_differences(name: DivergenceName) -> None:
    """But for the LK hybrid, whose weight is held constant."""
    given = batch(rows=3)
    weight, bias = given["head_parameters"]  # type: ignore[misc]

    def total(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = {**given, "draft_states": states, "head_parameters": [weight, bias]}
        return divergence_sums(
            DivergenceLoss(name), chunk_rows=2, row_weight=torch.tensor(1.0).double(), **changed
        ).total  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(total, (given["draft_states"], weight, bias))


def test_a_head_that_is_not_trained_gets_no_gradient_and_the_states_still_do() -> None:
    given = batch()
    for weight in given["head_parameters"]:  # type: ignore[attr-defined]
        weight.requires_grad_(False)
    divergence_sums(DivergenceLoss("forward_kl"), **given).total.backward()  # type: ignore[arg-type]
    assert given["draft_states"].grad is not None  # type: ignore[attr-defined]
    assert all(weight.grad is None for weight in given["head_parameters"])  # type: ignore[attr-defined]


def test_acceptance_and_agreement_are_summed_beside_the_loss() -> None:
    given = batch()
    draft, target, _ = shared_log_probs(
        given["draft_head"](given["draft_states"]),  # type: ignore[operator]
        given["target_head"](given["target_states"]),  # type: ignore[operator]
    )
    for name in DIVERGENCES:
        sums = divergence_sums(DivergenceLoss(name), chunk_rows=2, **given)  # type: ignore[arg-type]
        assert sums.acceptance.item() == pytest.approx((1 - total_variation(target, draft)).sum().item())
        assert sums.agreed.item() == (target.argmax(-1) == draft.argmax(-1)).sum().item()


def test_a_lower_total_variation_is_a_higher_acceptance() -> None:
    given = batch()
    before = divergence_sums(DivergenceLoss("total_variation"), **given)  # type: ignore[arg-type]
    before.total.backward()
    with torch.no_grad():
        for weight in [given["draft_states"], *given["head_parameters"]]:  # type: ignore[misc]
            weight -= 0.05 * weight.grad
    after: DivergenceSums = divergence_sums(DivergenceLoss("total_variation"), **given)  # type: ignore[arg-type]
    assert after.acceptance > before.acceptance + 0.05
    assert (after.acceptance + after.loss).item() == pytest.approx(7.0)


def test_tokens_that_one_model_has_not_get_no_mass() -> None:
    draft_logits, target_logits = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[0.0, 0.0]])
    draft, target, mass = shared_log_probs(draft_logits, target_logits)
    assert draft.exp().tolist() == target.exp().tolist() == [[0.5, 0.5]]
    assert mass.tolist() == [[0.0]]
    draft, target, mass = shared_log_probs(target_logits, torch.tensor([[0.0, 0.0, math.log(2.0)]]))
    assert target.exp().tolist() == [[0.5, 0.5]]
    assert mass.exp().tolist() == [[pytest.approx(0.5)]]
    assert acceptance(target + mass, draft).item() == pytest.approx(0.5)


def test_the_losses_of_acceptance_of_two_coins_by_hand() -> None:
    target, draft = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.75, 0.25]]).double()
    labels, share = torch.tensor([0]), math.exp(-2.0 * 0.75)
    wanted = {
        "total_variation": 0.25,
        "l1": 0.5,
        "negative_log_acceptance": -math.log(0.75),
        "lk_hybrid": share * forward_kl(target.log(), draft.log()).item() + (1 - share) * 0.25,
    }
    for name, value in wanted.items():
        loss = DivergenceLoss(name, eta=2.0)  # type: ignore[arg-type]
        assert loss.value(target.log(), draft.log(), labels).item() == pytest.approx(value), name
    for name in ("beta", "eta"):
        with pytest.raises(ValueError, match=f"{name} is 0.0"):
            DivergenceLoss("lk_hybrid", **{name: 0.0})


def test_a_token_of_the_text_that_the_draft_has_not_teaches_nothing() -> None:
    given = batch(rows=4, draft_vocab=5, target_vocab=8)
    given["labels"] = torch.tensor([1, 6, 2, 7])
    sums = divergence_sums(DivergenceLoss("cross_entropy"), chunk_rows=3, **given)  # type: ignore[arg-type]
    logits = given["draft_head"](given["draft_states"])[[0, 2]]  # type: ignore[operator, index]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]), reduction="sum")
    assert sums.loss.item() == pytest.approx(wanted.item())
    [found] = torch.autograd.grad(sums.total, [given["draft_states"]])  # type: ignore[list-item]
    [expected] = torch.autograd.grad(wanted, [given["draft_states"]])  # type: ignore[list-item]
    assert torch.allclose(found, expected, atol=1e-7)
    assert not expected[1].any()


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "total_variation", "negative_log_acceptance", "lk_hybrid"])
def test_tokens_that_a_target_never_says_do_no_harm(name: DivergenceName) -> None:
    target, draft = torch.tensor([[0.0, -math.inf]]).log_softmax(-1), torch.zeros(1, 2).log_softmax(-1)
    divergence, labels = DivergenceLoss(name), torch.tensor([0])
    assert torch.isfinite(divergence.value(target, draft, labels)).all()
    gradient = divergence.gradient(target, draft, labels)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_low_precision_states_give_gradients_of_their_dtype_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    head = Head(4, 300, torch.bfloat16)
    states = torch.randn(40, 4, dtype=torch.bfloat16, requires_grad=True)
    target_states, labels = torch.randn(40, 4), torch.zeros(40, dtype=torch.int64)
    sums = divergence_sums(
        DivergenceLoss("forward_kl"), states, head, list(head.parameters()), target_states, Head(4, 300, torch.float32),
        labels, 1 / 40, chunk_rows=8,
    )  # fmt: skip
    sums.total.backward()
    assert sums.total.dtype == torch.float32
    assert states.grad is not None
    assert states.grad.dtype == head.linear.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_no_logits_of_all_rows_ever_exist() -> None:
    seen: list[int] = []
    given = batch(rows=50)
    head = given["draft_head"]

    def watched(states: Tensor) -> Tensor:
        seen.append(len(states))
        return head(states)  # type: ignore[operator]

    sums = divergence_sums(DivergenceLoss("jsd"), chunk_rows=8, **{**given, "draft_head": watched})  # type: ignore[arg-type]
    sums.total.backward()
    assert sum(seen) == 50
    assert max(seen) == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_states": None}, "forward_kl is a divergence from a target"),
        ({"target_states": torch.zeros(2, 4)}, "2 target states for 7 draft states"),
        ({"labels": torch.zeros(3)}, "3 labels for 7 draft states"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        divergence_sums(DivergenceLoss("forward_kl"), **{**batch(), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "beta", "told"), [("kl", 0.5, "divergence 'kl'"), ("jsd", 0.0, "beta is 0.0"), ("jsd", 1.0, "beta is 1.0")]
)
def test_settings_out_of_range_are_refused(name: DivergenceName, beta: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DivergenceLoss(name, beta)
