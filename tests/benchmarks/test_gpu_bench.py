"""The GPU benchmark at its tiny scale, on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import bench as command
from benchmarks.gpu.decode_sections import Bench
from benchmarks.gpu.goals import Goal, goals, page
from benchmarks.gpu.oracle import Oracle
from benchmarks.gpu.subject import SCALES, prompt, random_target, timed
from draftsmith.decode import Engine
from draftsmith.models.tree.shapes import parse_shape

DECODING = ["memory", "plain", "verify", "cycles", "prefill", "rows", "train", "exact"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of one run of all sections but the slow one."""
    out = tmp_path_factory.mktemp("gpu")
    assert command.main(["--scale", "tiny", "--out", str(out), "--sections", *DECODING]) == 0
    (file,) = out.glob("*-gpu.json")
    return out, json.loads(file.read_text())


def test_every_section_has_its_figures(report: tuple[Path, dict[str, Any]]) -> None:
    sections = report[1]["sections"]
    assert list(sections) == DECODING
    assert sections["memory"]["copy_gb_per_s"] > 0.1
    assert set(sections["plain"]) == {"context 8", "context 16", "section_s"}
    assert sections["plain"]["context 16"]["bytes"] - sections["plain"]["context 8"]["bytes"] == 8 * 2 * 2 * 2 * 8 * 4
    assert sections["verify"]["nodes"] == 64
    assert sections["verify"]["same_tokens"]
    assert sections["verify"]["tokens_per_step"] > 2
    assert {"ReDrafter 4x5n15", "EAGLE 10x6n60"} < set(sections["cycles"])
    assert sections["cycles"]["EAGLE 10x6n60"]["draft_vocabulary"] == 24
    assert all(part["finite"] for part in sections["train"].values() if isinstance(part, dict))


def test_drafts_are_exact_in_float32(report: tuple[Path, dict[str, Any]]) -> None:
    figures = report[1]["sections"]["exact"]["float32"]
    assert figures["equal"] == figures["replies"] == 18


def test_the_page_names_goals_machine_versions_and_command(report: tuple[Path, dict[str, Any]]) -> None:
    (file,) = report[0].glob("*-gpu.md")
    text = file.read_text()
    assert "| plain decoding, context 8: at least 0.85 of the roofline |" in text
    assert "| float32: every reply equals plain decoding's | 18 of 18 equal | yes |" in text
    assert "not judged" in text
    assert "python -m benchmarks.gpu.bench --scale tiny" in text
    assert f"- torch: {torch.__version__}" in text


def test_all_runners_are_timed() -> None:
    figures = command.section("runners", Bench(SCALES["tiny"], torch.device("cpu")), 99.0)
    assert {"plain, eager", "plain, compiled", "ReDrafter 4x5n15, compiled"} < set(figures)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*DECODING, "runners"])
def test_every_section_runs_on_a_gpu(name: str) -> None:
    assert "error" not in command.section(name, Bench(SCALES["tiny"], torch.device("cuda")), 99.0)


def failing(bench: Bench) -> dict[str, Any]:
    raise RuntimeError("CUDA error: out of luck")


def test_a_section_that_fails_is_noted_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.SECTIONS, "plain", (failing, 1))
    assert command.main(["--scale", "tiny", "--out", str(tmp_path), "--sections", "plain", "memory"]) == 1
    (file,) = tmp_path.glob("*-gpu.json")
    sections = json.loads(file.read_text())["sections"]
    assert sections["plain"]["error"] == "RuntimeError: CUDA error: out of luck"
    assert sections["memory"]["copy_gb_per_s"] > 0


def test_each_section_is_on_disk_before_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(bench: Bench) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(command.SECTIONS, "plain", (killed, 1))
    with pytest.raises(KeyboardInterrupt):
        command.main(["--scale", "tiny", "--out", str(tmp_path), "--sections", "memory", "plain"])
    (file,) = tmp_path.glob("*-gpu.json")
    assert list(json.loads(file.read_text())["sections"]) == ["memory"]


def test_sections_that_would_not_end_in_time_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Bench(SCALES["full"], torch.device("cpu"))
    monkeypatch.setitem(command.SECTIONS, "plain", (failing, 40))
    assert command.section("plain", full, 39.0) == {"skipped": "39 s were left, about 40 s are needed"}


def test_the_whole_run_is_expected_to_take_less_than_its_time() -> None:
    assert sum(expected for _, expected in command.SECTIONS.values()) < 8 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_full_scale_without_a_gpu_ends_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "--scale tiny" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def plain_figures(share: float, seconds: float) -> dict[str, Any]:
    return {"plain": {"context 256": {"share_of_roofline": share, "first_use_s": seconds}, "section_s": 1.0}}


@pytest.mark.parametrize(
    ("sections", "met"),
    [
        (plain_figures(0.85, 29.0), [True, True]),
        (plain_figures(0.84, 31.0), [False, False]),
        ({"verify": {"nodes": 64, "over_plain_step": 1.15}}, [True]),
        ({"verify": {"nodes": 64, "over_plain_step": 1.16}}, [False]),
        ({"cycles": {"EAGLE": {"over_bound": 1.11, "first_use_s": 1.0}}}, [False, True]),
        ({"exact": {"float32": {"equal": 17, "replies": 18, "ties_only": True}}}, [False]),
        ({"exact": {"bfloat16": {"equal": 17, "replies": 18, "ties_only": True}}}, [True]),
        ({"exact": {"bfloat16": {"equal": 17, "replies": 18, "ties_only": False}}}, [False]),
        ({"plain": {"error": "RuntimeError"}, "verify": {"skipped": "no time"}}, []),
    ],
)
def test_goals_are_met_up_to_their_limit(sections: dict[str, Any], met: list[bool]) -> None:
    assert [goal.met for goal in goals(sections)] == met


def test_at_full_scale_a_goal_that_is_missed_says_no() -> None:
    goal = Goal("a cycle of EAGLE: at most 1.10 of its bound", "1.20", False)
    facts: dict[str, Any] = {"scale": "full", "dtype": "bfloat16", "device": "H200", "command": "c", "sections": {}}
    text = page(facts | {"goals": [vars(goal)], "machine": {}, "versions": {}})
    assert "| a cycle of EAGLE: at most 1.10 of its bound | 1.20 | **no** |" in text


def accepted_by(texts: Callable[[list[int], list[int]], list[int]]) -> list[int]:
    scale = SCALES["tiny"]
    target = random_target(scale, torch.float32, torch.device("cpu"))
    ids = prompt(scale, 8)
    truth = timed(Engine(target), [ids], 24).token_ids[0]
    engine = Engine(target, Oracle(target.ends, [texts(ids, truth)]), parse_shape("3x3"))
    timing = timed(engine, [ids], 24)
    assert timing.token_ids[0] == truth
    return timing.generations[0].accepted


def test_an_oracle_is_right_for_as_many_tokens_as_its_place_says() -> None:
    # 8 tokens are cached: 8 % 4 = 0 accepted; then 9 % 4 = 1, 11 % 4 = 3, and 15 % 4 = 3.
    assert accepted_by(lambda ids, truth: ids + truth)[:4] == [0, 1, 3, 3]


def test_an_oracle_that_knows_another_text_changes_no_token() -> None:
    wrong = accepted_by(lambda ids, truth: [(token + 7) % 96 for token in ids + truth])
    assert sum(wrong) < len(wrong)
