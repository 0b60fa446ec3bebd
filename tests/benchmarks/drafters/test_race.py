"""The race of all families: counts, ratios on the same prompts, verdicts on claims, and a run from rows to page on a tiny target."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from doubles import random_target
from tuning import SAMPLES

from benchmarks.drafters import race
from benchmarks.drafters.counting import Counted, count, paired_ratio
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.embedded import path
from draftsmith.models.tree.shapes import parse_shape


def test_counts_are_those_of_the_replies_decoded_one_by_one() -> None:
    engine = Engine(random_target())
    prompts = [list(sample.prompt_ids) for sample in SAMPLES]
    counted = count(engine, prompts, 0.0, 12)
    alone = [next(iter(engine.generate([prompt], GenerationSettings(max_new_tokens=12)))) for prompt in prompts]
    assert counted.emitted == tuple(len(reply.token_ids) - 1 for reply in alone)
    assert counted.tokens_per_step == pytest.approx(1.0)


def test_a_ratio_on_the_same_prompts_is_sure_where_single_figures_are_not() -> None:
    cycles = tuple(float(number) for number in range(10, 50))
    theirs = Counted(tuple(2 * cycle * (1 + place % 3) for place, cycle in enumerate(cycles)), cycles)
    ours = Counted(tuple(1.1 * tokens for tokens in theirs.emitted), cycles)
    ratio, low, high = paired_ratio(ours, theirs)
    assert (ratio, low, high) == pytest.approx((1.1, 1.1, 1.1))
    assert ours.interval[0] < theirs.tokens_per_step


@pytest.mark.parametrize(("gain", "verdict"), [(1.3, "holds"), (0.7, "does not hold"), (1.0, "not decided")])
def test_a_claim_holds_where_the_interval_lies_above_it(gain: float, verdict: str) -> None:
    def counted(name: str, shape: str, temperature: float) -> Counted:
        factor = gain if name == "hydra" else 1.0
        cycles = tuple(float(10 + place) for place in range(30))
        # Prompts differ more than 1.0 does from itself, and less than 0.7 and 1.3 do.
        noise = [1.0 + (0.2 if (place + (name == "hydra")) % 2 else 0.0) for place in range(30)]
        return Counted(tuple(3 * factor * cycle * each for cycle, each in zip(cycles, noise, strict=True)), cycles)

    table = race.claim_table(SimpleNamespace(counted=counted, depth=lambda name: 4), ["medusa", "hydra"])  # type: ignore[arg-type]
    assert len(table) == 3
    assert table[-1].endswith(f"| {verdict} |")


def test_every_claim_names_drafters_and_shapes_of_the_race() -> None:
    for _, *sides in race.CLAIMS:
        for name, number in sides:
            assert name in race.ALL_RECIPES
            parse_shape(race.shapes_of(4)[0.0][number])
    for shape in race.shapes_of(7)[1.0]:
        parse_shape(shape)


def test_a_race_goes_from_rows_to_a_page_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[row] for row in (20, 30, 40, 50, 60, 70, 80, 90)]
    rows = [
        {"id": str(n), "prompt_ids": prompt, "reply_ids": [n + token for token in range(30)]}
        for n, prompt in enumerate(prompts)
    ]
    for name in ("rows", "tests"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"race --target {path('target')} --rows {tmp_path}/rows.jsonl --tests {tmp_path}/tests.jsonl --work {tmp_path}/work"
    words += " --drafters medusa,suffix --seconds 2 --prompts 3 --tokens 8 --timed-prompts 1 --draft-vocab 64"
    monkeypatch.setattr(sys, "argv", words.split())
    assert race.main() == 0
    page = (tmp_path / "work" / "page.md").read_text()
    sections = [section.split("\n")[0] for section in page.split("## ")[1:]]
    assert sections == [
        "Training",
        "Tokens per step at temperature 0",
        "What the papers say",
        "Tokens per step at temperature 1",
        "Speed",
        "The machine",
    ]
    assert page.count("\n| medusa | ") == 4
    assert page.count("\n| suffix | ") == 3
    assert "100.0%" in page.split("## Speed")[1]
    assert page.count("draws nothing") == 2
    counts = (tmp_path / "work" / "counts.json").stat().st_mtime_ns
    assert race.main() == 0
    assert (tmp_path / "work" / "counts.json").stat().st_mtime_ns == counts
