"""Exporting a judge: the folder, the card that says what is lost, and AutoJudge's numbers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from draftsmith import cli, provenance
from draftsmith.models import Target, tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.judge import POST_NORM, WITH_OPINION, CurvePoint, Judge, JudgeConfig, load_judge

D = 32


def point(threshold: float, correct: float, wrong: float) -> CurvePoint:
    return CurvePoint(
        threshold=threshold,
        correct=correct,
        correct_low=correct * 0.9,
        correct_high=min(1.0, correct * 1.1),
        wrong=wrong,
        wrong_low=wrong * 0.5,
        wrong_high=min(1.0, wrong * 1.5),
    )


AT = point(0.625, 0.8, 0.04)
CURVE = [
    point(0.0, 1.0, 1.0),
    point(0.3, 0.95, 0.25),
    point(0.625, 0.8, 0.04),
    point(0.9, 0.3, 0.005),
    point(1.0, 0.0, 0.0),
]
LABELS = {
    "how": {"person": 400, "rule": 100},
    "source": {"sums": 500},
    "questions": {"train": 225, "validation": 25},
    "correct": {"train": 9000, "validation": 1000},
    "wrong": {"train": 300, "validation": 40},
    "l2": 0.01,
    "class_weight": "balanced",
    "max_wrong": 0.05,
    "hold_upper": False,
    "at_threshold": dict(AT),
}


def save_judge(folder: Path, target: Path, **settings: object) -> Path:
    torch.manual_seed(2)
    fields = {"hidden_size": D, "threshold": AT["threshold"], "curve": CURVE, "labels": LABELS, **settings}
    config = JudgeConfig(
        target_name=str(target),
        target_fingerprint=Target.load(str(target)).fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(str(target))),
        **fields,
    )
    judge = Judge(config)
    with torch.no_grad():
        judge.mean.normal_()
        judge.scale.uniform_(0.5, 2.0)
        judge.weight.normal_()
        judge.bias.fill_(0.2)
    judge.save_pretrained(folder)
    metrics = {"val/auc": 0.8765}
    provenance.write(folder, provenance.record("draftsmith train fit", {"metrics": metrics}, {}))
    return folder


@pytest.fixture
def judge(tmp_path: Path, target: Path) -> Path:
    return save_judge(tmp_path / "judge", target)


def run(*words: object) -> int:
    return cli.main(["judge", "export", *map(str, words)])


def test_an_export_is_the_judge_with_a_card_and_can_be_exported_again(
    judge: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--judge", judge, "--out", out, "--target", target) == 0
    assert "LOSSY" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md", "provenance.json"}
    assert run("--judge", out, "--out", tmp_path / "again") == 0
    assert run("--judge", judge, "--out", out) == 0
    before, after = load_judge(judge), load_judge(tmp_path / "again")
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert after.config.curve == CURVE
    assert provenance.read(tmp_path / "again")["training"]["config"]["metrics"] == {"val/auc": 0.8765}


def test_the_card_says_that_it_is_lossy_how_it_was_labelled_and_what_thresholds_do(judge: Path, tmp_path: Path) -> None:
    assert run("--judge", judge, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**This is LOSSY.**" in card
    assert "tags: [speculative-decoding, judge-decoding, lossy]" in card
    assert "| validation | 25 | 1000 | 40 |" in card
    assert "labelled by: person (400), rule (100); from: sums (500)" in card
    assert "| **0.625** | **80.0% (72.0% to 88.0%)** | **4.0% (2.0% to 6.0%)** |" in card
    assert "| 0.9 | 30.0% (27.0% to 33.0%) | 0.5% (0.2% to 0.8%) |" in card
    assert "chosen to accept at most 5% of the wrong tokens" in card
    assert "held-out questions: 0.8765" in card
    thresholds = [float(found) for found in re.findall(r"^\| ([\d.]+) \|", card, re.MULTILINE)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_the_card_has_a_table_of_the_tokens_that_a_judge_is_asked_about(target: Path, tmp_path: Path) -> None:
    labels = {**LABELS, "differing": {"correct": 70, "wrong": 9, "auc": 0.7654, "calibration_error": 0.1}}
    judge = save_judge(tmp_path / "judge", target, labels=labels, differing_curve=[point(0.4, 0.7, 0.02)])
    assert run("--judge", judge, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(70 correct, 9 wrong) the area under the ROC curve is 0.7654" in card
    assert "| 0.4 | 70.0% (63.0% to 77.0%) | 2.0% (1.0% to 3.0%) |" in card


def test_what_was_not_recorded_is_said_to_be_not_recorded(target: Path, tmp_path: Path) -> None:
    Judge(JudgeConfig(hidden_size=D)).save_pretrained(tmp_path / "bare")
    assert run("--judge", tmp_path / "bare", "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "was not recorded" in card
    assert card.count("Not recorded.") == 2
    assert "%" not in card


def test_another_threshold_is_exported_and_told(judge: Path, tmp_path: Path) -> None:
    assert run("--judge", judge, "--out", tmp_path / "out", "--threshold", 0.75) == 0
    assert load_judge(tmp_path / "out").config.threshold == 0.75
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This judge is set to 0.75." in card
    assert "chosen to accept" not in card
    assert "**80.0%" not in card


@pytest.mark.parametrize("feature", [POST_NORM, WITH_OPINION])
@pytest.mark.parametrize("reads_draft", [False, True])
def test_the_cards_program_runs(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reads_draft: bool,
    feature: str,
) -> None:
    settings = {"draft_hidden_size": D, "draft_name": str(target)} if reads_draft else {}
    judge = save_judge(tmp_path / "judge", target, feature=feature, **settings)
    assert run("--judge", judge, "--out", tmp_path / "out") == 0
    [program] = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(program, "README.md", "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


def test_autojudge_decides_as_the_judge_does_with_the_polarity_turned_round(target: Path, tmp_path: Path) -> None:
    judge = load_judge(save_judge(tmp_path / "judge", target, feature=POST_NORM))
    judge.attach(Target.load(str(target)).ends)
    assert run("--judge", tmp_path / "judge", "--out", tmp_path / "out", "--layout", "autojudge") == 0
    tensors = load_file(tmp_path / "out" / "autojudge.safetensors")
    numbers = json.loads((tmp_path / "out" / "autojudge.json").read_text())
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "weights": (D,),
        "mean": (D,),
        "scale": (D,),
        "bias": (1,),
    }
    states = torch.randn(300, D)
    normed = judge.ends.final_norm(states).numpy()
    values = ((normed - tensors["mean"]) / tensors["scale"]) @ tensors["weights"] + tensors["bias"]
    important = torch.from_numpy(values).sigmoid() >= numbers["threshold"]
    accepted = judge.accepts(states)
    assert torch.equal(accepted, ~important)
    assert 0 < int(accepted.sum()) < 300
    assert numbers["thresholds"] == pytest.approx([0.0, 0.1, 0.375, 0.7, 1.0])
    assert not list((tmp_path / "out").glob("*.pkl"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "threshold are turned round" in card
    assert "**This is LOSSY.**" in card


def test_autojudge_at_threshold_one_accepts_nothing(target: Path, tmp_path: Path) -> None:
    judge = save_judge(tmp_path / "judge", target, feature=POST_NORM)
    assert run("--judge", judge, "--out", tmp_path / "out", "--layout", "autojudge", "--threshold", 1) == 0
    assert json.loads((tmp_path / "out" / "autojudge.json").read_text())["threshold"] == 0.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "train a judge with feature last.post_norm"),
        ({"feature": WITH_OPINION}, "reads last.pre_norm + opinion"),
        ({"feature": POST_NORM, "draft_hidden_size": 4}, "without draft_cache"),
    ],
)
def test_what_autojudge_cannot_read_is_refused(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], told: str
) -> None:
    judge = save_judge(tmp_path / "judge", target, **settings)
    assert run("--judge", judge, "--out", tmp_path / "out", "--layout", "autojudge") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_of_another_target_is_refused(
    judge: Path, other_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--judge", judge, "--out", tmp_path / "out", "--target", other_target) == 1
    assert "this judge was trained for target" in capsys.readouterr().err


def test_nothing_of_anybody_elses_is_removed(judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--judge", judge, "--out", judge) == 1
    assert "and would delete it" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert run("--judge", judge, "--out", other) == 1
    assert "holds notes.txt" in capsys.readouterr().err
    shutil.copytree(judge, tmp_path / "training")
    assert run("--judge", judge, "--out", tmp_path / "training") == 1
    assert "`draftsmith judge export` did not write" in capsys.readouterr().err
    assert (other / "notes.txt").read_text() == "mine"
