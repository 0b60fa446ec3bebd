"""The benchmark of refined drafts: headroom and repeats agree with decoding, and one run makes the whole table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import VOCAB, random_target
from tuning import SAMPLES

from benchmarks.drafters.refinement import gain_of, headroom, likeliest_path, parse, report
from draftsmith.data.shards.shards import CachedSample
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.embedded import path
from draftsmith.evaluate.strata.acceptance import tokens_per_step
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.tune.recording import Drafted
from draftsmith.models import Drafter, ReDrafter, Target
from draftsmith.models.target.target import PRE_NORM
from draftsmith.models.tree.shapes import parse_shape

REQUEST = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def head(model: Target) -> Drafter:
    torch.manual_seed(0)
    return ReDrafter.for_target(model.ends, num_draft_steps=4).eval().bound(model.ends)


@pytest.fixture(scope="module")
def samples(model: Target) -> list[CachedSample]:
    prompts = [list(sample.prompt_ids) for sample in SAMPLES]
    made = []
    for number, reply in enumerate(Engine(model).generate(prompts, REQUEST)):
        ids = torch.tensor([*prompts[number], *reply.token_ids])
        states = model.prefix(ids[None], (PRE_NORM,)).feature(PRE_NORM)[0]
        made.append(
            CachedSample(str(number), ids, torch.arange(len(ids)) >= len(prompts[number]), {PRE_NORM: states}, None)
        )
    return made


@torch.inference_mode()
def test_an_oracle_of_one_candidate_is_the_heads_own_chain_and_one_of_all_tokens_accepts_all(
    model: Target, head: Drafter, samples: list[CachedSample]
) -> None:
    replies = Engine(model, head, parse_shape("1x4")).generate([list(each.prompt_ids) for each in SAMPLES], REQUEST)
    own = tokens_per_step([Decoded(tuple(reply.token_ids), tuple(reply.accepted)) for reply in replies])
    assert headroom(head, samples, 1, 4).oracle == pytest.approx(own)
    assert gain_of(head, samples, parse_shape("1x4")).steps == pytest.approx(own)
    everything = headroom(head, samples, VOCAB, 4)
    assert everything.oracle > 3.0
    assert len(everything.entropies) == 4


def test_the_likeliest_path_follows_the_best_child_of_each_node() -> None:
    tree = Drafted(
        np.array([3, 7, 8, 7, 9], dtype=np.int32),
        np.array([-1, 0, 0, 1, 2], dtype=np.int32),
        np.array([0, 1, 1, 2, 2], dtype=np.int32),
        np.array([0.0, -0.1, -1.0, -0.5, -1.1], dtype=np.float32),
    )
    assert likeliest_path(tree) == [3, 7, 7]


def test_one_run_trains_what_it_compares_and_makes_the_whole_table(tmp_path: Path) -> None:
    for name, count in (("rows", 12), ("tests", 4)):
        rows = [
            {"kind": "ab"[n % 2], "prompt_ids": [20 + n], "reply_ids": [n + token % 7 for token in range(24)]}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        f"--target {path('target')} --rows {tmp_path}/rows.jsonl --tests {tmp_path}/tests.jsonl --work {tmp_path}/work"
    )
    lines = list(
        report(parse([*words.split(), "--seconds", "1", "--alphas", "0.5", "4", "--paths", "4", "--candidates", "256"]))
    )
    tables = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "---" not in line]
    rows, (titles, *by_task) = tables[1:10], tables[10:]
    assert [title.split(",")[0] for title in titles[1::2]] == ["b", "a"], "the first reply is of a, and chose alpha"
    assert [cells[0] for cells in by_task] == [cells[0] for cells in rows]
    for whole, cells in zip(rows, by_task, strict=True):
        assert min(float(cells[1].split()[0]), float(cells[3].split()[0])) <= float(whole[2].split()[0]) + 0.01
    assert [cells[2] for cells in by_task[1:2]] == ["+0.0 %"]
    assert [cells[0] for cells in rows] == [
        "none",
        "0-gram: the candidates alone",
        "2-gram",
        "4-gram",
        "2-gram, 4 best paths",
        "neural LM",
        "Markov correction",
        "look-around",
        "look-around + 2-gram",
    ]
    assert [cells[1].strip() for cells in rows[:2]] == ["", "0"]
    assert all(cells[1] in ("0.5", "4") for cells in (*rows[2:6], rows[8]))
    assert rows[1][3] == "+0.0 %"
    figures = [float(cells[2].split()[0]) for cells in rows]
    assert min(figures) >= 1.0
    assert figures[3] > figures[1], "the table knows the repeated replies by heart"


@pytest.mark.parametrize("words", ["--rows a --cache b --heads c=d --tables e=f", "--rows a", "--cache b", ""])
def test_a_run_takes_either_rows_or_parts_that_exist(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--target", "t", *words.split()])
    assert "give --rows and --tests, or --cache, --heads and --tables" in capsys.readouterr().err
