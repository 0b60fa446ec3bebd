"""The doctor's look at a target that a judge is to serve: how it continues right text in a draft LM's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.embedded import write_prompts
from draftsmith.evaluate.doctor.case import Use
from draftsmith.evaluate.doctor.doctor_command import CHECKS, doctor
from draftsmith.evaluate.doctor.foreign_words import Continued, _finding


@pytest.mark.parametrize(
    ("continued", "verdict", "told"),
    [
        (Continued(500, 495, 495, 0, 0), "ok", ""),
        (Continued(500, 495, 480, 2, 17), "warning", "no judge can keep the answers within a point"),
        (Continued(80, 79, 79, 0, 0), "warning", "even without a loss it takes 268"),
    ],
)
def test_the_verdict_follows_from_the_bounds(continued: Continued, verdict: str, told: str) -> None:
    finding = _finding(continued)
    assert finding.verdict == verdict
    assert told in finding.remedy
    assert f"{continued.problems} problems" in finding.measured
    assert finding.figures["change_low"] < (continued.gained - continued.lost) / continued.problems


def check(tmp_path: Path, drafter: str, **options: object) -> dict[str, object]:
    """The finding `judge` of the doctor, all other checks left out."""
    out = tmp_path / "report.json"
    skip = [*CHECKS, "overfit", "overlap", "duplicates"]
    doctor(drafter, "embedded:target", skip=skip, show=0, out=out, use=Use(judge="final-number"), **options)  # type: ignore[arg-type]
    [finding] = [one for one in json.loads(out.read_text())["findings"] if one["name"] == "judge"]
    return finding


def test_a_draft_lms_right_answers_are_begun_and_the_target_ends_them(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.jsonl", "train", 8)
    finding = check(tmp_path, "embedded:draft_lm", prompts=tmp_path / "train.jsonl")
    assert finding["verdict"] == "warning"
    figures = finding["figures"]
    assert isinstance(figures, dict)
    assert 4 <= figures["problems"] <= 8
    assert 0.5 <= figures["after_draft"] <= 1.0
    assert "too few problems" in str(finding["remedy"])


def test_without_problems_nothing_is_measured(tmp_path: Path) -> None:
    finding = check(tmp_path, "embedded:draft_lm")
    assert finding["verdict"] == "not checked"
    assert "name a checker with --judge, and problems with --prompts" in str(finding["measured"])
