"""Spec-Bench by category from cached replies: prompt lookup as Transformers runs it, categories joined, tables whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from doubles import random_target
from heads import shaken
from tiny import make_tokenizer
from tuning import SAMPLES

from benchmarks.real import spec_bench
from benchmarks.real.spec_bench import lookup_decoded, main, reply_set
from draftsmith.data.cache.extract import extract
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.contenders import TransformersContender
from draftsmith.models import Eagle, Target

REQUEST = GenerationSettings(max_new_tokens=16)


@torch.inference_mode()
def test_prompt_lookup_along_a_known_reply_takes_the_steps_of_transformers() -> None:
    target = random_target()
    contender = TransformersContender("lookup", target, REQUEST, prompt_lookup=3)
    decoded = [contender.decode([sample], [number])[0] for number, sample in enumerate(SAMPLES)]
    for sample, real in zip(SAMPLES, decoded, strict=True):
        ours = lookup_decoded(sample.prompt_ids, real.token_ids, 3)
        assert (ours.accepted, ours.prefill_tokens) == (real.accepted, real.prefill_tokens)
    assert any(sum(real.accepted) for real in decoded)


def test_prompt_lookup_counts_what_the_prompt_already_tells_as_the_prefills() -> None:
    decoded = lookup_decoded([5, 6, 7, 8, 5, 6], [7, 8, 9, 9, 4], 2)
    # 7 8 are drafted behind "5 6", and 9 is the target's. Then nothing is known behind 9, and 9 behind "9 9" is wrong.
    assert (decoded.prefill_tokens, decoded.accepted) == (3, (0, 0))


@pytest.fixture
def target_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    random_target().model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def replies(tmp_path: Path, target_dir: Path) -> Path:
    """Greedy replies with categories, as `data respond` writes them, and their cache beside them."""
    folder = tmp_path / "replies"
    folder.mkdir()
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    found = Engine(Target.load(str(target_dir))).generate(prompts, REQUEST)
    rows = [
        {"id": f"q{number}", "prompt_ids": prompt, "reply_ids": reply.token_ids, "category": "qa" if number else "math"}
        for number, (prompt, reply) in enumerate(zip(prompts, found, strict=True))
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(str(target_dir), folder / "responses.jsonl", tmp_path / "cache")
    return folder


def test_every_contender_has_a_column_and_every_category_a_row(
    replies: Path, target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    drafter = Eagle.for_target(Target.load(str(target_dir)).ends)
    drafter.save_pretrained(tmp_path / "drafter")
    words = ["--target", str(target_dir), "--set", "0", str(replies), str(tmp_path / "cache")]
    main([*words, "--drafters", f"head={tmp_path / 'drafter'}@1x2,2x2n3", "--report", str(tmp_path / "page.md")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Temperature 0:"
    assert lines[2] == "| category | prompts | prompt lookup 5 | head 1x2 | head 2x2n3 |"
    assert [line.split(" | ")[:2] for line in lines[4:]] == [["| math", "1"], ["| qa", "2"], ["| all", "3"]]
    assert (tmp_path / "page.md").read_text().splitlines() == lines


def test_trees_of_one_depth_share_their_drafts_and_count_as_each_does_alone(
    replies: Path, target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shaken(Eagle.for_target(Target.load(str(target_dir)).ends)).save_pretrained(tmp_path / "drafter")
    words = ["--target", str(target_dir), "--set", "0", str(replies), str(tmp_path / "cache")]
    recordings = []
    record = spec_bench.record_cached
    monkeypatch.setattr(
        spec_bench, "record_cached", lambda *given, **named: recordings.append(given) or record(*given, **named)
    )

    def cells(shapes: str) -> list[list[str]]:
        main([*words, "--drafters", f"head={tmp_path / 'drafter'}@{shapes}", "--report", str(tmp_path / "page.md")])
        return [line.strip("| ").split(" | ")[3:] for line in capsys.readouterr().out.splitlines()[4:]]

    shapes = ("30x2n5", "30x2n90", "1x4", "30x1n5")
    together = cells(",".join(shapes))
    assert len(recordings) == 3
    assert together == [[row[0] for row in rows] for rows in zip(*map(cells, shapes), strict=True)]
    assert together[-1][0] != together[-1][1]


def test_a_cache_of_other_replies_is_an_error(replies: Path, tmp_path: Path) -> None:
    (replies / "responses.jsonl").write_text(json.dumps({"id": "q0", "prompt_ids": [1], "reply_ids": [2]}) + "\n")
    with pytest.raises(ValueError, match=r"has the sample 'q1', and .* has no such row"):
        reply_set("0", replies, tmp_path / "cache")
