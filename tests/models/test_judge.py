"""The judge: its equation, its threshold, its bond to one target, and which folders are an error."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from draftsmith.models.judge import POST_NORM, WITH_OPINION, Judge, JudgeConfig, load_judge, log_odds_of
from draftsmith.models.target.target import PRE_NORM, Target

D = 32
POINT = dict.fromkeys(("threshold", "correct", "correct_low", "correct_high", "wrong", "wrong_low", "wrong_high"), 0.5)


def a_judge(seed: int = 0, **settings: Any) -> Judge:
    judge = Judge(JudgeConfig(**({"hidden_size": D, "threshold": 0.5} | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        judge.mean.normal_(generator=generator)
        judge.scale.uniform_(0.5, 2.0, generator=generator)
        judge.weight.normal_(generator=generator)
        judge.bias.fill_(0.3)
    return judge.eval()


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., Path]:
    """change(config={...}, tensors=function) -> folder of a judge with these changes."""

    def save(
        config: dict[str, Any] | None = None, tensors: Callable[[dict[str, torch.Tensor]], None] | None = None
    ) -> Path:
        folder = tmp_path / "judge"
        a_judge().save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(fields))
        if tensors is not None:
            found = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
            tensors(found)
            save_file(found, folder / "model.safetensors")
        return folder

    return save


def test_the_equation_by_hand() -> None:
    judge = Judge(JudgeConfig(hidden_size=2, threshold=0.5))
    with torch.no_grad():
        judge.mean.copy_(torch.tensor([1.0, -1.0]))
        judge.scale.copy_(torch.tensor([2.0, 0.5]))
        judge.weight.copy_(torch.tensor([3.0, -1.0]))
        judge.bias.fill_(0.25)
    states = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    # (3 - 1) / 2 * 3 - (0 + 1) / 0.5 + 0.25;  (1 - 1) / 2 * 3 - (1 + 1) / 0.5 + 0.25
    assert judge.log_odds(states).tolist() == [1.25, -3.75]
    assert judge.accepts(states).tolist() == [True, False]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    judge, states = a_judge(), torch.randn(*shape, D)
    assert judge.log_odds(states).shape == judge.accepts(states).shape == shape


def test_half_precision_states_are_judged_in_float32_inside_autocast_too() -> None:
    judge, states = a_judge(), torch.randn(7, D).bfloat16()
    expected = judge.log_odds(states.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = judge.log_odds(states)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_post_norm_is_the_targets_norm_of_the_raw_states(target: Path) -> None:
    loaded = Target.load(str(target))
    states = torch.randn(6, D)
    plain = a_judge()
    normed = a_judge(feature=POST_NORM)
    assert normed.features == plain.features == (PRE_NORM,)
    with pytest.raises(ValueError, match="attached to no target"):
        normed.log_odds(states)
    normed.attach(loaded.ends)
    assert torch.allclose(normed.log_odds(states), plain.log_odds(loaded.ends.final_norm(states)))
    assert not torch.allclose(normed.log_odds(states), plain.log_odds(states))


def test_draft_states_stand_behind_the_targets() -> None:
    judge = a_judge(draft_hidden_size=4)
    states, draft = torch.randn(3, D), torch.randn(3, 4)
    by_hand = ((torch.cat([states, draft], -1) - judge.mean) / judge.scale) @ judge.weight + judge.bias
    assert torch.allclose(judge.log_odds(states, draft), by_hand)
    with pytest.raises(ValueError, match="draft_states are missing"):
        judge.log_odds(states)
    with pytest.raises(ValueError, match="draft_states are given"):
        a_judge().log_odds(states, draft)


def test_the_opinion_stands_between_the_targets_states_and_the_drafts() -> None:
    judge = a_judge(feature=WITH_OPINION, draft_hidden_size=4)
    states, opinion, draft = torch.randn(3, D), torch.randn(3, 6), torch.randn(3, 4)
    by_hand = ((torch.cat([states, opinion, draft], -1) - judge.mean) / judge.scale) @ judge.weight + judge.bias
    assert torch.allclose(judge.log_odds(states, draft, opinion), by_hand)
    with pytest.raises(ValueError, match=r"opinion is missing; this judge reads last\.pre_norm \+ opinion"):
        judge.log_odds(states, draft)
    with pytest.raises(ValueError, match=r"opinion is given; this judge reads last\.pre_norm;"):
        a_judge().log_odds(states, opinion=opinion)
    with pytest.raises(ValueError, match=r"opinion are torch.float32 of shape \(3, 5\)"):
        judge.log_odds(states, draft, opinion[:, :5])


def test_a_judge_from_before_there_were_opinions_loads_as_it_is(change: Callable[..., Path]) -> None:
    folder = change()
    fields = json.loads((folder / "config.json").read_text())
    for name in ("feature", "differing_curve"):
        del fields[name]
    (folder / "config.json").write_text(json.dumps(fields))
    judge, states = load_judge(folder), torch.randn(5, D)
    assert not judge.reads_opinion
    assert torch.equal(judge.log_odds(states), a_judge().log_odds(states))


@pytest.mark.parametrize("states", [torch.zeros(3, D + 1), torch.zeros(3, D, dtype=torch.int64)])
def test_states_of_another_model_are_refused(states: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"reads floats \[..., 32\]"):
        a_judge().log_odds(states)


def test_threshold_one_accepts_nothing_even_where_sigmoid_rounds_to_one() -> None:
    judge = a_judge().with_threshold(1.0)
    with torch.no_grad():
        judge.bias.fill_(1e6)
    states = torch.randn(9, D)
    assert torch.sigmoid(judge.log_odds(states)).eq(1.0).all()
    assert not judge.accepts(states).any()
    with torch.no_grad():
        judge.bias.fill_(math.inf)
    assert not judge.accepts(states).any()


def test_threshold_zero_accepts_all_but_what_is_not_a_number() -> None:
    states = torch.randn(3, D)
    states[1, 4] = math.nan
    assert a_judge().with_threshold(0.0).accepts(states).tolist() == [True, False, True]


@given(st.floats(-30, 30, width=32), st.floats(0, 1))
def test_acceptance_is_the_probability_above_the_threshold(log_odds: float, threshold: float) -> None:
    judge = Judge(JudgeConfig(hidden_size=1, threshold=threshold))
    with torch.no_grad():
        judge.bias.fill_(log_odds)
    probability = float(torch.sigmoid(torch.tensor(log_odds, dtype=torch.float64)))
    if abs(log_odds - log_odds_of(threshold)) > 1e-4:
        assert bool(judge.accepts(torch.zeros(1))) == (probability > threshold)


def test_another_threshold_is_a_copy_on_the_same_target(target: Path) -> None:
    ends = Target.load(str(target)).ends
    judge = a_judge(feature=POST_NORM).attach(ends)
    other = judge.with_threshold(0.9)
    states = torch.randn(50, D)
    assert (judge.config.threshold, other.config.threshold) == (0.5, 0.9)
    assert torch.allclose(judge.log_odds(states), other.log_odds(states), atol=1e-5)
    assert 0 < int(other.accepts(states).sum()) < int(judge.accepts(states).sum())
    with pytest.raises(ValueError, match=r"threshold is 1.5; it is a number from 0 to 1"):
        judge.with_threshold(1.5)


def test_another_target_or_tokenizer_is_refused(target: Path, other_target: Path) -> None:
    ends = Target.load(str(target)).ends
    judge = a_judge(target_name="mine", target_fingerprint=ends.fingerprint, tokenizer_fingerprint="a" * 64)
    assert judge.attach(ends) is judge
    with pytest.raises(ValueError, match="trained for target 'mine'"):
        judge.attach(Target.load(str(other_target)).ends)
    with pytest.raises(ValueError, match="expects hidden size 8"):
        Judge(JudgeConfig(hidden_size=8)).attach(ends)
    judge.check_tokenizer("a" * 64)
    judge.check_tokenizer("")
    with pytest.raises(ValueError, match="another tokenizer"):
        judge.check_tokenizer("b" * 64)


def test_a_saved_judge_comes_back_whole(tmp_path: Path) -> None:
    judge = a_judge(curve=[POINT], labels={"how": {"person": 3}}, draft_hidden_size=4, target_name="mine")
    judge.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    states, draft = torch.randn(5, D), torch.randn(5, 4)
    for found in (load_judge(tmp_path), Judge.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in judge.state_dict().items())
        # Not bit for bit: a matrix product's last digit hangs on where in memory its factors lie.
        assert torch.allclose(found.log_odds(states, draft), judge.log_odds(states, draft), atol=1e-5)
        assert found.config.curve == [POINT]
        assert found.config.labels == {"how": {"person": 3}}
        assert found.config.threshold == 0.5
        assert not found.training


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("threshold", 1.01, "number from 0 to 1"),
        ("threshold", math.nan, "number from 0 to 1"),
        ("threshold", True, "number from 0 to 1"),
        ("threshold", "0.5", "number from 0 to 1"),
        ("hidden_size", 0, "at least 1"),
        ("hidden_size", 32.0, "whole number"),
        ("draft_hidden_size", -1, "at least 0"),
        ("feature", "layer.3.output", "one of last.pre_norm, last.post_norm"),
        ("model_type", "llama", "a judge's is draftsmith_judge"),
        ("target_name", 3, "it is text"),
        ("labels", [], "it is an object"),
        ("curve", {}, "list of points"),
        ("curve", [{"threshold": 0.5}], "a point has threshold, correct"),
        ("curve", [POINT | {"wrong": 2.0}], "number from 0 to 1"),
        ("curve", [POINT, POINT], "above 0.5"),
        ("treshold", 0.5, "did you mean threshold?"),
    ],
)
def test_a_bad_field_is_refused_with_its_rule(
    change: Callable[..., Path], field: str, value: object, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule) as refused:
        load_judge(change(config={field: value}))
    assert field in str(refused.value)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("weight", None, r"lacks \['weight'\]"),
        ("extra", torch.zeros(1), r"unknown \['extra'\]"),
        ("mean", torch.zeros(D - 1), "float32 \\(32,\\)"),
        ("bias", torch.zeros(1), "it is float32 \\(\\)"),
        ("weight", torch.zeros(D, dtype=torch.bfloat16), "bfloat16"),
        ("weight", torch.full((D,), math.nan), "every number is finite"),
        ("mean", torch.full((D,), math.inf), "every number is finite"),
        ("scale", torch.zeros(D), "above 0"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(
    change: Callable[..., Path], name: str, tensor: torch.Tensor | None, told: str
) -> None:
    def alter(tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    with pytest.raises(ValueError, match=told):
        load_judge(change(tensors=alter))


def test_what_is_missing_or_broken_is_told_with_the_file(change: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_judge(tmp_path)
    folder = change()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ValueError, match="cut off"):
        load_judge(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_judge(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_judge(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_judge(folder)
