"""A killed evaluation resumes where it was, and only where it is the same one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from draftsmith.data.prompts import PromptSelection
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate import evaluate_command as command
from draftsmith.evaluate import measure
from draftsmith.evaluate.contenders import EngineContender, TransformersContender
from draftsmith.evaluate.evaluate_command import evaluate
from draftsmith.evaluate.measure import Plan
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.resume import WORK_FILE
from draftsmith.evaluate.roofline.stage_clock import StageTimes, clock_stages
from draftsmith.evaluate.strata.decoded import Decoded

Run = Callable[..., list[dict]]
NUM_PROMPTS = 4
# plain, transformers and one drafter, each once untimed and then once a prompt
CALLS = 3 + 3 * NUM_PROMPTS
TIMES = {
    "speedup", "tokens_per_second", "baseline_tokens_per_second", "transformers_tokens_per_second", "speedup_interval",
    "speedup_median", "speedup_over_transformers", "engine_vs_transformers", "suspicious", "stage_seconds",
}  # fmt: skip


class Calls:
    """Notes who decodes which prompts, and ends the process' life before call number `last`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, tuple[int, ...]]] = []
        self.last: int | None = None
        for kind in (EngineContender, TransformersContender):
            monkeypatch.setattr(kind, "decode", self.watched(kind.decode))

    def watched(self, decode: Callable[..., tuple[Decoded, ...]]) -> Callable[..., tuple[Decoded, ...]]:
        def watch(
            contender: EngineContender | TransformersContender, samples: Sequence[Sample], numbers: Sequence[int]
        ) -> tuple[Decoded, ...]:
            if len(self.made) == self.last:
                raise KeyboardInterrupt
            self.made.append((contender.name, tuple(numbers)))
            return decode(contender, samples, numbers)

        return watch

    def kill_before(self, number: int | None) -> None:
        self.made, self.last = [], number


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def run(tmp_path: Path, target: Path, drafter: Path) -> Run:
    """run(out, **settings): the rows of a small evaluation at two temperatures, without what a clock says."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt_ids": [10 + n, 9, 30, 5 + n], "source": "ab"[n % 2]} for n in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(out: Path, **settings: object) -> list[dict]:
        fields: dict = {"temperatures": [0.0, 1.0], "plan": Plan(prompt_lookup=0, ledger_prompts=1)} | settings
        fields["reply"] = ReplyOptions(max_new_tokens=fields.pop("max_new_tokens", 8), seed=fields.pop("seed", 0))
        evaluate(str(target), prompts, out, [f"mine={drafter}@2x3"], **fields)
        report = json.loads((out / "report.json").read_text())
        without_times = [{key: value for key, value in row.items() if key not in TIMES} for row in report["rows"]]
        for row in without_times:
            row["slices"] = [{**part, "speedup": None} for part in row["slices"]]
            row["roofline"] = {key: value for key, value in row["roofline"].items() if key.endswith("_bytes")}
        return without_times

    return start


def stage_lines(out: Path) -> dict[str, dict]:
    """The stage times that a killed run has noted, by contender."""
    rows = map(json.loads, (out / WORK_FILE).read_text().splitlines())
    return {name: times for row in rows for name, times in row.get("stages", {}).items()}


@pytest.mark.parametrize("killed_before", [1, 8, CALLS, CALLS + 9])
def test_a_killed_run_goes_on_to_the_same_rows_and_decodes_no_finished_round_again(
    tmp_path: Path, run: Run, calls: Calls, killed_before: int
) -> None:
    whole = run(tmp_path / "whole")
    calls.kill_before(killed_before)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut" / "report.json").exists()
    lines = (tmp_path / "cut" / WORK_FILE).read_text().splitlines()
    finished = sum('"round"' in line for line in lines)
    assert finished == {1: 0, 8: 1, CALLS: NUM_PROMPTS, CALLS + 9: NUM_PROMPTS + 2}[killed_before]
    calls.kill_before(None)
    assert run(tmp_path / "cut") == whole
    untimed = 3 * (2 - finished // NUM_PROMPTS)
    assert len(calls.made) == untimed + 3 * (2 * NUM_PROMPTS - finished)
    if finished < NUM_PROMPTS:
        first_temperature = calls.made[: 3 + 3 * (NUM_PROMPTS - finished)]
        assert min(numbers for _, numbers in first_temperature) == (finished,)
    assert not (tmp_path / "cut" / WORK_FILE).exists()


def test_a_round_torn_by_the_kill_is_decoded_again(tmp_path: Path, run: Run, calls: Calls) -> None:
    whole = run(tmp_path / "whole")
    calls.kill_before(12)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    work = tmp_path / "cut" / WORK_FILE
    work.write_bytes(work.read_bytes()[:-5])
    calls.kill_before(None)
    assert run(tmp_path / "cut") == whole
    assert min(numbers for _, numbers in calls.made[:3]) == (2,)


def test_stage_times_of_a_finished_temperature_are_kept(tmp_path: Path, run: Run, calls: Calls) -> None:
    calls.kill_before(CALLS)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    kept = stage_lines(tmp_path / "cut")
    calls.kill_before(None)
    run(tmp_path / "cut")
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["rows"][0]["stage_seconds"] == kept["plain"]["seconds"]
    assert report["rows"][1]["stage_cycles"] == kept["mine 2x3"]["cycles"] > 0


def test_a_kill_while_stages_are_clocked_costs_no_reply_and_no_contender_that_was_clocked(
    tmp_path: Path, run: Run, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked: list[bool] = []

    def killed_at_the_second(*arguments: object) -> StageTimes:
        clocked.append(True)
        if len(clocked) == 2:
            raise KeyboardInterrupt
        return clock_stages(*arguments)

    monkeypatch.setattr(measure, "clock_stages", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", temperatures=[0.0])
    kept = stage_lines(tmp_path / "cut")
    assert kept.keys() == {"plain"}
    calls.kill_before(None)
    rows = run(tmp_path / "cut", temperatures=[0.0])
    assert calls.made == [], "all replies are there, so none is decoded, not even to warm up"
    assert len(clocked) == 3
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["rows"][0]["stage_seconds"] == kept["plain"]["seconds"]
    assert rows[1]["stage_cycles"] > 0


def test_finished_rounds_count_at_whichever_other_temperatures_they_are_asked_for_again(
    tmp_path: Path, run: Run, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", temperatures=[0.5, 0.0])
    calls.kill_before(CALLS + 9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    calls.kill_before(None)
    capsys.readouterr()
    assert run(tmp_path / "cut", temperatures=[0.5, 0.0]) == whole
    assert len(calls.made) == CALLS, "those at 0.5 alone"
    told = capsys.readouterr().out
    assert f"{WORK_FILE}: dropped 2 finished rounds of another evaluation, at temperature 1\n" in told


def test_what_is_dropped_and_what_is_replaced_is_said(
    tmp_path: Path, run: Run, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "out", temperatures=[0.0])
    calls.kill_before(8)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", temperatures=[0.0])
    calls.kill_before(None)
    capsys.readouterr()
    run(tmp_path / "out", temperatures=[0.0], max_new_tokens=9, seed=1)
    told = capsys.readouterr().out
    assert (
        "dropped 1 finished rounds of another evaluation, at temperature 0, with other max_new_tokens, seed\n" in told
    )
    assert (
        "report.json of an earlier evaluation (T=0) will be replaced; to keep it, stop and give another --out" in told
    )


def test_a_file_of_the_users_under_the_name_of_the_work_file_or_a_report_is_kept(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    for name, text in ((WORK_FILE, '{"to do": "water the plants"}\n{"torn'), ("report.md", "# Mine")):
        out.mkdir()
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} "):
            run(out)
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: text}
        (out / name).unlink()
        out.rmdir()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"max_new_tokens": 9},
        {"plan": Plan(prompt_lookup=0, ledger_prompts=1, repeats=2)},
        {"selection": PromptSelection(limit=3)},
    ],
    ids=str,
)
def test_another_evaluation_in_the_same_folder_starts_anew(
    tmp_path: Path, run: Run, calls: Calls, change: dict[str, int]
) -> None:
    calls.kill_before(CALLS)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    calls.kill_before(None)
    rows = run(tmp_path / "out", **change)
    assert [numbers for _, numbers in calls.made[:3]] == [(0,)] * 3
    assert rows == run(tmp_path / "whole", **change)


def test_times_of_another_machine_are_not_mixed_in(
    tmp_path: Path, run: Run, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls.kill_before(CALLS)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    calls.kill_before(None)
    monkeypatch.setattr(command.provenance, "machine", lambda: {"cpu": "another"})
    run(tmp_path / "out")
    assert len(calls.made) == 2 * CALLS
